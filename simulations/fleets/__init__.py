"""Simulated devices: their memory, speed and links, and the clock of their time."""
