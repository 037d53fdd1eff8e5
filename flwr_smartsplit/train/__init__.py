"""One training step of one segment, the same at every place."""
