"""Settling: whatever happens to one client, the new state is FedAvg over the others.

Every row of the table lets four clients with four different routes train one round;
something happens to the reply (``front``) and to the tail of client ``c1``. The truth
stands in ``one_round``, in plain numpy, from the clients' own unsplit training.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from flwr_smartsplit import Route
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.server import aggregation
from flwr_smartsplit.server.aggregation import Settled
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.types import EDGE, ClientReply, Receipt
from tests.faults import (
    Hook,
    MortalEdge,
    both,
    deliver_all,
    forged_seal,
    lost_reply,
    poisoned_steps,
    tail_files,
)
from tests.server.one_round import NUM_CLIENTS, ROUND, fedavg, settle, start
from tests.tasks import TASK, State, differences, tiny_chain

ROUTES = (Route.split(2), Route.split(4), Route.whole(), Route.split(7))
FAULTY = 1
KEY = f"c{FAULTY}"
SESSION = f"{ROUND}.0/{KEY}/{EDGE}"
OTHERS = {f"c{client}" for client in range(NUM_CLIENTS)} - {KEY}


# --- what can happen to a reply -------------------------------------------------------

Front = Callable[[ClientReply], list[ClientReply]]


def with_values(change: Callable[[np.ndarray], np.ndarray]) -> Front:
    """Change the first array of a reply."""

    def alter(reply: ClientReply) -> list[ClientReply]:
        state = dict(reply.state)
        for name in list(state)[:1]:
            state[name] = change(state[name].copy())
        return [replace(reply, state=state)]

    return alter


def not_a_number(array: np.ndarray) -> np.ndarray:
    """Spoil one value."""
    array.flat[0] = np.nan
    return array


def weightless(reply: ClientReply) -> list[ClientReply]:
    """Claim to have trained on nothing."""
    return [replace(reply, report=replace(reply.report, num_examples=0))]


def twice(reply: ClientReply) -> list[ClientReply]:
    """Answer a second time, with other values."""
    return [reply, *with_values(lambda array: array + 1)(reply)]


FRONTS: dict[str, Front] = {
    "accepted": lambda reply: [reply],
    "wrong shape": with_values(lambda array: array[..., None]),
    "not a number": with_values(not_a_number),
    "weightless": weightless,
    "late": lambda reply: [replace(reply, round_number=ROUND - 1)],
    "lost": lambda reply: [],
    "duplicate": twice,
}
REFUSED = {"wrong shape", "not a number", "weightless"}


# --- what can happen to a tail --------------------------------------------------------


def nothing(edge: MortalEdge) -> None:
    """Leave the edge alone."""


def lose_spill(edge: MortalEdge) -> None:
    """Restart the edge without the client's sealed tail."""
    edge.kill()
    for path in tail_files(edge.folder, SESSION):
        path.unlink()
    edge.restart()


def no_receipt(reply: ClientReply) -> ClientReply:
    """Send a front as if there were no tail."""
    return replace(reply, receipts=())


@dataclass(frozen=True, kw_only=True)
class Tail:
    """One column of the table.

    Parameters
    ----------
    counts : bool
        Whether the client may be merged, if its front is good.
    hook : Callable[[MortalEdge], Hook]
        What stands between everybody and the edge.
    before_settling : Callable[[MortalEdge], None]
        What happens when everybody has trained.
    reply : Callable[[ClientReply], ClientReply]
        What the client makes of it.
    kind : str
        How a good front is turned down.
    """

    counts: bool
    hook: Callable[[MortalEdge], Hook] = lambda edge: deliver_all
    before_settling: Callable[[MortalEdge], None] = nothing
    reply: Callable[[ClientReply], ClientReply] = field(default=lambda reply: reply)
    kind: str = ""


FORGED = Receipt(
    place=EDGE,
    incarnation="life 1",
    session=SESSION,
    names=tiny_chain().state_names(ROUTES[FAULTY].cuts[0], len(tiny_chain())),
    digest="0" * 64,
    num_examples=10,
    num_steps=0,
)

