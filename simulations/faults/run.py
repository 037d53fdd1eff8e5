"""The process of a ServerApp: one run of a strategy over nodes that are processes."""

import json
import logging
import threading
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import Server, SimpleClientManager
from flwr.server import strategy as legacy
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.serverapp import strategy as message

from flwr_smartsplit import (
    Checkpoints,
    GrpcEdge,
    LegacySmartSplit,
    Planning,
    SmartSplit,
)
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.grpc import GrpcHost
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from simulations.experiments.local_grid import RUN_ID
from simulations.faults import moments, task
from simulations.faults.grid import ProcessGrid, Station
from simulations.faults.moments import Here, Trap, WatchedHost

CLIENTS = {"a": False, "b": True, "c": True}
"""The clients, and whether they split."""
APIS = ("message", "legacy")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One run; the stage says where its edge is, and shows its metrics."""

    folder: Path
    address: str = ""
    metrics: int = 0
    api: str = "message"
    inner: str = "FedAvg"
    num_rounds: int = 3
    traps: tuple[Trap, ...] = ()
    absent: Set[tuple[str, int]] = frozenset()
    has_checkpoints: bool = False
    evaluates: bool = False
    chooses: bool = False  # Half of the clients, by their speed and loss
    patience_seconds: float = 40.0
    room_patience_seconds: float = 4.0
    timeout_seconds: float = 30.0  # Of a request to the edge
    reply_seconds: float = 60.0  # Of a client, in Flower


SECRET, FINAL = "edge.secret", "final.npz"


def edge_of(options: RunOptions, here: Here) -> Edge:
    """Describe the edge, for one process of the run."""
    edge = GrpcEdge(
        options.address,
        insecure=True,
        admin_secret_file=options.folder / SECRET,
        patience_seconds=options.patience_seconds,
        timeout_seconds=options.timeout_seconds,
    )
    assert isinstance(edge.host, GrpcHost)
    return replace(
        edge,
        host=WatchedHost(edge.host, here),
        room_patience_seconds=options.room_patience_seconds,
    )


def serve(options: RunOptions) -> None:
    """Run the strategy, and write down what came out."""
    folder = options.folder
    here = Here(folder, moments.STRATEGY, options.traps)
    log_to(folder / "strategy.log")
    threads = set(threading.enumerate())
    grid = ProcessGrid(
        [
            Station(
                Here(folder, key, options.traps),
                partial(_make_app, options, index),
            )
            for index, key in enumerate(CLIENTS)
        ],
        absent=options.absent,
    )
    strategy = _strategy(options, edge_of(options, here))
    try:
        state = _run(options, strategy, grid)
    finally:
        grid.close()
    time.sleep(0.1)
    left = [t.name for t in threading.enumerate() if t not in threads]
    write_final(folder, state)
    (folder / "left.json").write_text(json.dumps(left))


def _make_app(options: RunOptions, index: int, here: Here) -> ClientApp:
    log_to(options.folder / f"{here.who}.log")
    edges = (edge_of(options, here),)
    return task.app_of(index, here.who, edges, is_split=CLIENTS[here.who])


def _strategy(options: RunOptions, edge: Edge) -> Any:
    is_message = options.api == "message"
    api: Any = message if is_message else legacy
    names = ("train", "nodes") if is_message else ("fit", "clients")
    half = 0.5 if options.chooses else 1.0
    inner: dict[str, Any] = {
        f"fraction_{names[0]}": half,
        "fraction_evaluate": half if options.evaluates else 0.0,
        f"min_{names[0]}_{names[1]}": 2,
        f"min_evaluate_{names[1]}": 2,
        f"min_available_{names[1]}": len(CLIENTS),
    }
    if not is_message or options.inner != "FedAvg":
        initial = ndarrays_to_parameters(list(task.initial_state().values()))
        inner |= {} if is_message else {"initial_parameters": initial}
    folder = options.folder
    return (SmartSplit if is_message else LegacySmartSplit)(
        task.TASK,
        (edge,),
        strategy=getattr(api, options.inner)(**inner),
        planning=Planning(
            client_seconds=task.given_seconds,
            profile_timeout_seconds=60.0,
            choose_route=None if options.chooses else task.route_of,
        ),
        seed=7,
        verify=False,
        journal=folder / "journal-{number}.jsonl",
        checkpoints=Checkpoints(folder / "run") if options.has_checkpoints else None,
    )


def _run(options: RunOptions, strategy: Any, grid: ProcessGrid) -> dict[str, Any]:
    """Run Flower's own loop of the API; return the final state."""
    initial = task.initial_state()
    if options.api == "message":
        result = strategy.start(
            grid,
            to_array_record(initial),
            num_rounds=options.num_rounds,
            timeout=options.reply_seconds,
        )
        return from_array_record(result.arrays)
    manager = SimpleClientManager()
    for node in grid.get_node_ids():
        manager.register(GridClientProxy(node, grid, run_id=RUN_ID))
    server = Server(client_manager=manager, strategy=strategy)
    server.fit(num_rounds=options.num_rounds, timeout=options.reply_seconds)
    strategy.close()
    arrays = parameters_to_ndarrays(server.parameters)
    return dict(zip(initial, arrays, strict=True))


def write_final(folder: Path, state: Mapping[str, Any]) -> None:
    """Write down the final state, for the stage."""
    np.savez(folder / FINAL, **state)


def log_to(path: Path) -> None:
    """Send Flower's log to a file, and nothing to the terminal."""
    log = logging.getLogger("flwr")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
