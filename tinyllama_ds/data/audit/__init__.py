"""Checks prepared data against its manifests."""
