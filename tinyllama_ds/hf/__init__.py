"""Hugging Face: import, export, generate and chat."""
