"""The suites: experiments with rounds, one file each, and measurements without."""

from collections.abc import Callable

from simulations.experiment import Experiment
from simulations.measurement import Measurement
from simulations.memory import suite as memory
from simulations.scale import suite as scale
from simulations.suites.quickstart import quickstart

SUITES: dict[str, Callable[[str], Experiment]] = {"quickstart": quickstart}
"""Every suite of rounds by its name; it is given the name of a data set."""

MEASUREMENTS: dict[str, Measurement] = {"memory": memory, "scale": scale}
"""Every suite without rounds by its name."""
