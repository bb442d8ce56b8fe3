"""Models that ship with usmoe, as data; usmoe.hf.load reads them."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent / "novelist"
"""The small OLMoE language model: weights, tokenizer, model card."""

SAMPLE = SHIPPED / "sample.txt"
"""Held-out text, to measure on."""

CALIBRATION = SHIPPED / "calibration.txt"
"""Pieces of many novels of the training text, to calibrate thresholds on."""
