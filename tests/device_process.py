"""Measure what one device process holds: ``python -m tests.device_process``.

A device trains the front of torchvision's VGG-16 for one step while its edge runs in
another process. Printed as JSON: the growth of the device's resident set, from before
``model_fn`` to the peak of the step, beside the bytes of the whole model.
"""

import json
import multiprocessing
import sys
import tempfile
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from flwr_smartsplit import Route, Task
from flwr_smartsplit.model.building import build_chain, state_of
from flwr_smartsplit.runtime.edge import EdgeService
from flwr_smartsplit.runtime.training import Conditions, train_locally
from flwr_smartsplit.runtime.transport import HoldState, ReplyT, Request
from flwr_smartsplit.runtime.wire import state_digest
from flwr_smartsplit.types import ClientPlan, Status

CUT = 5
BATCH_SIZE = 8
TASK = Task(
    model_fn=partial(torchvision.models.vgg16, weights=None),
    loss_fn=nn.functional.cross_entropy,
    optimizer_fn=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    example_inputs=torch.zeros(1, 3, 32, 32),
    example_targets=torch.zeros(1, dtype=torch.int64),
)


def run_edge(pipe: Connection, folder: str) -> None:
    """Host the tail in this process, until told to end."""
    torch.set_num_threads(1)
    model = TASK.model_fn()
    state = state_of(model)
    del model
    chain = build_chain(TASK)
    service = EdgeService(TASK, spill_dir=Path(folder), incarnation="1")
    digest = state_digest(state)
    service.handle(HoldState(digest, state))
    device = {name: state[name] for name in chain.state_names(0, CUT)}
    pipe.send((digest, device, sum(array.nbytes for array in state.values())))
    del state
    while (request := pipe.recv()) is not None:
        pipe.send(service.handle(request))


class PipeTransport:
    """Reach an edge at the other end of a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Send the request and wait for its reply."""
        self._pipe.send(request)
        reply: ReplyT = self._pipe.recv()
        return reply


def status_bytes(key: str) -> int:
    """Read a size from this process's status, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(*, hold_whole_model: bool) -> dict[str, Any]:
    """Train one step on the device and say how its resident set grew."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        edge = context.Process(target=run_edge, args=(theirs, folder), daemon=True)
        edge.start()
        digest, state, model_bytes = ours.recv()
        before = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        kept = TASK.model_fn() if hold_whole_model else None
        plan = ClientPlan(
            client_key="0",
            round_number=1,
            route=Route.split(CUT),
            seed=0,
            state_digest=digest,
            edge_addresses={"edge": "pipe"},
        )
        outcome = train_locally(
            plan,
            state,
            [(torch.randn(BATCH_SIZE, 3, 32, 32), torch.arange(BATCH_SIZE))],
            Conditions(task=TASK, connect=lambda place, address: PipeTransport(ours)),
        )
        growth = status_bytes("VmHWM") - before
        ours.send(None)
        edge.join()
    assert outcome.report.status is Status.OK, outcome.report.message
    del kept
    return {
        "resident_growth_bytes": growth,
        "whole_model_bytes": model_bytes,
        "device_state_bytes": sum(array.nbytes for array in state.values()),
        "metered_peak_bytes": outcome.report.peak_bytes,
        "device_names": sorted(outcome.state),
    }


if __name__ == "__main__":
    result = measure(hold_whole_model="--hold-whole-model" in sys.argv)
    sys.stdout.write(json.dumps(result) + "\n")
