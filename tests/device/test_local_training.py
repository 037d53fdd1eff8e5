"""Training: a client's part ends in a report, whatever happens, and in right bits."""

import itertools
import mmap
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flwr_smartsplit import Route, Task
from flwr_smartsplit.device.local_training import (
    Conditions,
    Outcome,
    evaluate_locally,
    train_locally,
)
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.state_store import StateStore
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import (
    EdgeUnreachable,
    InvalidTask,
    bytes_text,
)
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.types import EDGE, ClientPlan, Status, StepReport
from tests.faults import Deliver, Hook, MortalEdge, lost_reply, tail_files
from tests.tasks import (
    BATCH_SIZE,
    NUM_CLASSES,
    SHAPE,
    TASK,
    client_plan,
    device_part,
    differences,
    initial_state,
    loader,
    tiny_chain,
)

NUM_EXAMPLES = 9  # of client 0: batches of 4, 4 and 1
CUTS = range(1, len(tiny_chain()))


@dataclass
class Client:
    """Client 0 and its edge."""

    folder: Path
    edge: MortalEdge = field(init=False)
    address: str = field(init=False)

    def __post_init__(self) -> None:
        """Start the edge and give it the state."""
        self.edge = MortalEdge(self.folder)
        self.address = self.edge.start(TASK)
        state = initial_state()
        hold = wire.HoldState(state_digest(state), state)
        self.edge.connect(self.address).send(hold)

    def plan(self, route: Route, *, budget_bytes: int | None = None) -> ClientPlan:
        """Plan a round."""
        return client_plan(
            0,
            route,
            initial_state(),
            budget_bytes=budget_bytes,
            addresses={EDGE: self.address},
        )

    def conditions(self, **changes: Any) -> Conditions:
        """Bring what a client brings."""
        facts: dict[str, Any] = {
            "task": TASK,
            "connect": lambda place, address: self.edge.connect(address),
        }
        return Conditions(**{**facts, **changes})

    def train(
        self,
        route: Route,
        *,
        budget_bytes: int | None = None,
        batches: Any = None,
        **changes: Any,
    ) -> Outcome:
        """Train one round."""
        return train_locally(
            self.plan(route, budget_bytes=budget_bytes),
            device_part(initial_state(), route),
            loader(0) if batches is None else batches,
            self.conditions(**changes),
        )

    def evaluate(
        self, route: Route, *, budget_bytes: int | None = None, **changes: Any
    ) -> StepReport:
        """Evaluate one round."""
        return evaluate_locally(
            self.plan(route, budget_bytes=budget_bytes),
            device_part(initial_state(), route),
            loader(0),
            self.conditions(**changes),
        )

    def asked(self, kind: type) -> list[Any]:
        """List the edge's requests of one kind."""
        return [request for request in self.edge.requests if isinstance(request, kind)]


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """Make a client with an edge of its own."""
    return Client(tmp_path)


def peak_of(route: Route, task: Task = TASK) -> int:
    """Predict a device's peak."""
    profile = profile_of(task, batch_size=BATCH_SIZE)
    return predicted_peak_bytes(profile, route)


# --- the same bits, the same numbers --------------------------------------------------


@pytest.mark.parametrize("local_epochs", [1, 2])
def test_every_cut_ends_in_the_bits_of_the_whole_model(
    client: Client, local_epochs: int
) -> None:
    """Front and sealed tail together are the whole state, and reports agree in loss."""
    whole = client.train(Route.whole(), local_epochs=local_epochs)
    for cut in CUTS:
        split = client.train(Route.split(cut), local_epochs=local_epochs)
        (receipt,) = split.receipts
        tail = StateStore(client.folder).read_tail(receipt.session)
        assert not split.state.keys() & tail.keys()
        assert differences({**split.state, **tail}, whole.state) == [], cut
        assert split.report.loss == whole.report.loss
        assert split.report.num_examples == whole.report.num_examples == NUM_EXAMPLES
        assert split.report.num_steps == receipt.num_steps == 3 * local_epochs


def test_training_changes_what_it_should(client: Client) -> None:
    """The comparison is not one of two states that nobody trained."""
    whole = client.train(Route.whole())
    assert len(differences(whole.state, initial_state())) == len(initial_state())


@pytest.mark.parametrize("cut", [None, *CUTS])
@pytest.mark.parametrize("optimizer", [TASK.optimizer_fn, torch.optim.Adam])
def test_the_peak_is_the_predicted_one(
    client: Client, cut: int | None, optimizer: Any
) -> None:
    """A device measures to the byte what the profile says, and fits that budget."""
    route = Route.whole() if cut is None else Route.split(cut)
    task = replace(TASK, optimizer_fn=optimizer)
    peak = peak_of(route, task)
    outcome = client.train(route, budget_bytes=peak, task=task)
    assert outcome.report.status is Status.OK
    assert outcome.report.peak_bytes == peak


