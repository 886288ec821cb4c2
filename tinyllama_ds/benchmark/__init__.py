"""Measures the real training step and the all-reduce."""
