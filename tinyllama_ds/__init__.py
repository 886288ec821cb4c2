"""tinyllama_ds: raw text and a hostfile in, a TinyLlama-class language model out."""

__version__ = "0.2.0"
