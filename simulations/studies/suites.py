"""Every suite by its name."""

from collections.abc import Callable

from simulations.attacks.suite import LEAKAGE
from simulations.experiments.experiment import Experiment
from simulations.studies.ablation import ABLATION
from simulations.studies.accuracy import ACCURACY
from simulations.studies.blocks.suite import PROGRESSIVE
from simulations.studies.latency import LATENCY
from simulations.studies.measurement import Measurement
from simulations.studies.memory.suite import MEMORY
from simulations.studies.quickstart import quickstart
from simulations.studies.scale.suite import SCALE
from simulations.studies.server_data import SERVER_DATA
from simulations.studies.study import LEARNING_CLAIMS, Study
from simulations.studies.traffic import TRAFFIC
from simulations.studies.widths import WIDTHS
from simulations.studies.zoo.suite import ZOO

SUITES: dict[str, Callable[[str], Experiment]] = {"quickstart": quickstart}
"""Suites that train in rounds, each on a data set."""

STUDIES: dict[str, Study] = {
    s.name: s
    for s in (
        *(ACCURACY, LATENCY, ABLATION, TRAFFIC, SERVER_DATA, WIDTHS),
        PROGRESSIVE,
    )
}
"""Suites of several cases and seeds."""

MEASUREMENTS: dict[str, Measurement] = {
    m.name: m for m in (MEMORY, SCALE, LEAKAGE, ZOO)
}
"""Suites that measure models, without rounds."""

SINGLE_CLAIMS = (*(c for c in LEARNING_CLAIMS if c != "gains"), "duration")
"""What is said of a suite that trains in rounds."""
