"""Pruning on the server: how much, which channels, and when."""
