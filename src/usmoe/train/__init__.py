"""Training from scratch, evaluation of what was trained, and fine-tuning."""
