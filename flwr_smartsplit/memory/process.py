"""What the system measures and refuses of a process's memory, beside the meter.

The meter counts tensors; the system counts all that a process holds. These numbers are
one client's only if it is alone in its process. For Linux and CUDA; elsewhere nothing
is measured and nothing is refused.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from flwr_smartsplit.errors import MemoryCapExceeded, bytes_text
from flwr_smartsplit.types.sizes import parse_size

# What a step takes besides its tensors: scratch inside kernels, compiled kernels, the
# interpreter, what malloc keeps. With malloc told to return free memory, the resident
# set of whole steps was 10 to 30 MiB above the meter.
KERNEL_SLACK_BYTES = 32 * 2**20

# The same on CUDA, where the allocator's cache counts: workspaces of cuBLAS and cuDNN,
# and what remains of the segments of 2 and 20 MiB that blocks are cut from. A guess:
# no GPU was at hand to measure it.
CUDA_SLACK_BYTES = 512 * 2**20

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"
_TORCH_GRAIN = 32_768  # From so many elements on, torch uses another thread.

_KERNEL_REFUSED = "could not create a primitive"
_REFUSALS = ("DefaultCPUAllocator", "std::bad_alloc", _KERNEL_REFUSED)
_ASKED = re.compile(r"allocate ([1-9]\d*(?:\.\d+)?)\.? ([KMGT]iB|B|bytes)")


@dataclass(slots=True)
class MemoryGrowth:
    """The most above the start, once its block has ended; None if unknown."""

    growth_bytes: int | None = None


def process_bytes(key: str) -> int | None:
    """Read VmRSS, VmHWM or VmData of this process, in bytes; None if not on Linux."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


@contextmanager
def resident_growth() -> Iterator[MemoryGrowth]:
    """Measure the most that the process's resident set grew by inside.

    The kernel keeps a high-water mark, which is reset at the start. Where that is not
    allowed, the mark tells only if it rises inside; otherwise the growth is None. A
    process has one mark: do not nest, and do not measure in two threads.
    """
    growth = MemoryGrowth()
    mark_bytes = 0 if _is_mark_reset() else process_bytes("VmHWM")
    before_bytes = process_bytes("VmRSS")
    try:
        yield growth
    finally:
        peak_bytes = process_bytes("VmHWM")
        if before_bytes is None or mark_bytes is None or peak_bytes is None:
            pass  # Not Linux.
        elif peak_bytes > mark_bytes:
            growth.growth_bytes = max(0, peak_bytes - before_bytes)


@contextmanager
def cuda_growth(device: torch.device) -> Iterator[MemoryGrowth]:
    """Measure the most that this process's tensors on a device grew by inside.

    It is what torch's allocator gave out, with the workspaces of kernels.
    """
    growth = MemoryGrowth()
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_stats(device)["allocated_bytes.all.current"]
    try:
        yield growth
    finally:
        peak_bytes = torch.cuda.memory_stats(device)["allocated_bytes.all.peak"]
        growth.growth_bytes = peak_bytes - before_bytes


def process_growth(device: torch.device) -> AbstractContextManager[MemoryGrowth]:
    """Measure what a process takes more where it computes."""
    return cuda_growth(device) if device.type == "cuda" else resident_growth()


def process_fence(
    budget_bytes: int | None, *, device: torch.device, client: str = ""
) -> AbstractContextManager[None]:
    """Let the allocator of a device refuse what is above a budget and a slack."""
    fence, slack_bytes = data_fence, KERNEL_SLACK_BYTES
    if device.type == "cuda":
        fence, slack_bytes = partial(cuda_fence, device), CUDA_SLACK_BYTES
    extra_bytes = None if budget_bytes is None else budget_bytes + slack_bytes
    return fence(extra_bytes, client=client)


