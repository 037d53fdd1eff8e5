"""Mixings: how much a mean of old replies counts against the present state."""
