"""The suites: one file per table or figure, each a function returning an Experiment."""

from collections.abc import Callable

from simulations.experiment import Experiment
from simulations.suites.quickstart import quickstart

SUITES: dict[str, Callable[[str], Experiment]] = {"quickstart": quickstart}
"""Every suite by its name; it is given the name of a data set."""