TAILS = {
    "sealed": Tail(counts=True),
    "not a number": Tail(
        counts=False, hook=lambda edge: poisoned_steps(SESSION), kind="reported"
    ),
    "not a number, receipt forged": Tail(
        counts=False,
        hook=lambda edge: both(
            poisoned_steps(SESSION), forged_seal(SESSION, FORGED, delivers=True)
        ),
        kind="edge_failed",
    ),
    "unsealed": Tail(
        counts=False,
        hook=lambda edge: forged_seal(SESSION, FORGED, delivers=False),
        reply=no_receipt,
        kind="refused",
    ),
    "unsealed, receipt forged": Tail(
        counts=False,
        hook=lambda edge: forged_seal(SESSION, FORGED, delivers=False),
        kind="edge_failed",
    ),
    "edge killed after seal": Tail(counts=True, before_settling=MortalEdge.restart),
    "edge killed after seal, spill lost": Tail(
        counts=False, before_settling=lose_spill, kind="edge_failed"
    ),
    "edge killed after commit": Tail(
        counts=True, hook=lambda edge: lost_reply(wire.Commit, edge.restart)
    ),
}


def expected_failures(front: str, tail: Tail) -> list[str]:
    """List the kinds of failure that a row must end in, sorted."""
    num_replies = 2 if front == "duplicate" else 1
    if front in ("lost", "late"):
        return [] if front == "lost" else ["late"]
    if tail.kind == "reported":  # The client itself says that its edge failed.
        return ["edge_failed"] * num_replies
    if front in REFUSED:
        return ["refused"]
    if tail.kind == "refused":
        return ["refused"] * num_replies
    dropped = [] if tail.counts else [tail.kind]
    return sorted([*dropped, *["duplicate"] * (num_replies - 1)])


# --- the table ------------------------------------------------------------------------


def run_row(folder: Path, front: str, tail: Tail) -> tuple[Settled, MortalEdge]:
    """Train and settle one round in which something happens to ``c1``."""
    edge = MortalEdge(folder)
    edge.hook = tail.hook(edge)
    pool, replies = start([edge], ROUTES)
    tail.before_settling(edge)
    replies[FAULTY : FAULTY + 1] = FRONTS[front](tail.reply(replies[FAULTY]))
    settled = settle(replies, pool, ROUTES)
    assert settled.state is not None
    pool.release(ROUND, state_digest(settled.state))
    return settled, edge


@pytest.mark.every(5)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("front", FRONTS)
def test_the_new_state_is_fedavg_over_exactly_the_accepted(
    front: str, tail: str, whole: Mapping[str, ClientReply], tmp_path: Path
) -> None:
    """Who is merged is merged whole and in every bit; who is not leaves no trace."""
    settled, edge = run_row(tmp_path, front, TAILS[tail])
    is_good = front in ("accepted", "duplicate") and TAILS[tail].counts
    accepted = sorted(OTHERS | {KEY}) if is_good else sorted(OTHERS)
    assert list(settled.accepted) == accepted
    assert settled.state is not None
    truth = fedavg({key: whole[key] for key in accepted})
    assert differences(settled.state, truth) == []
    kinds = sorted(failure.kind for failure in settled.failures)
    assert kinds == expected_failures(front, TAILS[tail])
    assert {failure.client_key for failure in settled.failures} <= {KEY}
    assert tail_files(edge.folder) == []


def test_the_table_has_every_row_of_the_plan() -> None:
    """Five fronts (three ways to be refused) times five tails (flavours apart)."""
    assert len(FRONTS) - len(REFUSED) + 1 == 5
    stems = {name.split(",")[0] for name in TAILS}
    assert stems == {
        "sealed",
        "not a number",
        "unsealed",
        "edge killed after seal",
        "edge killed after commit",
    }


# --- planted errors -------------------------------------------------------------------


@dataclass
class GreedyPool:
    """Commit, wrongly, every tail that is sealed."""

    inner: EdgePool
    sealed: tuple[wire.Entry, ...]

    def commit(
        self,
        place: str,
        round_number: int,
        entries: tuple[wire.Entry, ...],
        alone: State,
    ) -> wire.Committed:
        """Ignore who was asked for."""
        del entries
        return self.inner.commit(place, round_number, self.sealed, alone)


