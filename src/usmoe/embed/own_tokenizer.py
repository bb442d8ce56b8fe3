"""A tokenizer of the encoder's own: what others do with theirs changes no text that it reads."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedTokenizerBase


class OwnTokenizer:
    """A copy of a tokenizer, made anew when tokens have been added to the other.

    Truncation and padding are a state of a fast tokenizer, which a call in another thread sets for all; so one that
    neither truncates nor pads must be had by nobody else. A callable that is no tokenizer of transformers has no such
    state that could be known, and is used as it is.
    """

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs
        self._copied = self._copy()

    def now(self) -> Any:
        """The tokenizer that reads, for calls that neither truncate nor pad."""
        if self._copied[0] != _tokens(self.theirs):
            self._copied = self._copy()
        return self._copied[1]

    def _copy(self) -> tuple[Any, Any]:
        if not isinstance(self.theirs, PreTrainedTokenizerBase):
            return None, self.theirs
        said = _tokens(self.theirs)
        made = copy.deepcopy(self.theirs)
        made("", verbose=False)  # takes off a truncation that it was copied with
        return said, made


def _tokens(tokenizer: Any) -> tuple[int, int] | None:
    """How many tokens it knows, and how many of them were added: a token can be both."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    return len(tokenizer), len(tokenizer.added_tokens_decoder)
