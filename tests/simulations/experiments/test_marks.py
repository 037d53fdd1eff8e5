"""Marks: a digest that sees every change, and files that are whole or not there."""

import numpy as np
import pytest

from simulations.experiments.marks import (
    Mark,
    read_marks,
    state_digest,
    write_mark,
    write_whole,
)

STATE = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "steps": np.array(7, dtype=np.int64),
}


@pytest.mark.parametrize(
    "change",
    [
        {"weight": STATE["weight"] + np.float32(1e-6)},
        {"weight": STATE["weight"].reshape(3, 2)},
        {"weight": STATE["weight"].astype(np.float64)},
        {"weight": STATE["weight"].T},
        {"steps": np.array(8)},
        {"steps": np.array([7])},
        {"other": np.zeros(1)},
    ],
)
def test_whatever_changes_in_a_state_changes_its_digest(change):
    assert state_digest(STATE | change) != state_digest(STATE)


def test_the_digest_is_of_values_not_of_how_memory_holds_them():
    other = {
        "steps": np.array(7, dtype=np.int64),
        "weight": np.asfortranarray(STATE["weight"]),
    }

    assert state_digest(other) == state_digest(STATE)


def test_marks_are_read_back_by_method(tmp_path):
    mark = Mark(method="fedavg", state_sha256="ab", accuracy=0.5, num_rounds=3)

    write_mark(tmp_path, mark)

    assert read_marks(tmp_path) == {"fedavg": mark}
    assert read_marks(tmp_path / "nowhere") == {}


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path):
    path = tmp_path / "kept.json"
    write_whole(path, "old")

    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")

    assert path.read_text() == "old"
