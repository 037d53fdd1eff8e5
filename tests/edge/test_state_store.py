"""The spill: tails and states on disk, whole or not at all, and only if they fit."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr_smartsplit.edge import state_store
from flwr_smartsplit.edge.protocol import Entry
from flwr_smartsplit.edge.state_store import StateStore
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.edge.weighted_mean import add_states
from flwr_smartsplit.errors import EdgeError, StateNotHeld, TailLost
from flwr_smartsplit.server.global_state import GlobalState
from tests.faults import tail_files
from tests.tasks import differences

STATE: dict[str, Any] = {
    "a.w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.n": np.array(3, np.int64),
    "b.w": np.float16([1.5, np.inf]),
    "empty": np.zeros((0, 2), np.float32),
}
SESSION = "1/client 7/../é/edge"


def test_a_tail_comes_back_in_every_bit(tmp_path: Path) -> None:
    """Names, dtypes, shapes, values; also after the edge restarted."""
    digest = StateStore(tmp_path).put_tail(SESSION, 1, STATE)
    assert digest == state_digest(STATE)
    spill = StateStore(tmp_path)
    assert differences(spill.read_tail(SESSION), STATE) == []
    ((state, weight),) = spill.read_tails([Entry(SESSION, digest, 3)])
    assert (differences(state, STATE), weight) == ([], 3)


def test_a_session_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    """Client keys are anybody's text; files stay inside, and apart."""
    folder = tmp_path / "spill"
    spill = StateStore(folder)
    sessions = ["../x", "a/b", "a%2Fb", "/etc/x", "a b", ".", "", "医" * 300, "n" * 999]
    for session in sessions:
        spill.put_tail(session, 1, {"w": np.zeros(1)})
    assert len(list(folder.iterdir())) == len(sessions)
    assert [path.name for path in tmp_path.iterdir()] == ["spill"]
    assert set(StateStore(folder).tail_bytes()) == set(sessions)


def test_states_are_held_by_digest_and_read_by_name(tmp_path: Path) -> None:
    """A device's tail needs some names only."""
    spill = StateStore(tmp_path)
    digest = state_digest(STATE)
    assert not spill.holds(digest)
    spill.hold(digest, STATE)
    assert spill.holds(digest)
    part = spill.read_state(digest, ("a.n", "b.w"))
    assert differences(part, {name: STATE[name] for name in ("a.n", "b.w")}) == []


def test_a_state_that_is_not_held_is_named(tmp_path: Path) -> None:
    """The error carries the digest that has to be sent."""
    with pytest.raises(StateNotHeld, match="no global state abcdefabcdef is") as raised:
        StateStore(tmp_path).read_state("abcdef" * 3, ())
    assert raised.value.digest == "abcdef" * 3


def test_a_state_that_cannot_be_read_just_now_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others of the round need it, and nobody would send it again."""

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    spill = StateStore(tmp_path)
    digest = state_digest(STATE)
    spill.hold(digest, STATE)
    with monkeypatch.context() as now:
        now.setattr("flwr_smartsplit.edge.state_store.safe_open", fails)
        with pytest.raises(OSError, match="open files"):
            spill.read_state(digest, ("b.w",))
    with pytest.raises(EdgeError, match="give strategy and edges the same task"):
        spill.read_state(digest, ("b.w", "c.w"))
    assert set(spill.read_state(digest, ("b.w",))) == {"b.w"}


def test_a_spoilt_state_is_sent_again(tmp_path: Path) -> None:
    spill = StateStore(tmp_path)
    digest = state_digest(STATE)
    spill.hold(digest, STATE)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StateNotHeld):
        spill.read_state(digest, ("b.w",))
    assert not spill.holds(digest)


def divided(spill: StateStore, frozen: tuple[str, ...]) -> GlobalState:
    """Hold a state in two parts."""
    parts = GlobalState.of(STATE, STATE.keys() - set(frozen))
    spill.hold(parts.rest, parts.frozen)
    spill.hold(parts.digest, parts.changing, rest=parts.rest)
    return parts


def test_a_state_in_two_parts_is_read_as_one(tmp_path: Path) -> None:
    """In the order that was asked for, whichever part has a name."""
    spill = StateStore(tmp_path)
    parts = divided(spill, ("a.w", "empty"))
    names = ("empty", "b.w", "a.w", "a.n")
    found = spill.read_state(parts.digest, names)
    assert tuple(found) == names
    assert differences(found, {name: STATE[name] for name in names}) == []
    with pytest.raises(EdgeError, match="lacks c: give strategy and edges the same"):
        spill.read_state(parts.digest, ("a.w", "c"))
    assert spill.holds(parts.digest)


@pytest.mark.parametrize("is_cut_short", [True, False])
def test_a_state_whose_rest_is_lost_is_not_held(
    tmp_path: Path, is_cut_short: bool
) -> None:
    """Then both are sent again; what is damaged is noticed when it is read."""
    spill = StateStore(tmp_path)
    parts = divided(spill, ("a.w",))
    path = spill._state_path(parts.rest)
    if is_cut_short:
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(StateNotHeld):
            spill.read_state(parts.digest, ("b.w", "a.w"))
    path.unlink(missing_ok=True)
    assert not spill.holds(parts.digest)
    spill.hold(parts.rest, parts.frozen)
    assert spill.holds(parts.digest)


def test_a_released_state_keeps_its_rest(tmp_path: Path) -> None:
    """Also for the next state, which nobody has sent yet."""
    spill = StateStore(tmp_path)
    parts = divided(spill, ("a.w",))
    spill.release(1, parts.digest, parts.rest)
    assert spill.holds(parts.digest)
    spill.release(1, "the next", parts.rest)
    assert spill.holds(parts.rest)
    assert not spill.holds(parts.digest)
    spill.release(1, "the next")
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_any_layout_keep_their_values(tmp_path: Path) -> None:
    """A transposed array is not written in memory order under its own shape."""
    spill = StateStore(tmp_path)
    state = {"t": np.arange(6.0).reshape(2, 3).T, "s": np.arange(10.0)[::2]}
    digest = spill.put_tail("s", 1, state)
    assert differences(spill.read_tail("s"), state) == []
    assert len(list(spill.read_tails([Entry("s", digest, 1)]))) == 1


def test_every_tail_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Missing, changed, cut short, emptied, replaced by another."""
    spill = StateStore(tmp_path)
    cases = ("good", "missing", "changed", "short", "emptied", "replaced")
    digests, files = {}, {}
    for index, case in enumerate(cases):
        digests[case] = spill.put_tail(case, 1, {"w": np.full(3, float(index))})
        (files[case],) = set(tail_files(tmp_path)) - set(files.values())
    files["missing"].unlink()
    content = bytearray(files["changed"].read_bytes())
    content[-1] ^= 1
    files["changed"].write_bytes(content)
    files["short"].write_bytes(files["short"].read_bytes()[:-1])
    files["emptied"].write_bytes(b"")
    files["replaced"].write_bytes(files["good"].read_bytes())
    entries = [Entry(case, digest, 1) for case, digest in digests.items()]
    with pytest.raises(TailLost) as raised:
        list(spill.read_tails(entries))
    assert raised.value.sessions == cases[1:]
    assert len(list(spill.read_tails(entries[:1]))) == 1


