"""Figures of speed, one file each: ``python -m simulations.benchmarks.NAME``."""
