"""Memory budgets that may change between batches."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flwr_smartsplit.types.sizes import parse_size, whole_bytes

MAX_BUDGET_BYTES = 2**60  # more is a typing error: no machine has it

_HEADER = ["step", "budget_bytes"]
_SHOWN_PROBLEMS = 5


class MemoryBudget(ABC):
    """What a device's tensors may take, which may change between batches.

    Subclass it for a budget of your own; whoever uses it checks what ``read`` returns.

    Examples
    --------
    >>> class Halving(MemoryBudget):
    ...     def read(self, *, step, live_bytes):
    ...         return 2**20 // (1 + step)
    >>> as_budget(Halving()).read(step=1, live_bytes=0)
    524288
    """

    @abstractmethod
    def read(self, *, step: int, live_bytes: int) -> int | None:
        """Return what the tensors may take from now on.

        Parameters
        ----------
        step : int
            Batches done so far.
        live_bytes : int
            What this client's own tensors take now.

        Returns
        -------
        int or None
            Bytes for all tensors together; None is no limit.
        """

    @staticmethod
    def constant(budget_bytes: int | None) -> "MemoryBudget":
        """Return a budget that never changes; None is no limit.

        Raises
        ------
        ValueError
            If it is not a number of bytes.
        """
        return _Constant(_checked(budget_bytes, "budget_bytes"))

    @staticmethod
    def from_trace(path: str | Path) -> "MemoryBudget":
        """Return a budget that follows a file, which is read once.

        Each line is ``step,budget_bytes``, and holds from that step to the next line's.
        A budget is a whole number of bytes, a size such as ``64MiB``, or ``none`` for
        no limit. The first line is for step 0; a header, empty lines and lines that
        begin with ``#`` are skipped.

        Raises
        ------
        ValueError
            With the file, the line numbers, what is wrong and what to write.
        OSError
            If the file cannot be read.
        """
        return _trace(Path(path))

    @staticmethod
    def free_memory(
        *, reserve_bytes: int, available_bytes: Callable[[], int] | None = None
    ) -> "MemoryBudget":
        """Return a budget of what the machine has free plus what the client uses.

        Parameters
        ----------
        reserve_bytes : int
            Left to others.
        available_bytes : Callable[[], int], optional
            Reads what is free; by default, on the whole machine. That number ignores
            the limit of a container, and several clients would each count all of it as
            theirs: give a function of your own there.

        Raises
        ------
        ValueError
            If the reserve is not a number of bytes.
        """
        reserved = _checked(reserve_bytes, "reserve_bytes")
        if reserved is None:
            raise ValueError("reserve_bytes is None: give bytes of at least 0.")
        return _FreeMemory(reserved, available_bytes or _machine_available_bytes)


def as_budget(value: int | MemoryBudget | None) -> MemoryBudget:
    """Turn bytes, a budget or None into a budget whose ``read`` checks its numbers."""
    if isinstance(value, _Checked):
        return value
    if isinstance(value, MemoryBudget):
        return _Checked(value)
    return MemoryBudget.constant(value)


@dataclass(frozen=True, slots=True)
class _Constant(MemoryBudget):
    budget_bytes: int | None

    def read(self, *, step: int, live_bytes: int) -> int | None:
        del step, live_bytes
        return self.budget_bytes


@dataclass(frozen=True, slots=True)
class _Trace(MemoryBudget):
    steps: tuple[int, ...]
    budgets_bytes: tuple[int | None, ...]

    def read(self, *, step: int, live_bytes: int) -> int | None:
        del live_bytes
        if step < 0:
            raise ValueError(f"step is {step}: steps are counted from 0.")
        return self.budgets_bytes[bisect_right(self.steps, step) - 1]


@dataclass(frozen=True, slots=True)
class _FreeMemory(MemoryBudget):
    reserve_bytes: int
    available_bytes: Callable[[], int]

    def read(self, *, step: int, live_bytes: int) -> int | None:
        del step
        return max(0, self.available_bytes() - self.reserve_bytes + live_bytes)


@dataclass(frozen=True, slots=True)
class _Checked(MemoryBudget):
    budget: MemoryBudget

    def read(self, *, step: int, live_bytes: int) -> int | None:
        found = self.budget.read(step=step, live_bytes=live_bytes)
        name = type(self.budget).__name__
        return _checked(found, f"what {name}.read returned at step {step}")


def _machine_available_bytes() -> int:
    return int(psutil.virtual_memory().available)


def _checked(value: Any, name: str) -> int | None:
    """Return a number of bytes as an int, or raise with what is wrong."""
    if value is None:
        return None
    num_bytes = whole_bytes(value, name)
    if num_bytes > MAX_BUDGET_BYTES:
        raise ValueError(
            f"{name} is {value!r:.40}, more than 2**60 bytes, which no machine has: "
            "give bytes, or None for no limit."
        )
    return num_bytes


def _trace(path: Path) -> _Trace:
    """Read a trace, or raise with everything that is wrong with it."""
    rows: list[tuple[int, int | None]] = []
    problems: list[str] = []
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), start=1):
        words = [word.strip() for word in line.split(",")]
        if words == _HEADER or not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            row = _row(words)
            if rows or not problems:  # Otherwise the step before is unknown.
                _check_order(row[0], rows[-1][0] if rows else None)
            rows.append(row)
        except ValueError as error:
            problems.append(f"line {number} ({line.strip()[:40]!r}): {error}")
    if not rows and not problems:
        problems = ["it has no rows: write lines such as 0,64MiB."]
    if problems:
        left_out = len(problems) - _SHOWN_PROBLEMS
        more = [f"and {left_out} more lines."] if left_out > 0 else []
        text = "\n  ".join(problems[:_SHOWN_PROBLEMS] + more)
        raise ValueError(f"the budget trace {path} cannot be followed:\n  {text}")
    return _Trace(*zip(*rows, strict=True))


def _row(words: list[str]) -> tuple[int, int | None]:
    if len(words) != len(_HEADER):
        raise ValueError(
            f"it has {len(words)} values, not step,budget_bytes: write 0,64MiB."
        )
    step, budget = words
    if not _is_whole(step):
        raise ValueError(f"{step!r} is not a step: write a whole number from 0 on.")
    return int(step), _budget_of(budget)


def _check_order(step: int, previous_step: int | None) -> None:
    """Refuse a first step other than 0, and a step that is not after the last."""
    if previous_step is None and step > 0:
        raise ValueError(
            f"the first row is for step {step}, and nothing says what holds before: "
            "write a row for step 0."
        )
    if previous_step is not None and step <= previous_step:
        raise ValueError(
            f"step {step} comes after step {previous_step}: write steps in order, "
            "each once."
        )


def _budget_of(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        num_bytes = int(text) if _is_whole(text) else parse_size(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a budget: write bytes as a whole number, a size such as "
            "64MiB, or none for no limit."
        ) from None
    return _checked(num_bytes, "the budget")


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal()
