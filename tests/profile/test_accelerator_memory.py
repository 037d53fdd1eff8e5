"""What CUDA takes beyond a plan is bounded: blocks, and updates of all at once.

A real step on the CPU that counts in blocks and updates all at once stands for CUDA's.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit import MemoryBudget, Route, Task
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.flower import client as client_module
from flwr_smartsplit.memory import meter
from flwr_smartsplit.profile.accelerator_memory import accelerator_overhead
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import Status
from tests.device.test_local_training import Client, peak_of
from tests.flower.apps import make_client
from tests.tasks import BATCH_SIZE, TASK

ADAM = partial(torch.optim.Adam, lr=0.01)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
ROUTES = [Route.whole(), Route.split(2), Route.split(7), Route.u_shape(3, 8)]


def in_blocks(tensor: Tensor, num_bytes: int) -> int:
    """Size of a storage in blocks, wherever it is."""
    del tensor
    return -(-num_bytes // 512) * 512


def overhead(task: Task) -> int:
    """Bound what the tiny task takes more."""
    return accelerator_overhead(build_chain(task), batch_size=BATCH_SIZE, task=task)


@pytest.mark.every(3)
@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("optimizer_fn", [SGD, ADAM], ids=["SGD", "Adam"])
@pytest.mark.parametrize("norm", [None, 0.5])
def test_a_plan_and_the_overhead_cover_a_step_in_blocks(
    route: Route,
    optimizer_fn: Any,
    norm: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once or one by one; and without the overhead, the same step is refused."""
    task = replace(TASK, optimizer_fn=optimizer_fn, max_gradient_norm=norm)
    budget, spare = peak_of(route, task), overhead(task)
    at_once = replace(task, optimizer_fn=partial(optimizer_fn, foreach=True))
    monkeypatch.setattr(meter, "_taken", in_blocks)
    client = Client(tmp_path)
    facts: dict[str, Any] = {"budget_bytes": budget, "task": at_once}
    report = client.train(route, spare_bytes=spare, cap_mode="strict", **facts).report
    assert report.status is Status.OK
    assert budget < report.peak_bytes <= budget + spare
    refused = client.train(route, cap_mode="strict", **facts).report
    assert refused.status is Status.OUT_OF_MEMORY


def wide() -> nn.Module:
    """Build a model whose storages are large beside a block."""
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))


def test_the_overhead_of_large_tensors_is_small() -> None:
    """Some hundred bytes for each of a few dozen storages."""
    inputs, targets = torch.zeros(1, 256), torch.zeros(1, dtype=torch.int64)
    task = replace(TASK, model_fn=wide, example_inputs=inputs, example_targets=targets)
    assert 0 < overhead(task) < 32 * 2**10


def test_a_client_on_the_cpu_plans_with_all_of_its_budget() -> None:
    assert make_client(0, 10**6).profile.budget_bytes == 10**6


def test_a_budget_of_the_machines_memory_is_no_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that reads something else may be."""
    monkeypatch.setattr(client_module, "as_device", torch.device)
    budget = MemoryBudget.free_memory(reserve_bytes=0)
    with pytest.raises(InvalidTask, match="'c0' computes on cuda:0, and"):
        make_client(0, budget, device="cuda:0")
    make_client(0, budget)
    own = MemoryBudget.free_memory(reserve_bytes=0, available_bytes=lambda: 7)
    make_client(0, own, device="cuda:0")


def test_a_client_on_an_accelerator_keeps_the_overhead_for_itself() -> None:
    """The strategy plans with less; the cap holds at the budget."""
    client = make_client(0, 10**6)
    client._conditions = replace(client._conditions, device=torch.device("cuda", 0))
    assert client.profile.budget_bytes == 10**6 - overhead(TASK)
    small = make_client(0, 10)
    small._conditions = client._conditions
    assert small.profile.budget_bytes == 0
    unlimited = make_client(0, None)
    unlimited._conditions = client._conditions
    assert unlimited.profile.budget_bytes is None