def test_dropping_a_tail_twice_is_no_error(tmp_path: Path) -> None:
    """Nor dropping one that never was."""
    spill = StateStore(tmp_path)
    spill.put_tail("s", 1, STATE)
    spill.drop_tail("s")
    spill.drop_tail("s")
    assert list(tmp_path.iterdir()) == []


def test_release_keeps_later_rounds_and_one_state(tmp_path: Path) -> None:
    """Everything else goes."""
    spill = StateStore(tmp_path)
    for number in (1, 2, 3):
        spill.put_tail(f"{number}/c/edge", number, STATE)
        spill.hold(f"state {number}", STATE)
    spill.release(2, "state 2")
    assert list(spill.tail_bytes()) == ["3/c/edge"]
    assert [spill.holds(f"state {n}") for n in (1, 2, 3)] == [False, True, False]


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 100])
def test_release_deletes_a_damaged_tail(tmp_path: Path, content: bytes) -> None:
    """What cannot be read cannot be merged, and must not end the run."""
    spill = StateStore(tmp_path)
    spill.put_tail("9/c/edge", 9, STATE)
    (path,) = tail_files(tmp_path)
    path.write_bytes(content)
    spill.release(1, "")
    assert tail_files(tmp_path) == []


def test_an_unfinished_file_is_not_a_tail(tmp_path: Path) -> None:
    """A process that dies while writing leaves nothing that could be merged."""
    spill = StateStore(tmp_path)
    digest = spill.put_tail("s", 1, STATE)
    (path,) = tail_files(tmp_path)
    path.rename(path.with_suffix(".unfinished"))
    with pytest.raises(TailLost):
        list(spill.read_tails([Entry("s", digest, 1)]))


def test_tails_are_read_one_at_a_time(tmp_path: Path) -> None:
    """In the order asked for; a later file is not opened before its turn."""
    spill = StateStore(tmp_path)
    digests = {
        str(value): spill.put_tail(str(value), 1, {"w": np.array([float(value)])})
        for value in range(3)
    }
    weights = {"2": 5, "0": 7, "1": 9}
    tails = spill.read_tails(Entry(s, digests[s], w) for s, w in weights.items())
    state, weight = next(tails)
    assert (state["w"].tolist(), weight) == ([2.0], 5)
    spill.drop_tail("1")
    assert next(tails)[1] == 7
    with pytest.raises(TailLost, match="tails of 1 ") as lost:
        next(tails)
    assert lost.value.sessions == ("1",)


def test_what_is_merged_is_what_was_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes after its bytes were read changes nothing that is merged."""
    spill = StateStore(tmp_path)
    digest = spill.put_tail("s", 1, {"w": np.ones(3)})
    (path,) = tail_files(tmp_path)
    content = path.read_bytes()

    def changing(state: Mapping[str, Any]) -> str:
        found = state_digest(state)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return found

    monkeypatch.setattr(state_store, "state_digest", changing)
    ((state, _),) = spill.read_tails([Entry("s", digest, 1)])
    assert state["w"].tolist() == [1.0] * 3
    with pytest.raises(TailLost):
        list(spill.read_tails([Entry("s", digest, 1)]))


def test_a_tail_is_gone_before_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are added, too: an edge has room for one."""
    spill = StateStore(tmp_path)
    entries = [
        Entry(name, spill.put_tail(name, 1, {"v": np.ones(9), "w": np.ones(9)}), 1)
        for name in ("1", "2", "3")
    ]
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []
    read = StateStore.read_tail

    def noting(store: StateStore, session: str) -> Any:
        counts.append(sum(array() is not None for array in alive))
        state = read(store, session)
        alive.append(weakref.ref(state["v"]))
        return state

    monkeypatch.setattr(StateStore, "read_tail", noting)
    sums = add_states(spill.read_tails(entries))
    assert sums["v"].high.tolist() == [3.0] * 9
    assert counts == [0, 0, 0]
    kept = list(spill.read_tails(entries))  # Planted: somebody keeps them.
    assert counts[3:] == [0, 1, 2]
    del kept
