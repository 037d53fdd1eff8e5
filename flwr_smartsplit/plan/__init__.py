"""Every decision, as pure functions on frozen values."""
