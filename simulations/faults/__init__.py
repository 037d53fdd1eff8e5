"""Faults, injected for real into small federations on loopback, and long runs."""
