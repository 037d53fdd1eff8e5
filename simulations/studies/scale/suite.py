"""The scale suite: what grows with the number of clients, and what does not."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from simulations.benchmarks.rounds.round_overhead import (
    FEDAVG,
    PLAIN_FEDAVG,
    SMARTSPLIT,
    Setting,
    simulate,
)
from simulations.experiments.data import NPZ_KEYS, load_images
from simulations.experiments.errors import ExperimentError
from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import Iid
from simulations.experiments.provenance import Provenance
from simulations.experiments.runner import prepare, quiet_libraries, run_methods
from simulations.fleets.presets import half_weak
from simulations.report.summary import methods_object, read_results
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


def thousand_clients(seed: int) -> Experiment:
    """Describe the training: digits, four or five examples for each client."""
    return Experiment(
        name="scale",
        methods=("smartsplit",),
        num_clients=1000,
        num_rounds=10,
        fraction_train=0.05,
        fleet=half_weak,
        partition=Iid(),
        seed=seed,
    )


def measure_training(
    folder: Path, experiment: Experiment, *, provenance: Provenance
) -> dict[str, Any]:
    """Train, and say how long it took and how good the model became."""
    experiment = replace(experiment, data=str(_with_shifted_digits(folder)))
    prepared = prepare(experiment, folder, provenance=provenance)
    with quiet_libraries(verbose=False):
        run_methods(experiment, folder, prepared=prepared, on_round=lambda *_: None)
    results = read_results(folder)
    (figures,), (run,) = results.figures().values(), results.runs
    return {
        "figures": methods_object({"": asdict(figures)})["methods"][""],
        "clients": experiment.num_clients,
        "clients_per_round": round(experiment.fraction_train * experiment.num_clients),
        "rounds": experiment.num_rounds,
        "accuracy": [row.accuracy for row in run.evaluations],
        "seconds_per_round": [row.round_wall_clock_sec for row in run.rounds],
        "accepted": [row.accepted for row in run.rounds],
    }


def _with_shifted_digits(folder: Path) -> Path:
    """Write the digits and their shifted copies to a file; return its path."""
    images = load_images(thousand_clients(0))
    width = images.x_train.shape[2]
    padded = np.pad(images.x_train, ((0, 0), (0, 0), (1, 1)))
    copies = [padded[:, :, left : left + width] for left in (1, 0, 2)]
    arrays = {name: getattr(images, name) for name in NPZ_KEYS}
    arrays["x_train"] = np.concatenate(copies)
    arrays["y_train"] = np.tile(images.y_train, len(copies))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / "digits.npz"
    np.savez(path, **arrays)
    return path


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
        train = {
            "experiment": thousand_clients(seed),
            "provenance": options.provenance,
        }
        found.append(_item(TRAINING, "", measure_training, **train))
    return found


def _item(
    part: str, of: str, measure: Callable[..., Row], *arguments: Any, **more: Any
) -> Item:
    """Make an item of a part of the suite, which may have several."""

    def measured(folder: Path) -> Row:
        own = {"folder": folder / part} if part == TRAINING else {}
        return {"part": part, "of": of, **measure(*arguments, **own, **more)}

    return Item(key=" ".join(filter(None, (part, of))), measure=measured)


def _vgg19(*, is_small: bool, seed: int) -> Row:
    return work_out_vgg19(
        None if is_small else measure_edge(VGG19, VGG19_CLIENTS, seed=seed)
    )


def measure_rounds(num_clients: int) -> Row:
    """Time steady rounds in which all clients do next to nothing."""
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
