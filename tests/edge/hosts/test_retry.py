"""Retrying: ask again when the edge says so, not more often and not for ever."""

import pytest

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.edge import RetryingTransport
from flwr_smartsplit.errors import EdgeFull

REQUEST = wire.IsHeld("digest")


class Busy:
    """An edge that is full a few times, and a clock that only sleep moves."""

    def __init__(self, num_refusals: int, retry_after_seconds: float | None) -> None:
        self.left, self.wait = num_refusals, retry_after_seconds
        self.seconds = 0.0
        self.num_asked = 0
        self.seen: list[object] = []

    def send(self, request: wire.Request[str]) -> str:
        """Answer, or refuse."""
        self.num_asked += 1
        self.seen.append(request)
        if self.num_asked > self.left:
            return "room"
        raise EdgeFull("full", retry_after_seconds=self.wait)

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.seconds += seconds

    def clock(self) -> float:
        """Tell the time."""
        return self.seconds


def answer(busy: Busy, max_wait_seconds: float) -> str:
    """Ask for so long."""
    transport = RetryingTransport(busy, max_wait_seconds, busy.clock, busy.sleep)
    return transport.send(REQUEST)


def test_it_asks_again_after_the_time_it_is_told() -> None:
    busy = Busy(3, 0.5)
    assert answer(busy, 10.0) == "room"
    assert (busy.num_asked, busy.seconds) == (4, 1.5)


def test_time_is_up_at_last() -> None:
    """The last refusal is what the caller gets, and nobody sleeps past the end."""
    busy = Busy(100, 0.5)
    with pytest.raises(EdgeFull):
        answer(busy, 1.2)
    assert (busy.num_asked, busy.seconds) == (3, 1.0)


@pytest.mark.parametrize(("wait", "max_wait"), [(None, 10.0), (0.5, 0.0)])
def test_nobody_waits_where_it_does_not_help(
    wait: float | None, max_wait: float
) -> None:
    busy = Busy(1, wait)
    with pytest.raises(EdgeFull):
        answer(busy, max_wait)
    assert (busy.num_asked, busy.seconds) == (1, 0.0)


def test_the_same_request_is_repeated() -> None:
    """It is delivered once there is room."""
    busy = Busy(2, 0.0)
    assert answer(busy, 1.0) == "room"
    assert busy.seen == [REQUEST] * 3
