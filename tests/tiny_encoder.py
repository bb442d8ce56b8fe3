"""Encoders of tiny random models, with a tokenizer of their own."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import usmoe
from tiny import tiny
from usmoe.embed.encoder import Encoder

TEXTS = ["a cat sat", "stocks fell on monday", "", "word " * 30, "a cat sat", "z"]
HALF = usmoe.USMoE(alpha=0.5)
EACH = [usmoe.USMoE(k=2, alpha=0.5), usmoe.ExpertChoice(k=2)]


def letters() -> PreTrainedTokenizerFast:
    """A token a character, within the 96 tokens of the tiny models."""
    known = {"<pad>": 0, "<s>": 1} | {chr(32 + n): 2 + n for n in range(94)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", unk_token="<pad>")


def encoder(router=None, embedding="hidden", model=None, **settings) -> Encoder:
    return Encoder(tiny() if model is None else model, letters(), router, embedding, **settings)


ENCODERS = {
    "hidden": lambda: encoder(),
    "a router a layer": lambda: encoder(EACH, pooling="mean", prompt='{text}" means "'),
    "router features": lambda: encoder(None, "router", router_features="probabilities", layers=[-1], max_length=20),
    "a standardised sum": lambda: encoder(HALF, "moee", moee="sum", w=0.3, standardize={"mine": TEXTS}),
    "patched before": lambda: encoder(None, "moee", usmoe.patch(tiny(), HALF)),
    "dense": lambda: encoder(model=dense()),
}


def dense():
    sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, max_position_embeddings=64, **sizes)).eval()


def positive(logits, valid, **kw):
    return usmoe.Routing.from_dense(logits.softmax(-1), logits > 0, valid=valid)
