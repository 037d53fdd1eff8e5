"""A client's part of a round: its loader along its route, under its cap."""
