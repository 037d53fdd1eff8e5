"""Measure what one device process holds: ``python -m tests.device_process``.

A device trains the front of a VGG-16 with a smaller head for one step, while its edge
runs in another process. Printed as JSON: the growth of the device's resident set, from
before ``model_fn`` to the peak of the step, beside the bytes of the whole model.

With ``--fence``, a client that owns its process trains without an edge: the meter's
peak beside the growth of the resident set, then a budget that is enough, one that is
not, and fewer examples under that one. With ``--threads``, threads work inside a fence
that has no room for their stacks.
"""

import json
import multiprocessing
import sys
import tempfile
from collections import OrderedDict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import vgg

from flwr_smartsplit import Route, Task
from flwr_smartsplit.device.local_training import Conditions, train_locally
from flwr_smartsplit.edge.protocol import HoldState, ReplyT, Request
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.memory.process import data_fence, process_bytes
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.types import ClientPlan, Status, StepReport

CUT = 5
BATCH_SIZE = 8
BUDGET_BYTES = 12 * 2**20  # The metered peak is 11 MiB.


def vgg16() -> nn.Sequential:
    """Build a VGG-16 of 250 MiB, nearly all of them behind the cut."""
    parts = OrderedDict(
        features=vgg.make_layers(vgg.cfgs["D"]),
        pool=nn.AdaptiveAvgPool2d(7),
        flatten=nn.Flatten(),
        head=nn.Linear(512 * 7 * 7, 2000),
    )
    return nn.Sequential(parts)


TASK = Task(
    model_fn=vgg16,
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


def measure(*, hold_whole_model: bool) -> dict[str, Any]:
    """Train one step on the device and say how its resident set grew."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        edge = context.Process(target=run_edge, args=(theirs, folder), daemon=True)
        edge.start()
        digest, state, model_bytes = ours.recv()
        plan = ClientPlan(
            client_key="0",
            round_number=1,
            route=Route.split(CUT),
            seed=0,
            state_digest=digest,
            budget_bytes=BUDGET_BYTES,
            edge_addresses={"edge": "pipe"},
        )
        before_bytes = process_bytes("VmRSS") or 0
        kept = TASK.model_fn() if hold_whole_model else None
        held_bytes = (process_bytes("VmRSS") or 0) - before_bytes
        outcome = train_locally(
            plan,
            state,
            [(torch.randn(BATCH_SIZE, 3, 32, 32), torch.arange(BATCH_SIZE))],
            Conditions(
                task=TASK,
                connect=lambda place, address: PipeTransport(ours),
                owns_process=True,
            ),
        )
        ours.send(None)
        edge.join()
    assert outcome.report.status is Status.OK, outcome.report.message
    del kept
    growth_bytes = outcome.report.resident_growth_bytes
    assert growth_bytes is not None
    return {
        "resident_growth_bytes": held_bytes + growth_bytes,
        "whole_model_bytes": model_bytes,
        "device_state_bytes": sum(array.nbytes for array in state.values()),
        "metered_peak_bytes": outcome.report.peak_bytes,
        "device_names": sorted(outcome.state),
    }


WIDTH = 64
NUM_EXAMPLES = 2**16  # 16 MiB in each activation
LAYERED = Task(
    model_fn=lambda: nn.Sequential(
        nn.Linear(WIDTH, WIDTH), *(nn.Tanh() for _ in range(6))
    ),
    loss_fn=nn.functional.cross_entropy,
    optimizer_fn=partial(torch.optim.SGD, lr=0.01),
    example_inputs=torch.zeros(1, WIDTH),
    example_targets=torch.zeros(1, dtype=torch.int64),
)


def unreachable(place: str) -> Any:
    """Refuse to connect: the whole model is here."""
    raise AssertionError(place)


def trained_alone(
    budget_bytes: int | None,
    *,
    num_examples: int = NUM_EXAMPLES,
    cap_mode: str = "off",
    owns_process: bool = True,
) -> StepReport:
    """Train two steps of the whole model, and return what was measured."""
    plan = ClientPlan(
        client_key="0",
        round_number=1,
        route=Route.whole(),
        seed=0,
        budget_bytes=budget_bytes,
        edge_addresses={},
    )
    batches = (
        (torch.randn(num_examples, WIDTH), torch.zeros(num_examples, dtype=torch.int64))
        for _ in range(2)
    )
    conditions = Conditions(
        task=LAYERED,
        connect=lambda place, address: unreachable(place),
        cap_mode=cap_mode,
        owns_process=owns_process,
    )
    state = state_of(LAYERED.model_fn())
    return train_locally(plan, state, batches, conditions).report


def fence() -> dict[str, Any]:
    """Measure a client that is alone, then fence it."""
    torch.set_num_threads(1)
    measured = trained_alone(None, cap_mode="strict")
    peak_bytes = measured.peak_bytes
    runs = {
        "enough": trained_alone(peak_bytes),
        "too_little": trained_alone(peak_bytes // 2),
        "too_little_unfenced": trained_alone(peak_bytes // 2, owns_process=False),
        "fewer_examples": trained_alone(
            peak_bytes // 2, num_examples=NUM_EXAMPLES // 4
        ),
    }
    return {
        "metered_peak_bytes": peak_bytes,
        "resident_growth_bytes": measured.resident_growth_bytes,
        "growths": {name: run.resident_growth_bytes for name, run in runs.items()},
        "statuses": {name: run.status for name, run in runs.items()},
        "message": runs["too_little"].message,
    }


def threads() -> dict[str, Any]:
    """Let torch start eight threads inside a fence of 4 MiB; a stack takes 8."""
    torch.set_num_threads(1)
    values = torch.ones(2**22)
    torch.set_num_threads(8)
    with data_fence(4 * 2**20):
        values.mul_(2)
    return {"sum": float(values.sum())}


if __name__ == "__main__":
    if "--fence" in sys.argv:
        result = fence()
    elif "--threads" in sys.argv:
        result = threads()
    else:
        result = measure(hold_whole_model="--hold-whole-model" in sys.argv)
    sys.stdout.write(json.dumps(result) + "\n")
