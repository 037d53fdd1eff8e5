"""SplitFed V1, from a copy of its authors' script.

``SFLV1_ResNet_HAM10000.py`` of ``chandra2thapa/SplitFed`` has no licence: it is not
shipped, and whoever measures it names a copy. Its own classes and functions run,
in one process as there; networks and data are those of the other peers.
"""

import ast
import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simulations.benchmarks.peers.work import LEARNING_RATE, Batches, resnet18_halves

_PARTS = ("prRed", "FedAvg", "calculate_accuracy", "train_server", "Client")


class SplitFed:
    """Train rounds as the script does."""

    def __init__(self, script: Path, num_clients: int, batches: Batches) -> None:
        self._front, back = resnet18_halves()
        self._num_clients = num_clients
        self._batches = batches
        self._names: dict[str, Any] = {
            "torch": torch,
            "copy": copy,
            "device": torch.device("cpu"),
            "num_users": num_clients,
            "lr": LEARNING_RATE,
            "criterion": nn.CrossEntropyLoss(),
            "net_glob_server": back,
            "net_model_server": [back] * num_clients,
        }
        _define(script, self._names)

    def round(self) -> None:
        """Train every client, then average the fronts; the script prints much."""
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            states = [self._trained(index) for index in range(self._num_clients)]
            self._front.load_state_dict(self._names["FedAvg"](states))

    def _trained(self, index: int) -> Any:
        client = object.__new__(self._names["Client"])  # It would make its own loader.
        client.idx, client.device, client.lr = index, torch.device("cpu"), LEARNING_RATE
        client.local_ep, client.ldr_train = 1, self._batches
        return copy.deepcopy(client.train(net=copy.deepcopy(self._front)))


def _define(script: Path, names: dict[str, Any]) -> None:
    """Run the script's functions, its client, and what it sets to plain values."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    kept = [node for node in tree.body if _is_wanted(node, names)]
    exec(compile(ast.Module(kept, []), script.name, "exec"), names)


def _is_wanted(node: ast.stmt, names: dict[str, Any]) -> bool:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name in _PARTS
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
        return False
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return node.targets[0].id not in names
