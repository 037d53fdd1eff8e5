"""A model in one step of a progressive training: frozen units and proxies."""
