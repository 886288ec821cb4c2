"""Texts to token ids and back: sentencepiece, the tokenizers library, and gigatoken where it is verified equal."""
