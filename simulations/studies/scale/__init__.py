"""The scale suite: what grows with the number of clients, and what does not."""