def test_a_later_round_is_metered_less_and_reports_the_same_peak(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a task that is known by its digest; another task, or cut, begins anew."""
    entered: list[Any] = []
    enter = MemoryMeter.__enter__

    def note(self: MemoryMeter) -> Any:
        entered.append(self)
        return enter(self)

    monkeypatch.setattr(MemoryMeter, "__enter__", note)

    def metered(digest: str, route: Route) -> tuple[int, int]:
        entered.clear()
        plan = replace(client.plan(route), task_digest=digest)
        state = device_part(initial_state(), route)
        conditions = client.conditions(local_epochs=2)
        outcome = train_locally(plan, state, loader(0), conditions)
        return len(entered), outcome.report.peak_bytes

    known, other = f"one of {client.folder}", f"other of {client.folder}"
    first = metered(known, Route.split(3))
    assert first[1] == peak_of(Route.split(3))
    assert metered(known, Route.split(3)) == (first[0] - 4, first[1])  # Of two kinds
    assert metered(other, Route.split(3)) == first
    assert metered(known, Route.split(2))[0] == first[0]
    assert metered("", Route.split(3)) == metered("", Route.split(3)) == first


def test_traffic_is_boundaries_and_targets(client: Client) -> None:
    """Per example: 4 x 6 x 6 floats there and back, and one int64 there."""
    report = client.train(Route.split(4)).report
    boundary = 4 * 6 * 6 * 4
    assert report.sent_bytes == NUM_EXAMPLES * (boundary + 8)
    assert report.received_bytes == NUM_EXAMPLES * boundary
    whole = client.train(Route.whole()).report
    assert (whole.sent_bytes, whole.received_bytes) == (0, 0)


def test_seconds_and_threads_are_those_that_were_given(client: Client) -> None:
    """The clock is passed in; the number of threads is set, reported and restored.

    The clock is read at both ends of the round and of its three steps.
    """
    ticks = itertools.count(100.0, 2.5)
    report = client.train(Route.split(4), clock=lambda: next(ticks)).report
    assert report.seconds == 7 * 2.5
    assert report.step_seconds == 2.5
    assert report.num_threads == 1
    torch.set_num_threads(2)
    try:
        assert client.train(Route.split(4)).report.num_threads == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_process_generator_is_left_as_it_was(client: Client) -> None:
    """Whatever a client draws, the program around it draws as before."""
    before = torch.default_generator.get_state()
    client.train(Route.split(4))
    client.evaluate(Route.split(4))
    assert torch.equal(torch.default_generator.get_state(), before)


def test_the_device_holds_the_names_of_its_own_units_only(client: Client) -> None:
    """What comes back is what was sent there, name by name."""
    for cut in CUTS:
        outcome = client.train(Route.split(cut))
        assert list(outcome.state) == list(
            device_part(initial_state(), Route.split(cut))
        )
        assert set(outcome.receipts[0].names) == set(
            tiny_chain().state_names(cut, len(tiny_chain()))
        )


# --- over the cap ---------------------------------------------------------------------


@pytest.mark.parametrize("route", [Route.whole(), Route.split(4)], ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.9, 0.9999])
def test_over_the_cap_ends_in_a_report_with_the_numbers(
    client: Client, route: Route, fraction: float
) -> None:
    """Wherever in a step it happens: no state, no receipt, nothing at the edge."""
    budget = int(peak_of(route) * fraction)
    outcome = client.train(route, budget_bytes=budget)
    assert outcome.state == {}
    assert outcome.receipts == ()
    report = outcome.report
    assert report.status is Status.OUT_OF_MEMORY
    assert report.peak_bytes > budget
    assert "client c0" in report.message
    assert f"over the cap of {bytes_text(budget)} (" in report.message
    assert tail_files(client.folder) == []
    opened, abandoned = client.asked(wire.OpenSession), client.asked(wire.Abandon)
    assert [r.session for r in opened] == [r.session for r in abandoned]


def test_optimizer_state_of_the_second_step_counts(client: Client) -> None:
    """A budget that one step fits is not enough, if the second needs more."""
    budget = peak_of(Route.whole()) - 1
    assert client.train(Route.whole(), budget_bytes=budget).report.num_steps == 1


KEPT = torch.randn(12, *SHAPE), torch.arange(12) % NUM_CLASSES
SLICES = [(KEPT[0][k : k + 4], KEPT[1][k : k + 4]) for k in (0, 4, 8)]
COPIES = [(inputs.clone(), targets.clone()) for inputs, targets in SLICES]


@pytest.mark.parametrize("batches", [SLICES, COPIES], ids=["slices", "copies"])
@pytest.mark.parametrize("cut", [None, 1, 4])
def test_a_loader_may_keep_its_batches(
    client: Client, cut: int | None, batches: Any
) -> None:
    """A list of them, or views of one data set, cost the device one batch each."""
    route = Route.whole() if cut is None else Route.split(cut)
    peak = peak_of(route)
    report = client.train(route, budget_bytes=peak, batches=batches).report
    assert (report.status, report.peak_bytes) == (Status.OK, peak)


def test_the_edge_does_not_count_for_the_device(client: Client) -> None:
    """A device far smaller than the model trains at an edge in its own process."""
    route = Route.split(1)
    assert peak_of(route) < peak_of(Route.whole()) / 2
    assert client.train(route, budget_bytes=peak_of(route)).report.status is Status.OK


def test_a_client_that_failed_can_train_again(client: Client) -> None:
    """Going over the cap leaves nothing behind that changes the next try."""
    route = Route.split(4)
    first = client.train(route)
    client.train(route, budget_bytes=peak_of(route) // 2)
    again = client.train(route)
    assert differences(again.state, first.state) == []
    assert again.receipts == first.receipts


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("owns_process", [False, True])
@pytest.mark.parametrize("has_budget", [False, True])
def test_a_client_that_owns_its_process_is_fenced_by_its_budget(
    client: Client, owns_process: bool, has_budget: bool
) -> None:
    """What the meter does not see is refused too: 32 MiB are the slack, 34 too much."""
    hidden: list[mmap.mmap] = []  # Pages of the system's: malloc may have some to spare

    def batches() -> Iterator[Any]:
        for batch in loader(0):
            pages = mmap.mmap(-1, peak_of(Route.whole()) + 34 * 2**20, mmap.MAP_PRIVATE)
            pages.write(bytes(len(pages)))
            hidden.append(pages)
            yield batch

    before = resource.getrlimit(resource.RLIMIT_DATA)
    report = client.train(
        Route.whole(),
        budget_bytes=peak_of(Route.whole()) if has_budget else None,
        batches=batches(),
        owns_process=owns_process,
    ).report
    is_refused = owns_process and has_budget
    assert report.status is (Status.OUT_OF_MEMORY if is_refused else Status.OK)
    if is_refused:
        assert report.message.startswith("client c0: the system's allocator refuses")
    assert (report.resident_growth_bytes is not None) == owns_process
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_evaluating_over_the_cap_is_a_report_too(client: Client) -> None:
    """With its status, its numbers, and the session closed."""
    report = client.evaluate(Route.split(4), budget_bytes=100)
    assert report.status is Status.OUT_OF_MEMORY
    assert "over the cap" in report.message


# --- edges that fail ------------------------------------------------------------------


def failing(kind: type, nth: int) -> Hook:
    """Lose the nth request of a kind, counted from 0, and all after it."""
    seen = itertools.count()
    gone: list[bool] = []

    def hook(request: Any, deliver: Deliver) -> Any:
        if gone or (isinstance(request, kind) and next(seen) == nth):
            gone.append(True)
            raise EdgeUnreachable("edge 'edge' does not answer.")
        return deliver(request)

    return hook


def restarting(client: Client, kind: type, nth: int) -> Hook:
    """Restart the edge before the nth request of a kind."""
    seen = itertools.count()

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, kind) and next(seen) == nth:
            client.edge.restart()
        return deliver(request)

    return hook


MOMENTS = [
    (wire.Forward, 0),
    (wire.Forward, 1),
    (wire.Forward, 2),
    (wire.Seal, 0),
]


@pytest.mark.parametrize(("kind", "nth"), [(wire.OpenSession, 0), *MOMENTS])
def test_losing_the_edge_ends_in_a_report(client: Client, kind: type, nth: int) -> None:
    """At any request; the steps done so far are counted."""
    client.edge.hook = failing(kind, nth)
    outcome = client.train(Route.split(4))
    assert outcome.report.status is Status.EDGE_FAILED
    assert outcome.report.message == "edge 'edge' does not answer."
    assert (outcome.state, outcome.receipts) == ({}, ())
    done = {wire.OpenSession: 0, wire.Forward: nth, wire.Seal: 3}[kind]
    assert outcome.report.num_steps == done


@pytest.mark.parametrize(("kind", "nth"), MOMENTS)
def test_a_restarted_edge_does_not_know_the_session(
    client: Client, kind: type, nth: int
) -> None:
    """The client sits the round out; a tail of another life is never sealed."""
    client.edge.hook = restarting(client, kind, nth)
    outcome = client.train(Route.split(4))
    assert outcome.report.status is Status.EDGE_FAILED
    assert "the edge restarted" in outcome.report.message
    assert tail_files(client.folder) == []


@pytest.mark.parametrize("kind", [wire.OpenSession, wire.Forward, wire.Seal])
def test_a_lost_reply_changes_no_bit(client: Client, kind: type) -> None:
    """A request that is delivered twice has the effect of one."""
    expected = client.train(Route.split(4))
    client.edge.hook = lost_reply(kind, lambda: None)
    outcome = client.train(Route.split(4))
    assert outcome.report.status is Status.OK
    assert differences(outcome.state, expected.state) == []
    assert outcome.receipts == expected.receipts


def test_evaluating_without_the_edge_is_a_report(client: Client) -> None:
    """As in training."""
    client.edge.kill()
    report = client.evaluate(Route.split(4))
    assert report.status is Status.EDGE_FAILED
    assert "is dead" in report.message


# --- evaluating -----------------------------------------------------------------------


def test_every_cut_evaluates_as_the_whole_model_does(client: Client) -> None:
    """Loss, accuracy and counts, and nothing is sealed or left open."""
    whole = client.evaluate(Route.whole())
    assert 0 <= whole.metrics["accuracy"] <= 1
    for cut in CUTS:
        split = client.evaluate(Route.split(cut))
        assert (split.loss, split.metrics) == (whole.loss, whole.metrics)
        assert split.num_examples == whole.num_examples == NUM_EXAMPLES
    assert client.asked(wire.Seal) == []
    opened, abandoned = client.asked(wire.OpenSession), client.asked(wire.Abandon)
    assert [r.session for r in opened] == [r.session for r in abandoned]


def test_evaluating_leaves_a_training_session_alone(client: Client) -> None:
    """The two have sessions of different names."""
    client.train(Route.split(4))
    client.evaluate(Route.split(4))
    sessions = {request.session for request in client.asked(wire.OpenSession)}
    assert sessions == {f"1.0/c0/{EDGE}", f"1.0/c0/{EDGE}/evaluate"}
    assert len(tail_files(client.folder)) == 1


def test_an_empty_loader_is_no_example(client: Client) -> None:
    """The report says so; weighing it is the strategy's affair."""
    report = client.train(Route.split(4), batches=[]).report
    assert (report.num_examples, report.num_steps, report.loss) == (0, 0, 0.0)


# --- what is not a report -------------------------------------------------------------


@pytest.mark.parametrize("name", ["local_epochs", "meter_every"])
def test_counts_below_one_are_refused(client: Client, name: str) -> None:
    """Before anything is built."""
    with pytest.raises(ValueError, match=f"{name} is 0: give at least 1"):
        client.conditions(**{name: 0})


def test_a_state_of_another_model_is_refused(client: Client) -> None:
    """By name, with what is missing."""
    with pytest.raises(InvalidTask, match=r"0\.weight: missing"):
        train_locally(client.plan(Route.whole()), {}, loader(0), client.conditions())


def broken_batches(after: int) -> Callable[[], Iterator[Any]]:
    """Fail in the user's own loader."""

    def batches() -> Iterator[Any]:
        yield from itertools.islice(loader(0), after)
        raise OSError("disk on fire")

    return batches


def test_an_error_of_the_loader_closes_the_session(client: Client) -> None:
    """It comes through as it is, and the edge's memory is free at once."""
    with pytest.raises(OSError, match="disk on fire"):
        client.train(Route.split(4), batches=broken_batches(1)())
    assert len(client.asked(wire.Abandon)) == 1


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        ({"x": torch.zeros(2), "labels": torch.zeros(2)}, "a dict with x, labels"),
        (torch.zeros(2, 3), "a Tensor;"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2)), "a tuple of 3;"),
        ((torch.zeros(2), {"a": torch.zeros(2)}), "targets in a dict with a, and the"),
    ],
)
def test_a_loader_that_yields_something_else_is_told_what_to_yield(
    client: Client, batch: Any, kind: str
) -> None:
    """A mapping of two entries is not mistaken for inputs and targets."""
    with pytest.raises(InvalidTask, match=rf"the loader yields {kind}.*collate_fn"):
        client.train(Route.whole(), batches=[batch])
