"""Raw text to shards."""
