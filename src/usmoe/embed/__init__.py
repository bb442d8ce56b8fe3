"""Sentence vectors from language models, without training: hidden states, router logits, or both (MoEE)."""
