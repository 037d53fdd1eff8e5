"""Methods run in this process: no Ray, no network, a second per round."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
from flwr.app import ArrayRecord

from flwr_smartsplit.flower.serde.records import from_array_record
from flwr_smartsplit.types import ChainProfile, UnitCost
from simulations.experiments.client_app import MethodApp
from simulations.experiments.clients import build_client, build_task
from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import Iid
from simulations.experiments.runner import initial_model
from simulations.fleets.clock import Clock
from simulations.fleets.devices import Devices, FleetDevice
from simulations.fleets.presets import unlimited
from simulations.methods import METHODS
from simulations.methods.method import Method, Setting
from tests.in_process_grid import InProcessGrid

Budgets = tuple[int | None, ...]

COSTS = (
    "parameter_bytes",
    "buffer_bytes",
    "gradient_bytes",
    "optimizer_state_bytes",
    "saved_bytes",
    "boundary_bytes",
    "forward_flops",
    "device_peak_bytes",
    "waiting_bytes",
    "return_bytes",
)

EXPERIMENT = Experiment(
    name="test",
    methods=("fedavg",),
    fleet=unlimited,
    partition=Iid(),
    max_train_examples=96,
    max_test_examples=40,
    num_clients=3,
    num_rounds=1,
)
"""Three clients with 32 examples each, so two steps a round."""


@dataclass(frozen=True)
class Ended:
    """A run that is over: the state before and after, and the journal's rows."""

    before: dict[str, npt.NDArray[Any]]
    after: dict[str, npt.NDArray[Any]]
    rows: list[dict[str, Any]]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Take the rows of one kind."""
        return [row for row in self.rows if row["kind"] == kind]


def devices_of(budgets_bytes: Budgets) -> Devices:
    """Make devices that say nothing but their budgets."""
    return tuple(FleetDevice(name="test", budget_bytes=each) for each in budgets_bytes)


def clock_of(budgets_bytes: Budgets) -> Clock:
    """Make a clock for which no work takes any time."""
    unit = UnitCost(name="0", **dict.fromkeys(COSTS, 0))
    profile = ChainProfile(batch_size=16, batch_bytes=1, units=(unit,))
    devices = devices_of(budgets_bytes)
    return Clock(profile=profile, devices=devices, costs=lambda variant: profile)


def grid_of(experiment: Experiment, budgets_bytes: Budgets) -> InProcessGrid:
    """Make a grid with the experiment's clients."""
    client_fn = partial(
        build_client,
        experiment=experiment,
        devices=devices_of(budgets_bytes),
        clock=clock_of(budgets_bytes),
    )
    task_fns = {name: method.task_fn for name, method in METHODS.items()}
    app = MethodApp(client_fn, experiment, task_fns)
    return InProcessGrid([app for _ in budgets_bytes])


def run_here(
    method: Method,
    folder: Path,
    *,
    budgets_bytes: Budgets = (None, None, None),
    grid: InProcessGrid | None = None,
    **changes: Any,
) -> Ended:
    """Run a method without evaluation."""
    experiment = replace(EXPERIMENT, num_clients=len(budgets_bytes), **changes)
    journal = folder / f"{method.name}.jsonl"
    journal.unlink(missing_ok=True)
    setting = Setting(
        experiment=experiment,
        task=build_task(experiment),
        journal=journal,
        devices=devices_of(budgets_bytes),
        clock=clock_of(budgets_bytes),
    )
    model = initial_model(method.model_fn(experiment), experiment.seed)
    before = ArrayRecord(model.state_dict())
    result = method.strategy_fn(setting).start(
        grid=grid or grid_of(experiment, budgets_bytes),
        initial_arrays=before,
        num_rounds=experiment.num_rounds,
    )
    return Ended(
        before=from_array_record(before),
        after=from_array_record(result.arrays),
        rows=[json.loads(line) for line in journal.read_text().splitlines()],
    )
