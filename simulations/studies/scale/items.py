"""What the scale suite measures: one item after the other, each a line of its rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from simulations.experiments.provenance import Provenance
from simulations.studies.measurement import MeasurementOptions
from simulations.studies.scale.edges import (
    RESNET18,
    SMALL,
    VGG19,
    EdgeCase,
    measure_edge,
    work_out_vgg19,
)
from simulations.studies.scale.planning import measure_planning
from simulations.studies.scale.rounds import measure_rounds
from simulations.studies.scale.training import measure_training, thousand_clients

PLANNING, EDGE_MEMORY, VGG19_100 = "planning", "edge_memory", "vgg19"
ROUNDS, TRAINING = "rounds", "training"

EDGE_CLIENTS: dict[bool, tuple[tuple[EdgeCase, int], ...]] = {
    True: ((SMALL, 16), (RESNET18, 8)),
    False: ((SMALL, 64), (RESNET18, 16)),
}
"""Models and numbers of clients, by whether the suite is small."""
ROUND_CLIENTS = {True: (10, 100), False: (10, 100, 1000)}
VGG19_CLIENTS = 4
NUM_DEVICES, NUM_SELECTED = 10_000, 100
"""What is planned for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One measurement.

    Parameters
    ----------
    part : str
        Its name in the summary.
    key : str
        Tells it from others of its part; empty if it is the only one.
    measure : Callable[[Path], dict[str, Any]]
        Measures, given the results folder.
    """

    part: str
    key: str = ""
    measure: Callable[[Path], dict[str, Any]]

    @property
    def title(self) -> str:
        """Name it for a person."""
        return " ".join(filter(None, (self.part.replace("_", " "), self.key)))


def scale_items(options: MeasurementOptions) -> list[Item]:
    """List what is to be measured, the quickest first."""
    small, seed = options.is_small, options.seed
    items = [Item(part=PLANNING, measure=_planning(seed))]
    items += [
        Item(part=EDGE_MEMORY, key=case.title, measure=_edge(case, count, seed))
        for case, count in EDGE_CLIENTS[small]
    ]
    items.append(Item(part=VGG19_100, measure=_vgg19(is_small=small, seed=seed)))
    items += [
        Item(part=ROUNDS, key=str(count), measure=_rounds(count))
        for count in ROUND_CLIENTS[small]
    ]
    if not small:
        items.append(Item(part=TRAINING, measure=_training(options)))
    return items


def _planning(seed: int) -> Callable[[Path], dict[str, Any]]:
    return lambda _: measure_planning(NUM_DEVICES, NUM_SELECTED, seed=seed)


def _edge(case: EdgeCase, count: int, seed: int) -> Callable[[Path], dict[str, Any]]:
    return lambda _: measure_edge(case, count, seed=seed)


def _vgg19(*, is_small: bool, seed: int) -> Callable[[Path], dict[str, Any]]:
    if is_small:
        return lambda _: work_out_vgg19()
    return lambda _: work_out_vgg19(measure_edge(VGG19, VGG19_CLIENTS, seed=seed))


def _rounds(count: int) -> Callable[[Path], dict[str, Any]]:
    return lambda _: measure_rounds(count)


def _training(options: MeasurementOptions) -> Callable[[Path], dict[str, Any]]:
    measure = partial(
        measure_training,
        experiment=thousand_clients(options.seed),
        provenance=Provenance(**options.provenance),
    )
    return lambda folder: measure(folder / TRAINING)
