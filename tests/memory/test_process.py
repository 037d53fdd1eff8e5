"""What the system says of a process: this one's, with generous margins.

A device process of its own is in tests/test_device_process.py.
"""

import ctypes
import errno
import gc
import mmap
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flwr_smartsplit.errors import MemoryCapExceeded
from flwr_smartsplit.memory import process as process_memory
from flwr_smartsplit.memory.process import (
    MemoryGrowth,
    cuda_fence,
    cuda_growth,
    data_fence,
    process_bytes,
    process_fence,
    resident_growth,
)

MIB = 2**20
CPU = torch.device("cpu")
SIZE = 64 * MIB
MARGIN = 24 * MIB  # What else this process may do meanwhile.
FENCE = 256 * MIB
CHUNK = 40 * MIB  # Malloc has nothing so large at hand.
HUGE = 2**35  # Refused before a page of it is touched.

alone = pytest.mark.slow
"""Memory that other tests freed in this process may hide a growth or a refusal."""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def _nothing_to_give_back() -> None:
    """Free before a test what would else be freed in it, and hide a growth."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def bytes_of(num_bytes: int) -> torch.Tensor:
    """Make a tensor of so many bytes, and touch each."""
    return torch.ones(num_bytes, dtype=torch.uint8)


def hold_pages(num_bytes: int) -> None:
    """Hold so many bytes for a moment, and touch each page.

    They come from the system and go back to it. What malloc takes from a hole in its
    heap stays resident when it is free again.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, max(1, num_bytes), flags) as pages:
        for start in range(0, num_bytes, mmap.PAGESIZE):
            pages[start] = 1


def grown_by(num_bytes: int) -> MemoryGrowth:
    """Hold so many bytes for a moment, and measure."""
    with resident_growth() as growth:
        hold_pages(num_bytes)
    return growth


# --- the resident set -----------------------------------------------------------------


@alone
@linux
def test_growth_is_the_peak_inside_and_not_what_is_left() -> None:
    """Memory that is free again at the end was there."""
    growth = grown_by(SIZE).growth_bytes
    assert growth is not None
    assert SIZE - MARGIN < growth < SIZE + MARGIN


@alone
@linux
def test_a_peak_of_before_does_not_count() -> None:
    """The kernel's mark is set back at the start."""
    hold_pages(2 * SIZE)
    growth = grown_by(0).growth_bytes
    assert growth is not None
    assert growth < MARGIN


@alone
@linux
def test_growth_is_known_after_an_error_too() -> None:
    """The error comes through."""
    held: list[MemoryGrowth] = []

    def fail() -> None:
        with resident_growth() as growth:
            held.append(growth)
            hold_pages(SIZE)
            raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        fail()
    (growth,) = held
    assert growth.growth_bytes is not None
    assert growth.growth_bytes > SIZE - MARGIN


@alone
@linux
def test_a_mark_that_cannot_be_set_back_tells_only_if_it_rises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise the peak was below an older one, and nobody knows how far."""
    grown_by(SIZE)  # The mark is now at least so far up.
    monkeypatch.setattr(process_memory, "_CLEAR_REFS", tmp_path / "none" / "none")
    assert grown_by(SIZE // 4).growth_bytes is None
    growth = grown_by(3 * SIZE).growth_bytes
    assert growth is not None
    assert 3 * SIZE - MARGIN < growth < 3 * SIZE + MARGIN


def test_without_proc_there_is_no_number_and_no_fence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on other systems: what is inside runs as it would."""
    monkeypatch.setattr(process_memory, "_STATUS", tmp_path / "none")
    assert process_bytes("VmRSS") is None
    assert grown_by(MIB).growth_bytes is None
    with data_fence(0):
        assert bytes_of(SIZE).sum() == SIZE


@linux
def test_a_size_that_the_status_lacks_is_none() -> None:
    """And one that it has is in bytes: this process holds more than 10 MiB of them."""
    assert process_bytes("VmNothing") is None
    assert (process_bytes("VmRSS") or 0) > 10 * MIB


# --- the fence ------------------------------------------------------------------------


def limits() -> tuple[int, int]:
    """Read the process's limit."""
    return resource.getrlimit(resource.RLIMIT_DATA)


@pytest.fixture
def _same_limits_afterwards() -> Iterator[None]:
    """Look for what a fence left behind, and take it away."""
    before = limits()
    yield
    after = limits()
    resource.setrlimit(resource.RLIMIT_DATA, before)
    assert after == before


def refused(
    allocate: Callable[[], Any], *, extra_bytes: int = FENCE
) -> MemoryCapExceeded:
    """Go over a fence."""
    with (
        pytest.raises(MemoryCapExceeded) as found,
        data_fence(extra_bytes, client="client a"),
    ):
        allocate()
    return found.value


ALLOCATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: bytes_of(HUGE),
    "numpy": lambda: np.ones(HUGE, dtype=np.uint8),
    "python": lambda: bytearray(HUGE),
}


