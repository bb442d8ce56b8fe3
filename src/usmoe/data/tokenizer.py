"""A vocabulary as the tokenizer that transformers loads: the same tokens for every text."""

from __future__ import annotations

from typing import Any

from usmoe.data.bpe import Pieces
from usmoe.data.vocabulary import EOS, UNKNOWN, Bytes, Characters, Vocabulary, Words

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_WHITE_SPACE = "[" + "".join(character for code in range(0x3001) if (character := chr(code)).isspace()) + "]+"
"""What Python's str.split() splits at, as `Words` does."""


def for_transformers(vocabulary: Vocabulary, context: int) -> Any:
    """The tokenizer of a vocabulary, for models of `context` tokens at most; `save_pretrained` writes it.

    It gives a text the tokens that `vocabulary.encode` gives, and adds none. Where the vocabulary has no token for an
    unknown character, such a text is refused by `tokenizers`.
    """
    if isinstance(vocabulary, Pieces):
        return vocabulary.for_transformers(context)
    from transformers import PreTrainedTokenizerFast

    made = {Bytes: _of_bytes, Characters: _of_characters, Words: _of_words}[type(vocabulary)](vocabulary)
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=context, clean_up_tokenization_spaces=False)


def _of_bytes(vocabulary: Bytes) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # byte-level BPE writes a byte as a printable character: itself, or, for those that are none, one from 256 on
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(vocabulary.size) if byte not in printable]
    written = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    made = Tokenizer(models.BPE(vocab={written[byte]: byte for byte in range(vocabulary.size)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    return made


def _of_characters(vocabulary: Characters) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    places = {character: place for place, character in enumerate(vocabulary.alphabet)}
    unknown = {}
    if vocabulary.unknown:
        free = _REPLACEMENT if _REPLACEMENT not in places else UNKNOWN  # of several characters: no text has it as one
        places[free], unknown = len(places), {"unk_token": free}
    made = Tokenizer(models.WordLevel(places, **unknown))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore
    made.decoder = decoders.Fuse()  # pyright: ignore
    return made


def _of_words(vocabulary: Words) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary.words)}, unk_token=UNKNOWN))
    made.normalizer = normalizers.Replace("\n", f" {EOS} ")  # pyright: ignore
    made.pre_tokenizer = pre_tokenizers.Split(Regex(_WHITE_SPACE), "removed")  # pyright: ignore
    made.decoder = decoders.Sequence(  # pyright: ignore
        [
            decoders.WordPiece(prefix="\0", cleanup=False),  # a space before every word but the first
            decoders.Fuse(),
            decoders.Replace(f" {EOS}", "\n"),
            decoders.Replace(EOS, "\n"),
            decoders.Replace("\n ", "\n"),
        ]
    )
    return made
