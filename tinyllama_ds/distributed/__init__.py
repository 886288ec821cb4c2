"""This process among all ranks, and collectives."""
