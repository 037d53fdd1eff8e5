"""An edge that sums a name alone divides it: the bits are those of a merge here."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flwr_smartsplit import Task
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.edge import BytesTransport, answered
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.errors import EdgeError
from flwr_smartsplit.server import aggregation, edge_pool
from flwr_smartsplit.server.aggregation import settle_round
from flwr_smartsplit.types import (
    WHOLE,
    ClientReply,
    Expectation,
    Receipt,
    StepReport,
    TailExpectation,
)
from tests.tasks import State

SIZE = 5
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.complex64),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
)
NAMES = tuple(f"{index}.value" for index in range(len(DTYPES)))
PLACES = ("a", "b")


class Holder(nn.Module):
    """Adds nothing, and holds a buffer of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(SIZE, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x + 0 * self.value.sum().real.to(x.dtype)


TASK = Task(
    model_fn=lambda: nn.Sequential(*map(Holder, DTYPES), nn.Linear(1, 1)),
    loss_fn=nn.functional.mse_loss,
    optimizer_fn=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    example_inputs=torch.zeros(1, 1),
    example_targets=torch.zeros(1, 1),
)
CURRENT: dict[str, Any] = {
    name: torch.zeros(SIZE, dtype=dtype).numpy()
    for name, dtype in zip(NAMES, DTYPES, strict=True)
}


@dataclass(frozen=True)
class Client:
    """How one client's names are divided: device, edge a, edge b; and its weight."""

    cuts: tuple[int, int]
    weight: int
    seed: int

    def state(self) -> State:
        """Draw values of every magnitude."""
        rng = np.random.default_rng(self.seed)
        bits = {n: rng.bytes(array.nbytes) for n, array in CURRENT.items()}
        state = {n: np.frombuffer(bits[n], a.dtype).copy() for n, a in CURRENT.items()}
        state[NAMES[-1]] = rng.random(SIZE) < 0.5
        for name, array in state.items():
            if array.dtype.kind in "fc":
                large = rng.normal(size=SIZE) * 10.0 ** rng.integers(-4, 4, SIZE)
                state[name] = large.astype(array.dtype)
        return state

    def names(self) -> dict[str, tuple[str, ...]]:
        """Divide the names."""
        first, second = sorted(self.cuts)
        return {
            "device": NAMES[:first],
            "a": NAMES[first:second],
            "b": NAMES[second:],
        }


CLIENTS = st.lists(
    st.builds(
        Client,
        cuts=st.tuples(*[st.integers(0, len(NAMES))] * 2),
        weight=st.integers(1, 2**20),
        seed=st.integers(0, 2**32),
    ),
    min_size=1,
    max_size=4,
)


@dataclass(frozen=True)
class Pool:
    """Two edges, each behind its messages' bytes."""

    services: Mapping[str, EdgeService]
    asks_alone: bool = True
    bend: Callable[[wire.Committed], wire.Committed] = lambda committed: committed

    def commit(
        self,
        place: str,
        round_number: int,
        entries: tuple[wire.Entry, ...],
        alone: State,
    ) -> wire.Committed:
        """Merge; as before, if nothing is asked to be divided."""
        alone = alone if self.asks_alone else {}
        handle = self.services[place].handle
        transport = BytesTransport(lambda pieces: answered(handle, *pieces))
        request = wire.Commit(round_number, entries, tuple(alone))
        committed = self.bend(transport.send(request))
        means = edge_pool.checked_means(place, committed, alone)
        return wire.Committed(committed.sums, means)


def sealed(service: EdgeService, session: str, tail: State, weight: int) -> Receipt:
    """Write a client's tail at an edge."""
    place = session.rpartition("/")[2]
    return Receipt(
        place=place,
        incarnation="1",
        session=session,
        names=tuple(tail),
        digest=service.store.put_tail(session, 1, tail),
        num_examples=weight,
        num_steps=1,
    )


def settled(clients: list[Client], pool: Pool) -> State:
    """Settle a round of these clients."""
    replies, expected = [], {}
    for index, client in enumerate(clients):
        key, state, names = f"c{index}", client.state(), client.names()
        tails = {p: {n: state[n] for n in names[p]} for p in PLACES if names[p]}
        receipts = [
            sealed(pool.services[place], f"1/{key}/{place}", tail, client.weight)
            for place, tail in tails.items()
        ]
        report = StepReport(num_examples=client.weight, num_steps=1, metrics={})
        replies.append(
            ClientReply(
                client_key=key,
                round_number=1,
                state={n: state[n] for n in names["device"]},
                receipts=tuple(receipts),
                report=report,
            )
        )
        expected[key] = Expectation(
            client_key=key,
            device_names=frozenset(names["device"]),
            tails={
                r.place: TailExpectation(session=r.session, names=frozenset(r.names))
                for r in receipts
            },
        )
    result = settle_round(
        replies, round_number=1, expected=expected, current=CURRENT, edges=pool
    )
    assert result.failures == ()
    assert result.state is not None
    return dict(result.state)


def bits(state: State) -> dict[str, tuple[str, bytes]]:
    """Show a state in every bit."""
    return {name: (str(a.dtype), a.tobytes()) for name, a in state.items()}


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start two edges."""
    yield {
        place: EdgeService(
            TASK, spill_dir=tmp_path_factory.mktemp(place), incarnation="1"
        )
        for place in PLACES
    }


@settings(max_examples=20)
@given(clients=CLIENTS)
def test_means_of_edges_have_the_bits_of_merged_sums(
    services: Any, clients: list[Client]
) -> None:
    """Whoever has which names: floats, complex and whole numbers, and booleans."""
    asked = settled(clients, Pool(services))
    assert bits(asked) == bits(settled(clients, Pool(services, asks_alone=False)))
    assert all(array.flags.writeable for array in asked.values())


MIXED = [Client((2, 5), 3, 1), Client((4, 6), 5, 2)]


def test_only_names_that_one_edge_alone_has_are_divided_there(services: Any) -> None:
    """Two clients of one edge are one sum; a device or another edge makes it two."""
    came: list[wire.Committed] = []

    def noting(committed: wire.Committed) -> wire.Committed:
        came.append(committed)
        return committed

    settled(MIXED, Pool(services, bend=noting))
    assert [sorted(each.sums) for each in came] == [
        ["2.value", "3.value", "5.value"],
        ["5.value"],
    ]
    assert [sorted(each.means) for each in came] == [
        ["4.value"],
        ["6.value", "7.value"],
    ]


def test_the_comparison_sees_a_name_that_was_divided_too_early(
    services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: the device has added to what an edge is told it has alone."""
    truth = settled(MIXED, Pool(services))
    owners = aggregation._owners

    def careless(*replies: Any) -> Any:
        return {**owners(*replies), "2.value": ("a", WHOLE)}

    monkeypatch.setattr(aggregation, "_owners", careless)
    found = settled(MIXED, Pool(services, bend=lambda committed: committed))
    wrong = [n for n in truth if bits(truth)[n] != bits(found)[n]]
    assert wrong == ["2.value"]


def bent(change: Callable[[Any], Any]) -> Callable[[wire.Committed], wire.Committed]:
    """Have an edge answer with other means."""
    return lambda came: wire.Committed(came.sums, change(dict(came.means)))


@pytest.mark.parametrize(
    "change",
    [
        lambda means: {},
        lambda means: {**means, "0.value": np.zeros(SIZE, np.float32)},
        lambda means: {n: a.astype(np.float64) for n, a in means.items()},
        lambda means: {n: a[:-1] for n, a in means.items()},
    ],
    ids=["none", "more", "another dtype", "another shape"],
)
def test_other_means_than_asked_for_are_refused(services: Any, change: Any) -> None:
    """A name would silently keep its old value, or become another thing."""
    pool = Pool(services, bend=bent(change))
    with pytest.raises(AssertionError, match="merged other names, shapes or dtypes"):
        settled(MIXED, pool)


def test_a_sum_of_what_was_to_be_divided_is_refused(services: Any) -> None:
    """Nobody knows which of both counts."""
    sums = wire.Committed(services["a"].handle(wire.Commit(1, ())).sums, {})
    assert sums.sums == {}
    like = {"0.value": CURRENT["0.value"]}
    both = wire.Committed({"0.value": None}, like)  # type: ignore[dict-item]
    with pytest.raises(EdgeError, match="edge 'a' merged other names"):
        edge_pool.checked_means("a", both, like)
