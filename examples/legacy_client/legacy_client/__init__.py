"""legacy_client: a NumPyClient under a server of the legacy API."""
