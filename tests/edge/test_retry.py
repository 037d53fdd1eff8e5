"""Patience: ask again when the edge says so, not more often and not for ever."""

import pytest

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.retry import PatientTransport, ask_patiently
from flwr_smartsplit.errors import EdgeFull


class Busy:
    """An edge that is full a few times, and a clock that only sleep moves."""

    def __init__(self, num_refusals: int, retry_after_seconds: float | None) -> None:
        self.left, self.wait = num_refusals, retry_after_seconds
        self.seconds = 0.0
        self.num_asked = 0

    def ask(self) -> str:
        """Answer, or refuse."""
        self.num_asked += 1
        if self.num_asked > self.left:
            return "room"
        raise EdgeFull("full", retry_after_seconds=self.wait)

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.seconds += seconds

    def clock(self) -> float:
        """Tell the time."""
        return self.seconds


def answer(busy: Busy, patience_seconds: float) -> str:
    """Ask with patience."""
    return ask_patiently(busy.ask, patience_seconds, clock=busy.clock, sleep=busy.sleep)


def test_it_asks_again_after_the_time_it_is_told() -> None:
    busy = Busy(3, 0.5)
    assert answer(busy, 10.0) == "room"
    assert (busy.num_asked, busy.seconds) == (4, 1.5)


def test_patience_ends() -> None:
    """The last refusal is what the caller gets, and nobody sleeps past the end."""
    busy = Busy(100, 0.5)
    with pytest.raises(EdgeFull):
        answer(busy, 1.2)
    assert (busy.num_asked, busy.seconds) == (3, 1.0)


@pytest.mark.parametrize(("wait", "patience"), [(None, 10.0), (0.5, 0.0)])
def test_nobody_waits_where_it_does_not_help(
    wait: float | None, patience: float
) -> None:
    busy = Busy(1, wait)
    with pytest.raises(EdgeFull):
        answer(busy, patience)
    assert (busy.num_asked, busy.seconds) == (1, 0.0)


def test_a_transport_repeats_the_same_request() -> None:
    """It is delivered once there is room."""
    seen, busy = [], Busy(2, 0.0)

    class Inner:
        def send(self, request):
            seen.append(request)
            return busy.ask()

    request = wire.IsHeld("digest")
    assert PatientTransport(Inner(), 1.0).send(request) == "room"
    assert seen == [request] * 3
