"""Small corpora and tasks made from what is installed."""
