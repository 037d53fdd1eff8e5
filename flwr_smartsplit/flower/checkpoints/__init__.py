"""Checkpoints: a run that is killed goes on where it was, bit for bit."""
