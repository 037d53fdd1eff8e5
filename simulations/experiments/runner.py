"""Run the methods of an experiment, under Flower's engine or in this process.

Everything a report needs goes into the results folder while it happens:
``config.json`` first, then one journal of JSON lines per method.
"""

import json
import logging
import random
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch import Tensor, nn

from flwr_smartsplit import Checkpoints, Route, narrowed, predicted_peak_bytes
from flwr_smartsplit.flower.journal.journal import Journal
from flwr_smartsplit.flower.registry import Fleet
from flwr_smartsplit.flower.serde.records import message_layout
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.train.threads import torch_threads
from flwr_smartsplit.types import WHOLE, ChainProfile, Variant
from simulations.experiments.client_app import MethodApp
from simulations.experiments.clients import build_client, build_task, edges_of
from simulations.experiments.data import client_indices, evaluation_loader, load_images
from simulations.experiments.errors import ExperimentError, writing_to
from simulations.experiments.experiment import Experiment
from simulations.experiments.local_grid import LocalGrid, awaited_nodes
from simulations.experiments.marks import (
    Mark,
    mark_path,
    state_digest,
    write_mark,
    write_whole,
)
from simulations.experiments.provenance import Provenance
from simulations.experiments.rows import EvaluationRow
from simulations.fleets.clock import Clock
from simulations.fleets.devices import Devices, Needs, is_weak
from simulations.fleets.presets import name_of
from simulations.methods import METHODS
from simulations.methods.method import Method, Setting
from simulations.report.summary import CONFIG, PROFILE

WAKING_TIMEOUT_SECONDS = 600.0
SAVED_EVERY = 10
"""How many rounds of SmartSplit's a process that is killed may lose."""

OnRound = Callable[[str, EvaluationRow], None]
"""``on_round(method_name, evaluation)`` is called after every round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the model needs, the devices made for it, and their clock."""

    needs: Needs
    devices: Devices
    clock: Clock


