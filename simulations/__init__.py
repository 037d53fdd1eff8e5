"""Simulated experiments: fleets of weak devices, methods to compare, reports."""