@contextmanager
def cuda_fence(
    device: torch.device, extra_bytes: int | None, *, client: str = ""
) -> Iterator[None]:
    """Let torch's allocator refuse what it reserves above ``extra_bytes`` more.

    It limits this process's share of the device, and lifts the limit at the end: an
    earlier limit of the user's is not restored, since torch does not tell it. None sets
    no fence. Raises MemoryCapExceeded when memory is refused inside.
    """
    if extra_bytes is None:
        yield
        return
    torch.cuda.empty_cache()  # What others left in the cache is no one's.
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    start_bytes = torch.cuda.memory_reserved(device)
    share = min(1.0, (start_bytes + extra_bytes) / total_bytes)

    def grown_bytes() -> int:
        return torch.cuda.memory_reserved(device) - start_bytes

    with _naming_refusals(client, extra_bytes, grown_bytes):
        torch.cuda.set_per_process_memory_fraction(share, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def data_fence(extra_bytes: int | None, *, client: str = "") -> Iterator[None]:
    """Let the system refuse what this process takes above ``extra_bytes`` more.

    It lowers the process's soft ``RLIMIT_DATA``, which also covers memory outside
    tensors, and restores it. None sets no fence. Raises MemoryCapExceeded when torch,
    numpy or Python is refused memory inside.

    Not all kernels recover from a refusal: with oneDNN, less than a MiB below the
    fence, the process can crash, or run no convolutions from then on. Fence only a
    process that you can afford to lose, and leave it slack. What malloc keeps is not
    refused: tell it to return all of it.
    """
    if extra_bytes is not None and extra_bytes < 0:
        raise ValueError(f"extra_bytes is {extra_bytes}: give at least 0, or None.")
    if extra_bytes is None or process_bytes("VmData") is None:
        yield
        return
    import resource  # noqa: PLC0415 - not on Windows

    _start_torch_threads()
    start_bytes = process_bytes("VmData") or 0
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = (start_bytes + extra_bytes, soft, hard)
    limit = min(n for n in limits if n != resource.RLIM_INFINITY)

    def grown_bytes() -> int:
        return (process_bytes("VmData") or 0) - start_bytes

    # The error is made outside, where Python has memory for it.
    with _naming_refusals(client, limit - start_bytes, grown_bytes):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _is_mark_reset() -> bool:
    """Reset the resident set's high-water mark to its current size, if allowed."""
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:
        return False
    return True


def _start_torch_threads() -> None:
    """Make torch start its threads: OpenMP ends the process if a stack does not fit."""
    num_threads = torch.get_num_threads()
    if num_threads > 1:
        torch.ones(num_threads * _TORCH_GRAIN)
    with torch.enable_grad():
        torch.ones(1, requires_grad=True).sum().backward()


@contextmanager
def _naming_refusals(
    client: str, allowed_bytes: int, grown_bytes: Callable[[], int]
) -> Iterator[None]:
    """Turn an allocator's refusal into the cap's error."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _is_refusal(error):
            raise
        raise _exceeded(error, client, grown_bytes(), allowed_bytes) from error


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in _REFUSALS
    )


def _exceeded(
    error: Exception, client: str, grown_bytes: int, allowed_bytes: int
) -> MemoryCapExceeded:
    """Say what was refused, at which growth, and what to do."""
    asked = _ASKED.search(str(error))
    asked_bytes = parse_size(asked[1] + asked[2].replace("bytes", "B")) if asked else 0
    # By now some of it may be free again: this is a lower bound.
    live_bytes = max(grown_bytes + asked_bytes, allowed_bytes + 1)
    kinds = {"taken since the fence": live_bytes - asked_bytes}
    if asked_bytes:
        kinds["asked for"] = asked_bytes
    restart = " This process may not recover: restart it."
    return MemoryCapExceeded(
        f"{client or 'this step'}: the system's allocator refuses "
        f"{bytes_text(asked_bytes) if asked_bytes else 'memory'}: the process would "
        f"have taken at least {bytes_text(live_bytes)} since its fence was set, which "
        f"allows {bytes_text(allowed_bytes)} ({str(error) or type(error).__name__:.200}"
        "). Cut earlier, lower the batch size, or raise the budget."
        f"{restart if _KERNEL_REFUSED in str(error) else ''}",
        client=client,
        operator="the system's allocator",
        phase="",
        live_bytes=live_bytes,
        budget_bytes=allowed_bytes,
        bytes_by_kind=dict(sorted(kinds.items(), key=lambda item: -item[1])),
    )
