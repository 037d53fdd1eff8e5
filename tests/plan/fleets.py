"""Candidates made of numbers, for selections that see nothing else."""

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from flwr_smartsplit.plan.search_space import SearchSpace
from flwr_smartsplit.plan.selection.candidates import Candidate
from flwr_smartsplit.plan.selection.history import Observation
from flwr_smartsplit.plan.selection.selection import SelectionRequest
from flwr_smartsplit.types import (
    DeviceProfile,
    DeviceTraits,
    Link,
    Route,
    RouteOption,
    Work,
)
from tests.plan.profiles import chain_of

SPACE = SearchSpace(
    chain_of([40]),
    tuple(
        RouteOption(
            route=route,
            peak_bytes=40,
            work=Work(device_flops=flops, edge_flops=10 - flops),
            edge_memory_bytes=memory,
            edge_disk_bytes=memory,
        )
        for route, flops, memory in (
            (Route.whole(), 10, 0),
            (Route.split(2), 6, 20),
            (Route.split(1), 3, 30),
        )
    ),
)
"""The whole model and two cuts, the deepest first, as a chain of three would have."""


def candidate(
    key: str,
    *,
    seconds: Sequence[float] = (np.nan,),
    num_examples: int = 10,
    **traits: Any,
) -> Candidate:
    """Make a client that can take the first options, each in so many seconds."""
    device = DeviceProfile(
        client_key=key,
        budget_bytes=traits.pop("budget_bytes", None),
        num_examples=num_examples,
        batch_size=4,
        traits=DeviceTraits(**traits),
    )
    known = np.array(seconds, np.float64)
    best = 0 if np.isnan(known[0]) else int(known.argmin())
    return Candidate(
        device, SPACE, np.arange(len(known)), known, best, float(known[best])
    )


def request(candidates: Sequence[Candidate], **changes: Any) -> SelectionRequest:
    """Ask for one of some candidates, unless told otherwise."""
    facts: dict[str, Any] = {"num_clients": 1, "round_number": 1, "rng": Random(0)}
    return SelectionRequest(candidates=candidates, **{**facts, **changes})


def seen(key: str, **facts: Any) -> Observation:
    """Make an observation of round 1."""
    usual: dict[str, Any] = {"round_number": 1, "num_examples": 10, "loss_rms": 1.0}
    return Observation(client_key=key, **{**usual, **facts})


SLOW = Link(up_bytes_per_second=1.0, down_bytes_per_second=1.0)
FAST = Link(up_bytes_per_second=1e9, down_bytes_per_second=1e9)
