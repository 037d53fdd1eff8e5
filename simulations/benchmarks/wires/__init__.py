"""What crosses a cut costs in time: ``python -m simulations.benchmarks.wires.NAME``."""
