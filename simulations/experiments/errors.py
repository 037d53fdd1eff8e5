"""The one exception of the simulations: a run that cannot be done as asked."""


class ExperimentError(Exception):
    """What was asked, against what it failed, and what to do next."""
