"""The training step and the places it runs at."""
