"""A byte-level BPE of one's own, by `tokenizers`: no normalisation, so that decoding gives back every byte."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from usmoe.data.corpus import Level
from usmoe.data.text import of_length

END, PADDING = "<|endoftext|>", "<|padding|>"
"""The special tokens, 0 and 1. Text that holds them as written is encoded as them."""

PIECE = 1_000_000
"""Characters that are encoded at a time, and of which the first SAMPLE are learned from."""

SAMPLE = 200_000


@dataclass(frozen=True)
class Pieces:
    """A tokenizer of byte-level BPE."""

    tokenizer: str = field(repr=False)
    """The JSON of `tokenizers`."""
    level: ClassVar[Level] = "bpe"

    @classmethod
    def learn(cls, pieces: Iterable[str], size: int) -> Pieces:
        """Merges learned from the first 200,000 of every million characters, until there are `size` tokens, or no two
        tokens left to merge."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END, PADDING],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        sample = (piece[:SAMPLE] for piece in of_length(pieces, PIECE))
        tokenizer.train_from_iterator((line for text in sample for line in text.splitlines(keepends=True)), trainer)
        return cls(tokenizer.to_str())

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", json.dumps(json.loads(self.tokenizer)))  # one text for equal tokenizers

    @cached_property
    def _made(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer)

    @property
    def size(self) -> int:
        """Tokens, the two special ones included."""
        return self._made.get_vocab_size()

    def encode(self, text: str | bytes) -> Int[np.ndarray, "tokens"]:
        """Tokens of the text, a million characters at a time."""
        pieces = of_length([text if isinstance(text, str) else text.decode()], PIECE)
        encoded = self._made.encode_batch_fast(list(pieces), add_special_tokens=False)
        return np.concatenate([np.empty(0, np.int64), *(np.asarray(piece.ids, np.int64) for piece in encoded)])

    def decode(self, ids: Int[np.ndarray, "tokens"]) -> str:
        """The text, special tokens as they are written."""
        return self._made.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def for_transformers(self, context: int) -> Any:
        """The tokenizer as transformers has it, for models of `context` tokens at most; `save_pretrained` writes it."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self._made,
            eos_token=END,
            pad_token=PADDING,
            model_max_length=context,
            clean_up_tokenization_spaces=False,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"level": self.level, "tokenizer": self.tokenizer}