def test_the_truth_sees_a_dropped_client_whose_tail_was_merged(
    whole: Mapping[str, ClientReply], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A settlement that merges the tail of a lost front differs in that tail only.

    Such a sum has too much weight, and is refused.
    """
    pool, replies = start([MortalEdge(tmp_path)], ROUTES)
    sealed = tuple(
        wire.Entry(receipt.session, receipt.digest, reply.report.num_examples)
        for reply in replies
        for receipt in reply.receipts
    )
    del replies[FAULTY]
    refused = settle(replies, GreedyPool(pool, sealed), ROUTES)
    assert {f.kind for f in refused.failures} == {"edge_failed"}
    assert all("an edge's sum of" in f.cause for f in refused.failures)
    monkeypatch.setattr(aggregation, "check_sums", lambda *_, **__: None)
    settled = settle(replies, GreedyPool(pool, sealed), ROUTES)
    assert settled.state is not None
    truth = fedavg({key: whole[key] for key in OTHERS})
    chain = tiny_chain()
    tail_names = chain.state_names(ROUTES[FAULTY].cuts[0], len(chain))
    trained = [name for name in tail_names if "num_batches" not in name]
    assert differences(settled.state, truth) == sorted(trained)


def test_the_truth_sees_one_last_bit(whole: Mapping[str, ClientReply]) -> None:
    """A single value that is off by one last bit is named."""
    truth = fedavg(whole)
    bent = {name: array.copy() for name, array in truth.items()}
    bent["5.bias"][3] = np.nextafter(bent["5.bias"][3], np.float32(1))
    assert differences(truth, bent) == ["5.bias"]


def test_the_truth_sees_a_wrong_weight(whole: Mapping[str, ClientReply]) -> None:
    """Giving a client the weight of another changes every trained array."""
    report = replace(whole[KEY].report, num_examples=100)
    heavier = {**whole, KEY: replace(whole[KEY], report=report)}
    assert len(differences(fedavg(whole), fedavg(heavier))) > 8


# --- more than one edge ---------------------------------------------------------------


def test_an_edge_that_stays_dead_costs_its_own_clients_only(
    whole: Mapping[str, ClientReply], tmp_path: Path
) -> None:
    """Clients of the dead edge are dropped everywhere; those of the other one count."""
    first = MortalEdge(tmp_path / "a", name="a")
    second = MortalEdge(tmp_path / "b", name="b")
    routes = (
        Route.split(2, edge="a"),
        Route.split(4, edge="b"),
        Route.split(1, edge="b"),
        Route.split(7, edge="a"),
    )
    pool, replies = start([first, second], routes)
    second.kill()
    settled = settle(replies, pool, routes)
    assert list(settled.accepted) == ["c0", "c3"]
    assert [(f.client_key, f.kind) for f in settled.failures] == [
        ("c1", "edge_failed"),
        ("c2", "edge_failed"),
    ]
    truth = fedavg({key: whole[key] for key in ("c0", "c3")})
    assert settled.state is not None
    assert differences(settled.state, truth) == []


def test_nobody_accepted_gives_no_state(tmp_path: Path) -> None:
    """Without a single good reply there is nothing to merge, and no error."""
    pool = EdgePool([MortalEdge(tmp_path)], TASK)
    settled = settle([], pool, ROUTES)
    assert settled.state is None
    assert settled.accepted == {}
    assert settled.failures == ()


def test_the_order_in_which_replies_come_changes_nothing(
    whole: Mapping[str, ClientReply], tmp_path: Path
) -> None:
    """Any order of arrival gives the same bits."""
    pool, replies = start([MortalEdge(tmp_path)], ROUTES)
    truth = fedavg(whole)
    for order in itertools.permutations(replies):
        settled = settle(order, pool, ROUTES)
        assert list(settled.accepted) == ["c0", "c1", "c2", "c3"]
        assert settled.state is not None
        assert differences(settled.state, truth) == []
