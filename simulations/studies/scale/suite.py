"""The scale suite: what grows with the number of clients, and what does not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from simulations.benchmarks.round_overhead import (
    FEDAVG,
    PLAIN_FEDAVG,
    SMARTSPLIT,
    Setting,
    simulate,
)
from simulations.experiments.errors import ExperimentError
from simulations.experiments.runner import quiet_libraries
from simulations.studies.measurement import Item, Measurement, MeasurementOptions, Row
from simulations.studies.scale.edges import (
    RESNET18,
    SMALL,
    VGG19,
    EdgeCase,
    measure_edge,
    work_out_vgg19,
)
from simulations.studies.scale.planning import measure_planning
from simulations.studies.scale.reports import (
    EDGE_MEMORY,
    PLANNING,
    ROUNDS,
    TRAINING,
    VGG19_100,
    report_of,
)
from simulations.studies.scale.training import measure_training, thousand_clients

EDGE_CLIENTS: dict[bool, tuple[tuple[EdgeCase, int], ...]] = {
    True: ((SMALL, 16), (RESNET18, 8)),
    False: ((SMALL, 64), (RESNET18, 16)),
}
"""Models and numbers of clients, by whether the suite is small."""
ROUND_CLIENTS = {True: (10, 100), False: (10, 100, 1000)}
VGG19_CLIENTS = 4
NUM_DEVICES, NUM_SELECTED = 10_000, 100
"""What is planned for."""

NUM_ROUNDS, NUM_HIDDEN, NUM_WORKERS = 3, 8, 2
WAYS = {PLAIN_FEDAVG: "plain", FEDAVG: "fedavg", SMARTSPLIT: "smartsplit"}


def items(options: MeasurementOptions) -> list[Item]:
    """List what is to be measured, the quickest first."""
    if options.models is not None:
        raise ExperimentError(
            "suite 'scale' has models of its own: leave out --models."
        )
    small, seed = options.is_small, options.seed
    found = [
        _item(PLANNING, "", measure_planning, NUM_DEVICES, NUM_SELECTED, seed=seed)
    ]
    found += [
        _item(EDGE_MEMORY, case.title, measure_edge, case, count, seed=seed)
        for case, count in EDGE_CLIENTS[small]
    ]
    found.append(_item(VGG19_100, "", _vgg19, is_small=small, seed=seed))
    found += [
        _item(ROUNDS, str(count), measure_rounds, count)
        for count in ROUND_CLIENTS[small]
    ]
    if not small:
        train = partial(
            measure_training,
            experiment=thousand_clients(seed),
            provenance=options.provenance,
        )
        found.append(
            Item(
                key=TRAINING,
                measure=lambda folder: {
                    "part": TRAINING,
                    "of": "",
                    **train(folder / TRAINING),
                },
            )
        )
    return found


def _item(
    part: str, of: str, measure: Callable[..., Row], *arguments: Any, **more: Any
) -> Item:
    """Make an item of a part of the suite, which may have several."""

    def measured(folder: Path) -> Row:
        del folder
        return {"part": part, "of": of, **measure(*arguments, **more)}

    return Item(key=" ".join(filter(None, (part, of))), measure=measured)


def _vgg19(*, is_small: bool, seed: int) -> Row:
    return work_out_vgg19(
        None if is_small else measure_edge(VGG19, VGG19_CLIENTS, seed=seed)
    )


def measure_rounds(num_clients: int) -> Row:
    """Time steady rounds in which all clients do next to nothing.

    Returns
    -------
    dict[str, Any]
        The median of each way, and SmartSplit's over FedAvg's with the same clients.
    """
    with TemporaryDirectory() as folder, quiet_libraries(verbose=False):
        setting = Setting(
            num_clients=num_clients,
            num_rounds=NUM_ROUNDS,
            num_workers=NUM_WORKERS,
            num_hidden=NUM_HIDDEN,
            apis=("message",),
            has_split=False,
            folder=Path(folder) / str(num_clients),
        )
        (found,) = simulate(setting, on_round=lambda: None)
    return {
        "seconds_per_round": {name: found.median(way) for way, name in WAYS.items()},
        "ratio": found.ratio(),
        "load": found.load,
    }


SCALE = Measurement(
    name="scale",
    summary="What grows with the number of clients: an edge's memory, disk, a round.",
    items_fn=items,
    report_fn=report_of,
    figures_fn=lambda rows: {row["key"]: row.get("figures", {}) for row in rows},
)