def prepare(
    experiment: Experiment,
    out: Path,
    *,
    provenance: Provenance,
    kept: Collection[str] = (),
    resumes: bool = False,
) -> Prepared:
    """Make the fleet and start a results folder, or go on with what it has."""
    prepared = prepared_fleet(experiment)
    config = describe(experiment, prepared) | asdict(provenance)
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        for name in METHODS.keys() - set(kept):
            journal = journal_path(out, name)
            mark_path(out, name).unlink(missing_ok=True)
            saved = checkpoints_of(journal).path
            if not (resumes and saved.is_dir()):
                shutil.rmtree(saved, ignore_errors=True)
                journal.unlink(missing_ok=True)
        (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (out / PROFILE).write_text(prepared.clock.profile.to_json(), encoding="utf-8")
    return prepared


def journal_path(out: Path, method_name: str) -> Path:
    """Say where a method's journal is."""
    return out / f"{method_name}.jsonl"


def checkpoints_of(journal: Path) -> Checkpoints:
    """Say where a method saves its run, and how often; gone when it has ended."""
    return Checkpoints(journal.with_suffix(".checkpoints"), every=SAVED_EVERY, keep=1)


def prepared_fleet(experiment: Experiment) -> Prepared:
    """Find out what the model needs on a device, and make the fleet.

    The peaks come from a dry run of every cut; nothing is allocated.
    """
    task = build_task(experiment)
    chain = build_chain(task)
    profile = profile_of(task, batch_size=experiment.batch_size)
    routes = [Route.whole(), *(Route.split(cut) for cut in range(1, len(chain)))]
    whole, *split = (predicted_peak_bytes(profile, route) for route in routes)
    needs = Needs(
        whole_peak_bytes=whole,
        smallest_peak_bytes=min([whole, *split]),
        edges=tuple(edge.name for edge in edges_of(experiment)),
    )
    devices = experiment.fleet(needs, experiment.num_clients, experiment.seed)
    costs = partial(variant_costs, experiment)
    clock = Clock(profile=profile, devices=devices, costs=costs)
    return Prepared(needs=needs, devices=devices, clock=clock)


def variant_costs(experiment: Experiment, variant: Variant) -> ChainProfile:
    """Find what a variant of the experiment's model costs, once in a process."""
    task, size = build_task(experiment), experiment.batch_size
    return profile_of(task, batch_size=size, variant=variant)


def describe(experiment: Experiment, prepared: Prepared) -> dict[str, Any]:
    """Write an experiment and its fleet down as JSON values."""
    needs = prepared.needs
    indices = client_indices(experiment)
    return {
        "experiment": {
            **asdict(experiment),
            "fleet": name_of(experiment.fleet),
            "partition": repr(experiment.partition),
            "data_dir": str(experiment.data_dir),
        },
        "methods": {name: METHODS[name].summary for name in experiment.methods},
        "num_train_examples": sum(map(len, indices)),
        "num_test_examples": len(load_images(experiment).y_test),
        "whole_peak_bytes": needs.whole_peak_bytes,
        "smallest_peak_bytes": needs.smallest_peak_bytes,
        "clients": [
            {
                "client_key": str(client),
                "is_weak": is_weak(device, needs),
                "budget_bytes": device.budget_bytes,
                "num_examples": len(indices[client]),
                "device": asdict(device),
            }
            for client, device in enumerate(prepared.devices)
        ],
    }


def run_methods(
    experiment: Experiment, out: Path, *, prepared: Prepared, on_round: OnRound
) -> None:
    """Run the methods one after the other and leave their journals behind.

    Clients are told by each message whether to train a part or the whole model, and
    within which budget.
    """

    def run(name: str, grid: Grid) -> None:
        journal = journal_path(out, name)
        setting = Setting(
            experiment=experiment,
            task=build_task(experiment),
            journal=journal,
            checkpoints=checkpoints_of(journal),
            devices=prepared.devices,
            clock=prepared.clock,
        )
        run_method(METHODS[name], setting, grid, on_round=on_round)

    app = client_app_of(experiment, prepared)
    if experiment.in_process:
        for name in experiment.methods:
            # Flower's strategies draw from Python's own generator: what one draws must
            # not depend on which methods ran before.
            random.seed(experiment.seed)
            run(name, LocalGrid([app] * experiment.num_clients))
        return

    def main(grid: Grid) -> None:
        _wake_clients(grid, experiment.num_clients)
        for name in experiment.methods:
            run(name, grid)

    num_workers = experiment.num_workers
    simulate_app(app, main, num_clients=experiment.num_clients, num_workers=num_workers)


def simulate_app(
    app: ClientApp, main: Callable[[Grid], None], *, num_clients: int, num_workers: int
) -> None:
    """Run a server's function under Flower's simulation engine, a CPU per client."""
    server_app = ServerApp()

    @server_app.main()
    def run(grid: Grid, context: Context) -> None:
        del context
        main(grid)

    run_simulation(
        server_app=server_app,
        client_app=app,
        num_supernodes=num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            # Else Ray silently joins whatever cluster runs on this machine.
            "init_args": {
                "address": "local",
                "num_cpus": num_workers,
                "include_dashboard": False,
                "log_to_driver": False,
            },
        },
    )


def client_app_of(experiment: Experiment, prepared: Prepared) -> ClientApp:
    """Build the app that serves every client of an experiment."""
    client_fn = partial(
        build_client,
        experiment=experiment,
        devices=prepared.devices,
        clock=prepared.clock,
    )
    task_fns = {name: method.task_fn for name, method in METHODS.items()}
    return MethodApp(client_fn, experiment, task_fns)


def _wake_clients(grid: Grid, num_clients: int) -> None:
    """Let the workers start and load their data, so that no method is charged for it.

    Asking for profiles is enough: a client builds its task and its loader for that.
    """
    nodes = awaited_nodes(grid, num_clients)
    fleet = Fleet(message_layout(), timeout_seconds=WAKING_TIMEOUT_SECONDS)
    _, failures = fleet.members(grid, nodes)
    if failures:
        raise ExperimentError(
            f"{len(failures)} of {num_clients} clients cannot start, and the log above "
            f"says why; the first: {failures[0].cause.splitlines()[-1]}"
        )


