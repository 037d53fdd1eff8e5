"""Budgets that move: where a number comes from, and that it is one."""

import pickle
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from flwr_smartsplit.memory.budget import MAX_BUDGET_BYTES, MemoryBudget, as_budget

MIB = 2**20


def at(budget: MemoryBudget, *steps: int) -> list[int | None]:
    """Read a budget at some steps."""
    return [budget.read(step=step, live_bytes=0) for step in steps]


@dataclass
class Given(MemoryBudget):
    """A user's own budget, which returns what it was given."""

    value: Any

    def read(self, *, step: int, live_bytes: int) -> Any:
        """Return it."""
        del step, live_bytes
        return self.value


@pytest.fixture
def trace(tmp_path: Path) -> Any:
    """Write a trace, and make a budget of it."""

    def written(text: str) -> MemoryBudget:
        path = tmp_path / "budget.csv"
        path.write_text(text, "utf-8")
        return MemoryBudget.from_trace(path)

    return written


# --- numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, 1, MAX_BUDGET_BYTES, np.int64(7)])
def test_a_number_is_a_budget_that_stays(value: Any) -> None:
    """None too; what is read is Python's own int, which every record can carry."""
    for budget in (as_budget(value), as_budget(Given(value))):
        assert at(budget, 0, 10**6) == [value, value]
        assert type(budget.read(step=0, live_bytes=1)) in {int, type(None)}


BAD = [-1, True, float("nan"), float("inf"), "64MiB", Fraction(1), np.nan, [1]]


@pytest.mark.parametrize(
    "value", [7.0, 7.9, np.float32(7.5), np.int16(7), np.array(7), torch.tensor(7)]
)
def test_a_number_of_another_library_is_a_budget(value: Any) -> None:
    """Also a computed one, as half of what is free: its fraction is left out."""
    for budget in (as_budget(value), as_budget(Given(value))):
        read = budget.read(step=0, live_bytes=0)
        assert (read, type(read)) == (7, int)


@pytest.mark.parametrize("value", BAD)
def test_what_is_no_number_of_bytes_is_refused(value: Any) -> None:
    """At once where it is given; a user's own code is told when it is read."""
    with pytest.raises(ValueError, match=r"^budget_bytes is .* None for no limit"):
        as_budget(value)
    with pytest.raises(ValueError, match=r"^budget_bytes is .* None for no limit"):
        MemoryBudget.constant(value)
    budget = as_budget(Given(value))
    with pytest.raises(ValueError, match=r"^what Given.read returned at step 3 is .*"):
        budget.read(step=3, live_bytes=0)


@pytest.mark.parametrize("value", [MAX_BUDGET_BYTES + 1, 10**1000])
def test_more_than_any_machine_has_is_refused(value: int) -> None:
    """A slip of a unit is not taken for no limit."""
    with pytest.raises(ValueError, match=r"more than 2\*\*60 bytes"):
        as_budget(value)
    with pytest.raises(ValueError, match=r"Given.read .* more than 2\*\*60 bytes"):
        as_budget(Given(value)).read(step=0, live_bytes=0)


def test_a_budget_is_wrapped_once() -> None:
    """Whoever is given a budget may call as_budget again."""
    once = as_budget(Given(5))
    assert as_budget(once) is once


def test_an_own_budget_is_told_the_step_and_what_is_live() -> None:
    """Both, as they were given."""

    class Own(MemoryBudget):
        def read(self, *, step: int, live_bytes: int) -> int | None:
            return 1000 * step + live_bytes

    assert as_budget(Own()).read(step=3, live_bytes=7) == 3007


def test_a_budget_without_read_cannot_be_made() -> None:
    """Not at the first batch, but before."""

    class Own(MemoryBudget):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Own()  # type: ignore[abstract]


# --- traces ---------------------------------------------------------------------------


def test_a_row_of_a_trace_holds_until_the_next(trace: Any) -> None:
    """Header, comments, empty lines and blanks say nothing."""
    budget = trace(
        "\ufeffstep,budget_bytes\n# a busy phone\n0, 64MiB\n\n3,1000\r\n5 ,none\n 9,0"
    )
    assert at(budget, 0, 2) == [64 * MIB] * 2
    assert at(budget, 3, 4) == [1000] * 2
    assert at(budget, 5, 8, 9, 10**9) == [None, None, 0, 0]


