"""Killed runs go on where they were: states, results and round numbers of one run."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr_smartsplit import Checkpoints
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower.checkpoints import files
from flwr_smartsplit.flower.checkpoints.checkpoints import newest
from tests.killed_runs import Ended, Killed, Kind, resumed, run_kind
from tests.tasks import differences

APIS = ("message", "legacy")
NOISY = [Kind(api, "FedAdam", with_noise=True) for api in APIS]
INNER = ("FedAvg", "FedAvgM", "FedYogi", "FedAdagrad")
KINDS = [*NOISY, *(Kind(api, inner) for api in APIS for inner in INNER)]
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=str)
ROUNDS = 3
KILLED_AT = 38  # In round 3: checkpoints 1 and 2 are there.


@cache
def whole(kind: Kind, num_rounds: int = ROUNDS) -> Ended:
    """Run it undisturbed."""
    return run_kind(kind, num_rounds=num_rounds)


def assert_same(made: Ended, wanted: Ended) -> None:
    """Compare bits, results, and what was planned after the last start."""
    assert differences(made.state, wanted.state) == []
    assert made.results == wanted.results
    assert made.plans.items() <= wanted.plans.items()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Leave what a process leaves that was killed in the third round."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.raises(Killed):
        run_kind(NOISY[0], Checkpoints(folder), num_rounds=ROUNDS, moment=KILLED_AT)
    assert files.numbers_in(folder) == [2, 1]
    return folder


@pytest.fixture
def folder(killed: Path, tmp_path: Path) -> Path:
    """Copy it."""
    return shutil.copytree(killed, tmp_path / "run")


def go_on(folder: Path, **changes: Any) -> Ended:
    """Resume the run that was killed."""
    resume = changes.pop("resume", True)
    options: dict[str, Any] = {"num_rounds": ROUNDS, **changes}
    return run_kind(NOISY[0], Checkpoints(folder, resume=resume), **options)


@pytest.mark.parametrize("kind", NOISY, ids=str)
def test_a_killed_run_ends_as_one_that_was_not(kind: Kind, tmp_path: Path) -> None:
    """With moments, a generator, learned speeds; Flower's results are complete."""
    made = resumed(kind, Checkpoints(tmp_path), [23], num_rounds=ROUNDS)
    assert_same(made, whole(kind))
    assert files.numbers_in(tmp_path) == [3, 2]


