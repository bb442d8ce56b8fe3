"""Text to tokens to batches: a byte-level tokenizer of its own, and sequences in a seeded order."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_text(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8")


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path, context: int):
    """A byte-level BPE without normalisation, so that decoding gives back every byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def tokens_of(text: str, tokenizer) -> np.ndarray:
    pieces = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
    encoded = tokenizer.backend_tokenizer.encode_batch(pieces)
    return np.concatenate([np.asarray(piece.ids, dtype=np.uint16) for piece in encoded])


def prepare(recipe: Any, run: Path, texts: list[Path], validation: Path):
    """Tokenizer, training tokens and validation tokens, made once and kept in the run folder."""
    from transformers import AutoTokenizer

    folder = run / "tokenizer"
    if (run / "train.npy").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        corpora = [read_text(path) for path in texts]
        sample = [corpora[0][i : i + 200_000] for i in range(0, len(corpora[0]), 1_000_000)] + [
            corpus[: len(corpus) // 5] for corpus in corpora[1:]
        ]
        tokenizer = train_tokenizer(sample, recipe.vocab_size, folder, recipe.context)
        np.save(run / "validation.npy", tokens_of(read_text(validation), tokenizer))
        np.save(run / "train.npy", np.concatenate([tokens_of(corpus, tokenizer) for corpus in corpora]))
    return tokenizer, np.load(run / "train.npy", mmap_mode="r"), np.load(run / "validation.npy", mmap_mode="r")


def batch_at(tokens: np.ndarray, recipe: Any, step: int) -> Tensor:
    """(batch, context + 1): sequences of a seeded permutation, a new one and a new offset each epoch."""
    blocks = len(tokens) // recipe.context - 2
    rows = []
    for number in range(step * recipe.batch, (step + 1) * recipe.batch):
        epoch, place = divmod(number, blocks)
        generator = np.random.default_rng([recipe.seed, epoch])
        offset = generator.integers(recipe.context)
        start = offset + _permutation(recipe.seed, epoch, blocks)[place] * recipe.context
        rows.append(tokens[start : start + recipe.context + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, blocks: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 1]).permutation(blocks)
