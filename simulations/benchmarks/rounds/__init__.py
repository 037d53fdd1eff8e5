"""What a round costs besides training, and how that grows with clients and edges."""
