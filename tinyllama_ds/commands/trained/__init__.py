"""Commands that make more of a trained model."""
