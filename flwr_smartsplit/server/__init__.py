"""What the strategy accepts, commits and merges."""