def test_a_trace_travels(trace: Any) -> None:
    """Ray pickles a client; the file need not be there."""
    budget = pickle.loads(pickle.dumps(as_budget(trace("0,10\n1,20"))))
    assert at(budget, 0, 1) == [10, 20]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("0,1\n1", 2, "it has 1 values, not step,budget_bytes"),
        ("0,1,2", 1, "it has 3 values"),
        ("0,1\n\nx,2", 3, "'x' is not a step: write a whole number"),
        ("-1,2", 1, "'-1' is not a step"),
        ("0,64MB", 1, "'64MB' is not a budget: .* such as 64MiB, or none"),
        ("0,-5", 1, "'-5' is not a budget"),
        ("0,nan", 1, "'nan' is not a budget"),
        ("0,1.5", 1, "'1.5' is not a budget"),
        ("0,", 1, "'' is not a budget"),
        ("0,٣", 1, "'٣' is not a budget"),
        ("0,99999999TiB", 1, "the budget is .* more than 2\\*\\*60"),
        ("# later\n2,1", 2, "the first row is for step 2, .* write a row for step 0"),
        ("0,1\n5,1\n5,2", 3, "step 5 comes after step 5: write steps in order"),
        ("0,1\n5,1\n4,2", 3, "step 4 comes after step 5"),
    ],
)
def test_a_trace_that_cannot_be_followed_names_file_and_line(
    trace: Any, text: str, line: int, words: str
) -> None:
    """With what is wrong, and what to write."""
    with pytest.raises(
        ValueError, match=rf"budget.csv cannot .*\n  line {line} .*"
    ) as e:
        trace(text)
    assert e.match(words)
    assert str(e.value).count("\n") == 1


def test_an_empty_trace_says_so(trace: Any) -> None:
    """Also one that has but a header."""
    with pytest.raises(ValueError, match="no rows: write lines such as 0,64MiB"):
        trace("step,budget_bytes\n")


def test_all_problems_of_a_trace_are_told_at_once(trace: Any) -> None:
    """Five of them, and how many are left; one slip does not make two problems."""
    with pytest.raises(ValueError, match=r"line 1 .*\n  line 3 ") as found:
        trace("0,x\n1,1\n1,2")
    assert str(found.value).count("\n  ") == 2
    with pytest.raises(ValueError, match=r"\n  and 4 more lines\.$"):
        trace("x\n" * 9)


def test_a_trace_does_not_run_backwards(trace: Any) -> None:
    """A negative step is no step of the last row."""
    with pytest.raises(ValueError, match="step is -1"):
        trace("0,1").read(step=-1, live_bytes=0)


# --- free memory ----------------------------------------------------------------------


def test_free_memory_adds_what_is_in_use_and_leaves_the_reserve() -> None:
    """What the client holds is not free, but its own; never below 0."""
    free = [500, 500, 30]
    budget = as_budget(
        MemoryBudget.free_memory(reserve_bytes=100, available_bytes=lambda: free.pop(0))
    )
    assert budget.read(step=0, live_bytes=0) == 400
    assert budget.read(step=1, live_bytes=50) == 450
    assert budget.read(step=2, live_bytes=50) == 0


def test_free_memory_is_the_machines() -> None:
    """Somewhere between nothing and all of it."""
    budget = MemoryBudget.free_memory(reserve_bytes=0)
    found = budget.read(step=0, live_bytes=0)
    assert found is not None
    assert 0 < found <= psutil.virtual_memory().total


@pytest.mark.parametrize("reserve_bytes", [*BAD, None])
def test_a_reserve_is_a_number_of_bytes(reserve_bytes: Any) -> None:
    """Of at least 0."""
    with pytest.raises(ValueError, match=r"^reserve_bytes is "):
        MemoryBudget.free_memory(reserve_bytes=reserve_bytes)