def run_method(
    method: Method, setting: Setting, grid: Grid, *, on_round: OnRound
) -> None:
    """Run one method from the common initial model; mark it once it has ended."""
    experiment, journal = setting.experiment, Journal(setting.journal)
    strategy = method.strategy_fn(setting)
    model = initial_model(method.model_fn(experiment), experiment.seed)
    loader = evaluation_loader(experiment)
    num_classes = load_images(experiment).num_classes
    forget = _forget_rounds(setting.journal)

    @torch.no_grad()
    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Evaluate the global model, as Flower asks after every round."""
        seen, variant = model, getattr(strategy, "variant", WHOLE)
        if variant != WHOLE:  # It was pruned in this run.
            seen = narrowed(model, variant, setting.task.example_inputs)
        seen.load_state_dict(arrays.to_torch_state_dict())
        with torch_threads(1):
            batches = [(method.outputs_fn(seen.eval()(x)), y) for x, y in loader]
        row = evaluation_row(server_round, batches, num_classes=num_classes)
        forget(server_round)
        journal.write({"kind": "evaluation", **asdict(row)})
        on_round(method.name, row)
        return MetricRecord({"accuracy": row.accuracy, "loss": row.loss})

    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=experiment.num_rounds,
        evaluate_fn=evaluate,
    )
    last = result.evaluate_metrics_serverapp[experiment.num_rounds]
    mark = Mark(
        method=method.name,
        state_sha256=state_digest({k: v.numpy() for k, v in result.arrays.items()}),
        accuracy=cast(float, last["accuracy"]),
        num_rounds=experiment.num_rounds,
    )
    write_mark(setting.journal.parent, mark)
    if setting.checkpoints is not None:
        shutil.rmtree(setting.checkpoints.path, ignore_errors=True)


def _forget_rounds(journal: Path) -> Callable[[int], None]:
    """Return what drops the rows that another process wrote of a round and later ones.

    Its first call counts: a run that goes on trains these rounds again.
    """
    size = journal.stat().st_size if journal.exists() else 0

    def forget(first: int) -> None:
        nonlocal size
        if size:
            text = journal.read_bytes()
            # The last line may be a part of one.
            lines = text[:size].rpartition(b"\n")[0].splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["round"] < first]
            write_whole(journal, b"".join([*kept, text[size:]]).decode())
            size = 0

    return forget


def initial_model(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build the model all methods start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def evaluation_row(
    server_round: int, batches: list[tuple[Tensor, Tensor]], *, num_classes: int
) -> EvaluationRow:
    """Work out accuracy, loss and per-class accuracy from outputs and targets.

    Batches are outputs ``(batch, classes)`` with targets ``(batch,)``. A class without
    examples has no accuracy (None).
    """
    outputs = torch.cat([output for output, _ in batches])
    targets = torch.cat([target for _, target in batches])
    is_right = (outputs.argmax(dim=1) == targets).double()
    of_class = [is_right[targets == label] for label in range(num_classes)]
    return EvaluationRow(
        round=server_round,
        accuracy=float(is_right.mean()),
        loss=float(nn.functional.cross_entropy(outputs, targets)),
        per_class_accuracy=tuple(
            float(right.mean()) if len(right) else None for right in of_class
        ),
    )


@contextmanager
def quiet_libraries(*, verbose: bool) -> Iterator[None]:
    """Let Flower log errors only, unless asked; drop two warnings known by name."""
    logger = logging.getLogger("flwr")
    levels = [handler.level for handler in logger.handlers]
    for handler in logger.handlers:
        handler.setLevel(logging.INFO if verbose else logging.ERROR)
    logger.addFilter(_is_not_about_run_simulation)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", FutureWarning
            )
            yield
    finally:
        logger.removeFilter(_is_not_about_run_simulation)
        for handler, level in zip(logger.handlers, levels, strict=True):
            handler.setLevel(level)


def _is_not_about_run_simulation(record: logging.LogRecord) -> bool:
    """Drop the one warning that the function this module is built on is deprecated."""
    return "`run_simulation` function is deprecated" not in record.getMessage()
