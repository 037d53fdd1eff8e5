"""What a model is and what it costs: chains, segments, memory."""
