"""Narrower models: groups of channels, and real smaller modules."""
