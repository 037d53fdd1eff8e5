"""One round on four clients, and the truth about it in plain numpy."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from flwr_smartsplit import Route
from flwr_smartsplit.device.local_training import Conditions, train_locally
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.server.aggregation import Settled, settle_round
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.types import (
    DEVICE,
    ClientPlan,
    ClientReply,
    DeviceProfile,
    Expectation,
    Failure,
    TailExpectation,
)
from tests.tasks import (
    BATCH_SIZE,
    TASK,
    State,
    client_plan,
    device_part,
    examples,
    initial_state,
    loader,
    tiny_chain,
)

ROUND = 2
NUM_CLIENTS = 4


def fedavg(replies: Mapping[str, ClientReply]) -> State:
    """Average whole states as FedAvg's paper says, in the plainest way."""
    total = sum(reply.report.num_examples for reply in replies.values())
    merged: State = {}
    for name, first in initial_state().items():
        weighted = np.zeros(first.shape, np.float64)
        for key in sorted(replies):
            reply = replies[key]
            weighted += reply.state[name].astype(np.float64) * reply.report.num_examples
        mean = weighted / total
        if first.dtype.kind == "i":
            mean = np.trunc(mean)
        merged[name] = mean.astype(first.dtype)
    return merged


def signed(
    plan: ClientPlan, pool: EdgePool, *, num_examples: int, is_train: bool = True
) -> ClientPlan:
    """Sign what a plan's client opens at edges, as the strategy does."""
    device = DeviceProfile(
        client_key=plan.client_key,
        budget_bytes=None,
        num_examples=num_examples,
        batch_size=BATCH_SIZE,
    )
    profile = profile_of(TASK, batch_size=BATCH_SIZE)
    return pool.signed(plan, device, profile, is_train=is_train)


def train(
    routes: Iterable[Route],
    state: State,
    *,
    edges: Mapping[str, Edge] | None = None,
    addresses: Mapping[str, str] | None = None,
    pool: EdgePool | None = None,
) -> list[ClientReply]:
    """Let one client per route train, and collect their replies.

    The pool signs what they open, if it has started the edges.
    """
    known = dict(edges or {})
    conditions = Conditions(
        task=TASK, connect=lambda place, address: known[place].connect(address)
    )
    replies = []
    for client, route in enumerate(routes):
        plan = client_plan(
            client, route, state, round_number=ROUND, addresses=addresses
        )
        if pool is not None:
            plan = signed(plan, pool, num_examples=len(examples(client)))
        outcome = train_locally(
            plan, device_part(state, route), loader(client), conditions
        )
        replies.append(
            ClientReply(
                client_key=plan.client_key,
                round_number=ROUND,
                state=outcome.state,
                receipts=outcome.receipts,
                report=outcome.report,
            )
        )
    return replies


def expectations(routes: Iterable[Route]) -> dict[str, Expectation]:
    """Say what each client's reply must contain."""
    chain = tiny_chain()
    expected = {}
    for client, route in enumerate(routes):
        key = f"c{client}"
        names = {
            leg.place: frozenset(chain.state_names(leg.start, leg.stop))
            for leg in route.legs(len(chain))
        }
        expected[key] = Expectation(
            client_key=key,
            device_names=names.pop(DEVICE),
            tails={
                place: TailExpectation(session=f"{ROUND}.0/{key}/{place}", names=tail)
                for place, tail in names.items()
            },
        )
    return expected


def prepared(
    pool: EdgePool, digest: str, state: State, **rest: Any
) -> tuple[dict[str, str], list[Failure]]:
    """Begin a phase, and have every edge hold its state."""
    _, failures = pool.prepare(digest)
    addresses, more = pool.hold(pool.names, digest, state, **rest)
    return addresses, [*failures, *more]


def start(
    edges: Sequence[Edge], routes: Iterable[Route]
) -> tuple[EdgePool, list[ClientReply]]:
    """Bring edges up, give them the state, and let everybody train."""
    state = initial_state()
    pool = EdgePool(edges, TASK)
    addresses, _ = prepared(pool, state_digest(state), state)
    by_name = {edge.name: edge for edge in edges}
    return pool, train(routes, state, edges=by_name, addresses=addresses, pool=pool)


class Committer(Protocol):
    """The one thing that settling asks of an edge pool."""

    def commit(
        self,
        place: str,
        round_number: int,
        entries: tuple[wire.Entry, ...],
        alone: State,
    ) -> wire.Committed:
        """Merge sealed tails."""


def settle(
    replies: Iterable[ClientReply],
    pool: Committer,
    routes: Sequence[Route],
) -> Settled:
    """Settle the round."""
    return settle_round(
        replies,
        round_number=ROUND,
        expected=expectations(routes),
        current=initial_state(),
        edges=pool,
    )
