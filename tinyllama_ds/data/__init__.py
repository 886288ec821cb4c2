"""From raw text to batches: sources, tokenizer, shards, prepare, order, loader. Needs no torch before the loader."""
