"""A model as a chain of units that can be cut between any two of them."""
