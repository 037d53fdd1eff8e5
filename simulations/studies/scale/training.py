"""A simulated training with a thousand clients, of which fifty are asked in a round.

There are too few digits for so many clients, so each training image is there three
times: as it is, and shifted by a pixel to either side. The test set is as it was.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from simulations.experiments.data import NPZ_KEYS, load_images
from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import Iid
from simulations.experiments.provenance import Provenance
from simulations.experiments.rows import EvaluationRow
from simulations.experiments.runner import prepare, quiet_libraries, run_methods
from simulations.fleets.presets import half_weak
from simulations.report.summary import methods_object, read_results

NUM_CLIENTS, NUM_PER_ROUND, NUM_ROUNDS = 1000, 50, 10


def thousand_clients(seed: int) -> Experiment:
    """Describe the training: digits, four or five examples for each client."""
    return Experiment(
        name="scale",
        methods=("smartsplit",),
        num_clients=NUM_CLIENTS,
        num_rounds=NUM_ROUNDS,
        fraction_train=NUM_PER_ROUND / NUM_CLIENTS,
        fleet=half_weak,
        partition=Iid(),
        seed=seed,
    )


def measure_training(
    folder: Path, experiment: Experiment, *, provenance: Provenance
) -> dict[str, Any]:
    """Train, and say how long it took and how good the model became."""
    seen: list[EvaluationRow] = []
    experiment = replace(experiment, data=str(_with_shifted_digits(folder)))
    prepared = prepare(experiment, folder, provenance=provenance)
    with quiet_libraries(verbose=False):
        run_methods(
            experiment,
            folder,
            prepared=prepared,
            on_round=lambda _, row: seen.append(row),
        )
    results = read_results(folder)
    (figures,), rounds = results.figures().values(), results.runs[0].rounds
    return {
        "figures": methods_object({"": asdict(figures)})["methods"][""],
        "clients": experiment.num_clients,
        "clients_per_round": round(experiment.fraction_train * experiment.num_clients),
        "rounds": experiment.num_rounds,
        "accuracy": [row.accuracy for row in seen],
        "seconds_per_round": [row.round_wall_clock_sec for row in rounds],
        "accepted": [row.accepted for row in rounds],
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
