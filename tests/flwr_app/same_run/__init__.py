"""All kinds of route in one run."""
