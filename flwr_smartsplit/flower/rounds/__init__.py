"""Rounds: a phase is planned, sent, settled and learned from, whichever the API."""
