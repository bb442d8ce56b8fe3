"""The adapter to Hugging Face transformers: pretrained MoE models under any router. Only this package imports it."""
