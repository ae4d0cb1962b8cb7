"""The Hugging Face hub: downloads, streaming, weights files, model cards."""
