"""The decoder: a Llama-2 architecture under Hugging Face's parameter names. Needs nothing but PyTorch."""
