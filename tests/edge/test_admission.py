"""Room: nothing beyond the budgets, and whoever is refused knows when to ask again."""

import pickle

import pytest

from flwr_smartsplit.edge.admission import (
    LEAST_WAIT_SECONDS,
    MOST_WAIT_SECONDS,
    Admission,
)
from flwr_smartsplit.errors import EdgeFull
from flwr_smartsplit.plan.tail_memory import TailBytes
from flwr_smartsplit.types import EdgeProfile
from tests.tasks import TASK


class Clock:
    """Seconds that pass when a test says so."""

    seconds = 0.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.seconds


CLOCK = Clock()


def room(
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    *,
    sealed: dict[str, int] | None = None,
) -> Admission:
    """Make the room of an edge."""
    profile = EdgeProfile(
        name="berlin", memory_bytes=memory_bytes, disk_bytes=disk_bytes
    )
    return Admission(TASK, profile, sealed=sealed or {}, clock=CLOCK)


def refused(rooms: Admission, session: str, need: TailBytes) -> EdgeFull:
    """Ask for more than there is."""
    with pytest.raises(EdgeFull) as caught:
        rooms.reserve(session, need)
    return caught.value


def test_an_edge_without_budgets_takes_everybody() -> None:
    assert not room().is_limited
    assert room(memory_bytes=1).is_limited
    assert room(disk_bytes=1).is_limited
    room().reserve("a", TailBytes(2**60, 2**60))


def test_what_is_refused_carries_its_numbers() -> None:
    """Also through a pickle, since it travels to the device."""
    berlin = room(memory_bytes=100)
    berlin.reserve("a", TailBytes(60, 0))
    error = pickle.loads(pickle.dumps(refused(berlin, "b", TailBytes(41, 0))))
    assert (error.needed_bytes, error.free_bytes, error.budget_bytes) == (41, 40, 100)
    assert error.retry_after_seconds == LEAST_WAIT_SECONDS
    assert "'berlin' has 40 B of its 100 B of memory left" in str(error)
    assert "Ask again in 0.05 s" in str(error)
    berlin.reserve("b", TailBytes(40, 0))  # To the last byte.


def test_room_comes_back_when_a_session_ends() -> None:
    """Sealing gives the memory back, and keeps the disk; freeing gives back both."""
    berlin = room(memory_bytes=100, disk_bytes=100)
    berlin.reserve("a", TailBytes(100, 60))
    assert refused(berlin, "b", TailBytes(1, 1)).budget_bytes == 100
    berlin.seal("a")
    berlin.reserve("b", TailBytes(100, 40))
    berlin.free("b")
    full = refused(berlin, "b", TailBytes(1, 41))
    assert "of disk left" in str(full)
    assert full.retry_after_seconds is None  # The round's end alone makes room.
    berlin.recount({})
    berlin.reserve("b", TailBytes(1, 41))


def test_what_never_fits_is_not_waited_for() -> None:
    """There is nothing to wait for if a session alone is more than the budget."""
    error = refused(room(memory_bytes=100), "a", TailBytes(101, 0))
    assert error.retry_after_seconds is None
    assert "raise its budget" in str(error)


def test_disk_that_open_sessions_will_need_may_come_back() -> None:
    """They may be abandoned."""
    berlin = room(disk_bytes=100, sealed={"old": 30})
    berlin.reserve("a", TailBytes(0, 50))
    assert refused(berlin, "b", TailBytes(0, 40)).retry_after_seconds is not None
    assert refused(berlin, "b", TailBytes(0, 80)).retry_after_seconds is None


def test_a_session_that_opens_again_replaces_itself() -> None:
    """Whatever it had, open or sealed."""
    berlin = room(memory_bytes=100, disk_bytes=100)
    berlin.reserve("a", TailBytes(90, 90))
    berlin.reserve("a", TailBytes(95, 95))
    berlin.seal("a")
    berlin.reserve("a", TailBytes(100, 100))


def test_a_refused_change_leaves_what_there_was() -> None:
    berlin = room(memory_bytes=100)
    berlin.reserve("a", TailBytes(60, 0))
    berlin.reserve("b", TailBytes(40, 0))
    assert refused(berlin, "b", TailBytes(41, 0)).free_bytes == 40
    berlin.free("a")
    assert refused(berlin, "c", TailBytes(61, 0)).free_bytes == 60


def test_keeping_takes_the_larger_of_each() -> None:
    berlin = room(memory_bytes=100, disk_bytes=100)
    berlin.reserve("a", TailBytes(60, 20))
    berlin.reserve("a", TailBytes(40, 30), keeps=True)
    assert refused(berlin, "b", TailBytes(41, 0)).free_bytes == 40
    assert refused(berlin, "b", TailBytes(0, 71)).free_bytes == 70


@pytest.mark.parametrize(
    ("seconds", "wait"),
    [(3.0, 1.5), (0.001, LEAST_WAIT_SECONDS), (1e3, MOST_WAIT_SECONDS)],
)
def test_the_wait_is_what_sessions_take_by_how_many_are_open(
    seconds: float, wait: float
) -> None:
    """Two are open, and each takes so long: one of them ends after half of it."""
    berlin = room(memory_bytes=2)
    berlin.reserve("before", TailBytes(1, 0))
    CLOCK.seconds += seconds
    berlin.seal("before")
    berlin.reserve("a", TailBytes(1, 0))
    berlin.reserve("b", TailBytes(1, 0))
    error = refused(berlin, "c", TailBytes(1, 0))
    assert error.retry_after_seconds == pytest.approx(wait)
