"""The recipe, DeepSpeed's JSON, and every optimizer step that follows from them."""