@pytest.mark.slow
@EACH_KIND
def test_at_twenty_random_moments(kind: Kind, tmp_path: Path) -> None:
    """Of a run of ten rounds, which is killed up to three times; at five of some."""
    chance = random.Random(str(kind))
    for index in range(20 if kind in NOISY else 5):
        moments = [chance.randrange(1, 140) for _ in range(chance.randrange(1, 4))]
        saved = Checkpoints(tmp_path / str(index), every=chance.choice([1, 1, 3]))
        made = resumed(kind, saved, moments, num_rounds=10)
        assert_same(made, whole(kind, 10))


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_a_process_that_is_really_killed(api: str, tmp_path: Path) -> None:
    """By SIGKILL, at several moments; another process goes on."""

    def start(num_rounds: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.killed_runs", api, str(tmp_path)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen([*command, num_rounds], env=env)

    assert start("10").wait() == 0
    undisturbed = dict(np.load(tmp_path / "final.npz"))
    (tmp_path / "final.npz").unlink()
    chance = random.Random(api)
    for last in (2, 5, 8):
        process = start("+10")
        while process.poll() is None:
            time.sleep(0.005)
            done = [int(path.name) for path in (tmp_path / "run").glob("[0-9]")]
            if max(done, default=0) >= last:
                time.sleep(chance.random() / 20)
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        assert process.returncode == -signal.SIGKILL
    assert start("+10").wait() == 0
    assert differences(dict(np.load(tmp_path / "final.npz")), undisturbed) == []


# --- what a checkpoint holds, and what shows without it -------------------------------


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    """Change a checkpoint, as if it had been written so."""
    run, arrays = files.read(folder, 2)
    files.delete(folder, 2)
    change(run)
    files.write(folder, 2, run, arrays)


@pytest.mark.parametrize(
    "forget",
    [
        lambda run: run["objects"]["strategy"]["attributes"].clear(),
        lambda run: run["objects"]["server_steps[1]"]["attributes"].pop("velocity"),
        lambda run: run["objects"]["server_steps[1]"]["attributes"].pop("chance"),
        lambda run: run["manager"]["dict"].pop(0),
        lambda run: run["results"]["dict"].pop(0),
    ],
    ids="moments velocity generator history results".split(),
)
def test_whatever_is_forgotten_shows(
    forget: Callable[[Any], None], folder: Path
) -> None:
    """Each part is needed, and the comparison above sees it."""
    rewrite(folder, forget)
    made = go_on(folder)
    with pytest.raises(AssertionError):
        assert_same(made, whole(NOISY[0]))


def test_a_server_step_goes_on_from_its_own_unrounded_result(tmp_path: Path) -> None:
    """FedAdam computes in float64 what is sent in float32."""
    kind = Kind("message", "FedAdam")
    run_kind(kind, Checkpoints(tmp_path), num_rounds=2)
    shutil.copytree(tmp_path, forgetful := tmp_path / "copy", ignore=_ignored)
    rewrite(
        forgetful,
        lambda run: run["objects"]["server_steps[0]"]["attributes"].clear(),
    )
    made = run_kind(kind, Checkpoints(tmp_path), num_rounds=3)
    assert_same(made, whole(kind, 3))
    made = run_kind(kind, Checkpoints(forgetful), num_rounds=3)
    assert differences(made.state, whole(kind, 3).state) != []


def _ignored(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "copy"]


def test_a_round_that_is_trained_as_another_shows(folder: Path) -> None:
    """Round numbers choose clients and shuffle: one less is another run."""
    rewrite(folder, lambda run: run.update(round=1))
    shutil.rmtree(folder / "1")
    (folder / "2").rename(folder / "1")
    made = go_on(folder)
    assert differences(made.state, whole(NOISY[0]).state) != []


def test_rounds_keep_their_numbers(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In Flower's log, in the journal, in what is evaluated; old ones are hidden."""
    caplog.set_level(logging.INFO, "flwr")
    journal: list[Any] = []
    assert_same(go_on(folder, on_row=(journal.append,)), whole(NOISY[0]))
    lines = [record.getMessage() for record in caplog.records]
    shown = [line for line in lines if line.startswith("[ROUND")]
    assert shown == ["[ROUND 3/3]"]
    assert f"Resumed from {folder / '2'}: rounds 1 to 2 are done" in lines
    assert {row["round"] for row in journal} == {3}


# --- which checkpoint is taken --------------------------------------------------------


SPOILED = {
    "is damaged: its SHA-256": [
        lambda path: flip(path / "state.safetensors", 5000),
        lambda path: change_a_number(path / "run.json"),
        lambda path: os.truncate(path / "state.safetensors", 300),
    ],
    "is damaged: it cannot be read": [
        lambda path: os.truncate(path / "run.json", 300),
        lambda path: (path / "run.json").unlink(),
        lambda path: (path / "run.json").write_text("[]"),
    ],
    "is of another task": [
        lambda path: rewrite(path.parent, lambda run: run.update(task="other"))
    ],
    "was written by another release": [
        lambda path: rewrite(path.parent, lambda run: run.update(format=1))
    ],
}


@pytest.mark.parametrize(
    ("why", "spoil"), [(why, each) for why in SPOILED for each in SPOILED[why]]
)
def test_a_bad_checkpoint_is_named_and_the_one_before_is_taken(
    why: str, spoil: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is moved aside, and never deleted."""
    good, _ = files.read(folder, 2)
    spoil(folder / "2")
    (folder / "3.unfinished").mkdir()
    found = newest(Checkpoints(folder), good["task"], good["settings"])
    assert found is not None
    assert found.number == 1
    assert f"The checkpoint {folder / '2'} is skipped: it {why}" in caplog.text
    assert f"rounds 2 are not of it, and now in {folder / 'set-aside-1'}" in caplog.text
    assert (folder / "set-aside-1/2").is_dir()
    assert not (folder / "3.unfinished").exists()


def test_a_run_goes_on_from_the_one_before(folder: Path) -> None:
    """A round more is trained anew."""
    os.truncate(folder / "2/state.safetensors", 300)
    made = go_on(folder)
    assert_same(made, whole(NOISY[0]))
    assert sorted(made.plans) == [2, 3]


def change_a_number(path: Path) -> None:
    """Leave it readable."""
    path.write_text(path.read_text().replace("0.1", "0.2", 1))


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)


def test_other_settings_are_refused_by_name(folder: Path) -> None:
    """They are ours, the inner strategy's, or a server step's."""
    with pytest.raises(SmartSplitError, match="seed is 7 there and 8 here"):
        go_on(folder, seed=8)
    with pytest.raises(
        SmartSplitError, match=r"strategy\['eta'\] is 0.1 there and 0.3"
    ):
        go_on(folder, eta=0.3)
    with pytest.raises(SmartSplitError, match=r"server_steps .* there and .* here"):
        go_on(folder, server_steps=())
    with pytest.raises(SmartSplitError, match="num_rounds=1, and the checkpoint 2"):
        go_on(folder, num_rounds=1)
    assert files.numbers_in(folder) == [2, 1]


def test_a_run_can_start_anew_or_must_be_resumed(folder: Path, tmp_path: Path) -> None:
    """Nothing that was saved is lost."""
    with pytest.raises(SmartSplitError, match="has no checkpoint of this task, and 0"):
        go_on(tmp_path / "empty", resume="required")
    assert_same(go_on(folder, resume=False), whole(NOISY[0]))
    assert files.numbers_in(folder / "set-aside-1") == [2, 1]
    ended = go_on(folder, resume="required")
    assert ended.plans == {}
    assert_same(ended, whole(NOISY[0]))


def test_a_full_disk_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is an error in the log, every time; nothing is left half."""

    def full(arrays: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    run_kind(Kind("message"), Checkpoints(tmp_path), num_rounds=2)
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "of round 1 cannot be written, and the run goes on: No space" in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"keep": 0}, {"keep": 1.5}, {"resume": "yes"}]
)
def test_senseless_numbers_are_refused(wrong: Any, tmp_path: Path) -> None:
    """Where they are given."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Checkpoints(tmp_path, **wrong)
