"""Where an edge runs: in this process, or as a Ray actor."""
