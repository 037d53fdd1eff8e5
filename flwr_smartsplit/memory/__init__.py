"""What tensors take, counted and capped while a step runs."""
