"""The studies: suites of several cases and seeds, one file each."""

from simulations.studies.ablation import ABLATION
from simulations.studies.accuracy import ACCURACY
from simulations.studies.latency import LATENCY
from simulations.studies.study import Study

STUDIES: dict[str, Study] = {s.name: s for s in (ACCURACY, LATENCY, ABLATION)}
"""Every study by its name."""