@pytest.mark.every(3)
@linux
@pytest.mark.usefixtures("_same_limits_afterwards")
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_who_asks_for_more_than_the_fence_is_refused(allocator: str) -> None:
    """Whichever asks: with the client, the numbers, and what to do."""
    error = refused(ALLOCATORS[allocator])
    assert error.operator == "the system's allocator"
    assert (error.client, error.budget_bytes) == ("client a", FENCE)
    assert error.live_bytes > FENCE
    assert sum(error.bytes_by_kind.values()) == error.live_bytes
    if allocator != "python":  # Python does not say how much it asked for.
        assert error.bytes_by_kind["asked for"] == HUGE
    assert "client a: the system's allocator refuses " in str(error)
    assert "which allows 256 MiB" in str(error)
    assert "Cut earlier, lower the batch size, or raise the budget." in str(error)


@alone
@linux
@pytest.mark.usefixtures("_same_limits_afterwards")
def test_the_fence_counts_the_sum_of_what_is_held() -> None:
    """Each tensor alone would fit; and what fits is not refused."""
    with data_fence(FENCE):
        bytes_of(FENCE - 2 * MARGIN)
    held: list[torch.Tensor] = []
    # What the process had before and freed leaves more room, in the heap too.
    error = refused(lambda: held.extend(bytes_of(CHUNK) for _ in range(64)))
    assert error.bytes_by_kind["asked for"] == CHUNK
    assert 2 < len(held) < 64


@pytest.mark.every(3)
@linux
@pytest.mark.usefixtures("_same_limits_afterwards")
@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError("x")])
def test_other_errors_come_through(error: Exception) -> None:
    """As they are."""
    with pytest.raises(type(error)) as found, data_fence(FENCE):
        raise error
    assert found.value is error


@pytest.mark.every(4)
@linux
@pytest.mark.usefixtures("_same_limits_afterwards")
@pytest.mark.parametrize(
    ("error", "is_fatal"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), False),
        (RuntimeError("std::bad_alloc"), False),
        (RuntimeError("tried to allocate 0 bytes: DefaultCPUAllocator"), False),
        (RuntimeError("could not create a primitive"), True),
    ],
)
def test_refusals_have_many_words(error: Exception, is_fatal: bool) -> None:
    """After some of them the process has to be started anew, and is told so."""

    def fail() -> None:
        raise error

    found = refused(fail)
    assert ("restart it" in str(found)) == is_fatal
    assert found.__cause__ is error


@linux
def test_no_budget_is_no_fence() -> None:
    """And a negative one is a slip."""
    before = limits()
    with data_fence(None):
        assert limits() == before
    with pytest.raises(ValueError, match="extra_bytes is -1"), data_fence(-1):
        pass


@linux
@pytest.mark.usefixtures("_same_limits_afterwards")
def test_a_fence_does_not_loosen_another() -> None:
    """Of two, the tighter one holds; the outer one is back after the inner."""
    with data_fence(FENCE):
        outer = limits()
        error = refused(lambda: bytes_of(2 * FENCE), extra_bytes=2**50)
        assert limits() == outer
    assert error.budget_bytes <= FENCE + MARGIN


# --- CUDA -----------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give this process a device of 1,000 MiB; return the shares it is limited to."""
    found: list[float] = []
    facts: dict[str, Any] = {
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(
            total_memory=1000 * MIB
        ),
        "memory_reserved": lambda device: 100 * MIB,
        "set_per_process_memory_fraction": lambda share, device: found.append(share),
        "reset_peak_memory_stats": lambda device: None,
    }
    for name, fact in facts.items():
        monkeypatch.setattr(torch.cuda, name, fact)
    return found


def test_a_fence_on_cuda_is_a_share_of_the_device_and_is_lifted(
    shares: list[float],
) -> None:
    """It leaves what the process has already, and says what was refused."""
    refusal = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    with pytest.raises(MemoryCapExceeded, match="client c7") as caught:
        with cuda_fence(CUDA, 300 * MIB, client="client c7"):
            assert shares == [0.4]
            raise refusal
    assert shares == [0.4, 1.0]
    assert caught.value.bytes_by_kind["asked for"] == 20 * MIB
    assert caught.value.budget_bytes == 300 * MIB


def test_a_fence_on_cuda_is_never_above_the_device(shares: list[float]) -> None:
    with cuda_fence(CUDA, 2000 * MIB):
        assert shares == [1.0]
    with cuda_fence(CUDA, None):
        assert shares == [1.0, 1.0]  # None is no fence.


def test_a_places_fence_has_the_slack_of_its_device(shares: list[float]) -> None:
    slack = process_memory.CUDA_SLACK_BYTES
    with process_fence(188 * MIB, device=CUDA):
        assert shares == [(100 * MIB + 188 * MIB + slack) / (1000 * MIB)]
    with process_fence(None, device=CUDA), process_fence(None, device=CPU):
        assert shares[1:] == [1.0]


def test_growth_on_cuda_is_what_its_allocator_gave_out(
    shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    del shares
    stats = {"allocated_bytes.all.current": 5, "allocated_bytes.all.peak": 12}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    with cuda_growth(CUDA) as growth:
        pass
    assert growth.growth_bytes == 7
