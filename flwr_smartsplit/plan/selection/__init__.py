"""Who trains in a round, and why the others wait."""
