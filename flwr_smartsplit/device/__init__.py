"""A client's part of a round: it trains along its route, under its memory cap."""
