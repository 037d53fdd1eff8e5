"""Every suite by its name."""

from collections.abc import Callable

from simulations.experiments.experiment import Experiment
from simulations.studies.ablation import ABLATION
from simulations.studies.accuracy import ACCURACY
from simulations.studies.latency import LATENCY
from simulations.studies.measurement import Measurement
from simulations.studies.memory import suite as memory
from simulations.studies.quickstart import quickstart
from simulations.studies.scale import suite as scale
from simulations.studies.study import Study

SUITES: dict[str, Callable[[str], Experiment]] = {"quickstart": quickstart}
"""Suites that train in rounds, each on a data set."""

STUDIES: dict[str, Study] = {s.name: s for s in (ACCURACY, LATENCY, ABLATION)}
"""Suites of several cases and seeds."""

MEASUREMENTS: dict[str, Measurement] = {"memory": memory, "scale": scale}
"""Suites that measure models, without rounds."""
