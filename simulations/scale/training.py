"""A simulated training with a thousand clients, of which fifty are asked in a round."""

from pathlib import Path
from typing import Any

from simulations.experiment import Experiment
from simulations.fleets import half_weak
from simulations.partitions import Iid
from simulations.provenance import Provenance
from simulations.rows import EvaluationRow, read_run
from simulations.runner import journal_path, prepare, quiet_libraries, run_methods

NUM_CLIENTS, NUM_PER_ROUND, NUM_ROUNDS = 1000, 50, 10


def thousand_clients(seed: int) -> Experiment:
    """Describe the training: digits, one or two examples for each client."""
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
    """Train, and say how long it took and how good the model became.

    Parameters
    ----------
    folder : Path
        Where the journals go.
    experiment : Experiment
        What is run.
    provenance : Provenance
        Stored with it.
    """
    seen: list[EvaluationRow] = []
    budgets = prepare(experiment, folder, provenance=provenance)
    with quiet_libraries(verbose=False):
        run_methods(
            experiment,
            folder,
            budgets=budgets,
            on_round=lambda _, row: seen.append(row),
        )
    rounds = read_run(journal_path(folder, experiment.methods[0])).rounds
    return {
        "clients": experiment.num_clients,
        "clients_per_round": round(experiment.fraction_train * experiment.num_clients),
        "rounds": experiment.num_rounds,
        "accuracy": [row.accuracy for row in seen],
        "seconds_per_round": [row.round_wall_clock_sec for row in rounds],
        "accepted": [row.accepted for row in rounds],
    }
