"""What a model does with long contexts: perplexity by position and by context, and needles in haystacks."""
