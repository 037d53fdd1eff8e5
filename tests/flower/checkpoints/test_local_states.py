"""What stays on a device outlives its process, and fits the round that is resumed."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flwr_smartsplit import Checkpoints, Route
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.flower.checkpoints import files
from flwr_smartsplit.flower.checkpoints.local_states import LocalStates
from tests.flower.apps import message_app
from tests.killed_runs import Kind, resumed, run_kind
from tests.tasks import TASK, client_plan, differences, initial_state


def is_normalisation(name: str) -> bool:
    """BatchNorm stays local, as in FedBN."""
    return name.startswith("1.")


LOCAL = replace(TASK, is_local=is_normalisation)
OPTIONS: dict[str, Any] = {"task": LOCAL, "num_rounds": 3}
FEDAVG = Kind("message")
IN_TRAINING = 12 + 26  # A client of the third round has trained, another has not.


def app(folder: Path | None) -> Any:
    """Make clients with their files in one folder."""
    return partial(message_app, task=LOCAL, local_folder=folder)


def kept(folder: Path) -> dict[str, Any]:
    """Read the newest state of every client."""
    found = {}
    for path in sorted(folder.glob("*/*")):
        _, arrays = files.read(path, files.numbers_in(path)[0])
        found |= {f"{path.parent.name}/{name}": each for name, each in arrays.items()}
    return found


def test_local_state_is_that_of_the_round_that_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of the round in which the run was killed, which is trained again."""
    whole = run_kind(FEDAVG, apps=app(tmp_path / "whole"), **OPTIONS)
    local, saved = tmp_path / "local", Checkpoints(tmp_path / "run")
    made = resumed(FEDAVG, saved, [IN_TRAINING], apps=app(local), **OPTIONS)
    assert differences(made.state, whole.state) == []
    assert differences(kept(local), kept(tmp_path / "whole")) == []

    def newest(self: LocalStates, plan: Any, context: Any, *, is_train: bool) -> Any:
        del is_train
        return usual(self, plan, context, is_train=False)

    usual = LocalStates.read
    monkeypatch.setattr(LocalStates, "read", newest)
    local, saved = tmp_path / "newest", Checkpoints(tmp_path / "newest run")
    made = resumed(FEDAVG, saved, [IN_TRAINING], apps=app(local), **OPTIONS)
    assert differences(made.state, whole.state) != []


def test_state_that_is_lost_is_said_at_the_resumption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the clients' names; and the result shows that it is another.

    State in files is that in the context, and no other run's.
    """
    saved = Checkpoints(tmp_path / "run")
    made = resumed(FEDAVG, saved, [IN_TRAINING], apps=app(None), **OPTIONS)
    (said,) = [r.getMessage() for r in caplog.records if "is_local" in r.getMessage()]
    assert "is lost for 4 clients (c0, c1, c2, c3)" in said
    whole = run_kind(FEDAVG, apps=app(None), **OPTIONS)
    assert differences(made.state, whole.state) != []
    in_files = run_kind(FEDAVG, apps=app(tmp_path / "local"), **OPTIONS)
    assert differences(in_files.state, whole.state) == []
    again = run_kind(FEDAVG, apps=app(tmp_path / "local"), **OPTIONS)
    assert differences(again.state, whole.state) == []
    clients = (tmp_path / "local").iterdir()
    assert all(len(list(path.iterdir())) == 2 for path in clients)


def test_as_many_rounds_are_kept_as_may_be_resumed(tmp_path: Path) -> None:
    """One from before the oldest checkpoint, and all after it."""
    states = LocalStates(tmp_path, "a/b")
    plan = replace(client_plan(0, Route.whole(), initial_state()), lineage="run")
    for number, oldest in ((1, 0), (3, 0), (5, 2), (6, 4), (9, 7)):
        now = replace(plan, round_number=number, resumable_round=oldest)
        states.write(now, None, {"x": initial_state()["1.weight"] + number})
    (folder,) = tmp_path.glob("a_b-*/run")
    assert files.numbers_in(folder) == [9, 6]
    for number, is_train, wanted in ((9, True, 6), (9, False, 9), (6, True, None)):
        now = replace(plan, round_number=number)
        found = states.read(now, None, is_train=is_train)
        value = found["x"] - initial_state()["1.weight"] if found else None
        assert value is None if wanted is None else (value == wanted).all()
    (folder / "9/run.json").write_text("{}")
    with pytest.raises(InvalidTask, match=r"client 'a/b': its local state in .* damag"):
        states.read(replace(plan, round_number=9), None, is_train=False)
