"""Speculative decoding: a draft model proposes tokens, and its target verifies several at once."""
