"""GlobalState: named once, and known again only if every bit is the same."""

from typing import Any

import numpy as np
import pytest

from flwr_smartsplit.server.global_state import GlobalState
from tests.flower import apps as a

STATE: dict[str, Any] = {
    "w": np.float32([[1.0, np.nan], [0.0, -2.5]]),
    "count": np.array(3, np.int64),
    "mask": np.array([True, False, True]),
    "half": np.float16([1.0, 2.0]),
    "wave": np.complex128([1 + 2j]),
    "none": np.zeros((0, 2), np.float32),
}


def copied() -> dict[str, Any]:
    """Read the state anew."""
    return {name: array.copy() for name, array in STATE.items()}


def test_a_state_read_anew_is_known_again() -> None:
    """In every dtype, a NaN and an empty array included; also with a frozen part."""
    assert GlobalState.of(STATE, STATE.keys()).is_still(copied())
    assert GlobalState.of(STATE, ["w", "half"]).is_still(copied())


@pytest.mark.parametrize("name", [name for name in STATE if name != "none"])
def test_one_other_bit_is_another_state(name: str) -> None:
    """The planted error, in each array and part."""
    state = copied()
    state[name].reshape(-1).view(np.uint8)[-1] ^= 1
    for changing in (STATE.keys(), ["w"]):
        assert not GlobalState.of(STATE, changing).is_still(state)


def test_other_names_dtypes_and_shapes_are_another_state() -> None:
    """Also -0.0, which equals 0.0."""
    known = GlobalState.of(STATE, STATE.keys())
    fewer = copied()
    del fewer["mask"]
    assert not known.is_still(fewer)
    assert not known.is_still({**copied(), "more": np.zeros(1)})
    assert not known.is_still({**copied(), "half": STATE["half"].view(np.int16)})
    assert not known.is_still({**copied(), "none": np.zeros((0, 3), np.float32)})
    negative = copied()
    negative["w"][1, 0] = -0.0
    assert not known.is_still(negative)


def test_what_may_have_changed_with_the_known_state_is_named_anew() -> None:
    """It shares memory with it; and what was never named is not known."""
    assert not GlobalState.of(STATE, STATE.keys()).is_still(STATE)
    assert not GlobalState().is_still({})


def test_a_run_names_each_state_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and the next training have the state that was merged."""
    named, name_it = [], GlobalState.of

    def noting(*given: Any) -> GlobalState:
        found = name_it(*given)
        named.append(found.digest)
        return found

    monkeypatch.setattr(GlobalState, "of", noting)
    a.run(a.apps([None, None]), a.smart_split(fraction_evaluate=1.0), num_rounds=3)
    assert len(named) == len(set(named)) == 4
