"""From texts to token ids: prompt, instruction, and a cut that leaves the prompt whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from usmoe.embed.own_tokenizer import OwnTokenizer
from usmoe.embed.prompts import instructed, template_of

_AT_ONCE = 4096
"""Texts tokenised in one call: a bound on what the tokenizer holds beside the ids."""

_CHARACTERS, _MARGIN = 8, 64
"""Characters looked at for a token that is read, at first; and tokens beyond those that are read: where a text is cut
within a word, its last tokens are others than in the whole."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Turns texts into token ids of at most `max_length`, special tokens included."""

    own: OwnTokenizer
    prompt: str
    """A name in PROMPTS, or a template with {text}."""
    max_length: int | None
    """Tokens of a sequence, at most; None where the model has no limit."""

    def __call__(self, texts: Sequence[str], instruction: str | None = None) -> list[list[int]]:
        """The token ids of each text; `ids_and_cut` says more."""
        return self.ids_and_cut(texts, instruction)[0]

    def ids_and_cut(self, texts: Sequence[str], instruction: str | None = None) -> tuple[list[list[int]], np.ndarray]:
        """The token ids of each text, as its model's tokenizer gives them for prompt and text together; and (n,), True
        for a text that was too long.

        Of a text that is too long, the end is cut off: what the prompt has behind the text stays. A text that has no
        token at all is read as the token that begins a text (or, in a model without one, ends it).

        Raises TypeError for what is no text, and ValueError where the prompt alone does not fit.
        """
        refuse_what_is_no_text(texts)
        if instruction is not None and not isinstance(instruction, str):
            raise TypeError(f"instruction={instruction!r} is no text. Give one for all texts, or None.")
        before, after = template_of(self.prompt)
        before += instructed(instruction)
        found: list[list[int]] = []
        texts = [self._shortened(text) for text in texts]
        for start in range(0, len(texts), _AT_ONCE):
            part = [f"{before}{text}{after}" for text in texts[start : start + _AT_ONCE]]
            found += self.own.now()(part, verbose=False)["input_ids"]
        limit = float("inf") if self.max_length is None else self.max_length
        cut = np.array([len(ids) > limit for ids in found], dtype=bool)
        for index, ids in enumerate(found):
            if cut[index]:
                found[index] = self._cut(before, texts[index], after)
            elif not ids:
                found[index] = [self._nothing()]
        return found, cut

    def _shortened(self, text: str) -> str:
        """The text; of one that is far longer than what is read of it, a beginning that has more tokens, and the end,
        beside which the tokens of the prompt are what they are: a long text takes no longer than a short one."""
        if self.max_length is None:
            return text
        most = self.max_length + _MARGIN
        size = _CHARACTERS * most
        while size + _MARGIN < len(text):
            if len(self.own.now()(text[:size], add_special_tokens=False, verbose=False)["input_ids"]) > most:
                return text[:size] + text[-_MARGIN:]
            size *= 2
        return text

    def _cut(self, before: str, text: str, after: str) -> list[int]:
        """The ids with the end of the text left out, so that they are `max_length`."""
        assert self.max_length is not None
        fast = bool(getattr(self.own.now(), "is_fast", False))
        said = self.own.now()(
            f"{before}{text}{after}", return_special_tokens_mask=True, return_offsets_mapping=fast, verbose=False
        )
        ids, special = said["input_ids"], said["special_tokens_mask"]
        first = next(index for index, mark in enumerate(special) if not mark)
        last = len(ids) - next(index for index, mark in enumerate(reversed(special)) if not mark)
        tail = self._tail(after, ids, said["offset_mapping"] if fast else None, first, last, len(before) + len(text))
        keep = self.max_length - first - (len(ids) - last) - len(tail)
        needed = len(self.own.now()(before, add_special_tokens=False, verbose=False)["input_ids"]) if before else 0
        if keep <= needed:
            raise ValueError(
                f"The prompt {self.prompt!r} and what belongs to it leave no room for a text in {self.max_length} "
                "tokens. Give a shorter prompt or instruction, or a larger max_length."
            )
        return ids[:first] + ids[first : first + keep] + tail + ids[last:]

    def _tail(self, after: str, ids: list[int], offsets: Any, first: int, last: int, begins: int) -> list[int]:
        """The ids of what the prompt has behind the text: those that it has in this place, or, where one of its tokens
        reaches into the text, those that it has by itself."""
        if not after:
            return []
        if offsets is not None:
            behind = next((index for index in range(first, last) if offsets[index][0] >= begins), last)
            if first < behind < last and offsets[behind - 1][1] <= begins:
                return ids[behind:last]
        return self.own.now()(after, add_special_tokens=False, verbose=False)["input_ids"]

    def _nothing(self) -> int:
        for name in ("bos_token_id", "cls_token_id", "eos_token_id"):
            token = getattr(self.own.now(), name, None)
            if token is not None:
                return token
        raise ValueError(
            "One of the texts is empty, and this tokenizer has no token that begins or ends a text, to read instead. "
            'Leave empty texts out, or give a prompt, such as prompt="prompteol".'
        )


def padding_of(model: Any, tokenizer: Any) -> int:
    """The token that fills a batch: the tokenizer's, or 0 where it has none or the model has no such token. It is
    masked, so that any would do."""
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    table = getattr(model.get_input_embeddings(), "weight", None)
    return padding if table is None or padding < len(table) else 0


def refuse_what_is_no_text(texts: Sequence[str]) -> None:
    """Raises TypeError, with the place, where one of the texts is no string, and ValueError where one holds half of a
    surrogate pair, which is no character."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"Text {index} is {'None' if text is None else f'of type {type(text).__name__}'}, not a string. Give a "
                "list of strings."
            )
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"Text {index} holds half of a surrogate pair, which is no character. Repair the text.")


def longest(model: Any, tokenizer: Any, asked: int | None) -> int | None:
    """Tokens that a model can read at most: the least of what model, tokenizer and user say; None for no limit.

    Raises ValueError where more is asked for than the model can read.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    said = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    limits = [int(limit) for limit in said if isinstance(limit, int | float) and 0 < limit < 1e9]
    limit = min(limits, default=None)
    if asked is None:
        return limit
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1 or (limit is not None and asked > limit):
        raise ValueError(
            f"max_length={asked!r} is impossible: this model reads 1 to {limit or 'any number of'} tokens. Choose one "
            "in between, or leave max_length out."
        )
    return asked
