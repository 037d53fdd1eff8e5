"""Folders of killed processes go at the next start; those in use stay."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flwr_smartsplit.edge.hosts import spill_folders
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.hosts.spill_folders import PREFIX, claim, delete_abandoned
from tests.tasks import TASK

HOLDING = """
import sys, time
from pathlib import Path
from flwr_smartsplit.edge.hosts.spill_folders import claim
lock = claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def other_process(folder: Path) -> "subprocess.Popen[str]":
    """Let another process use a folder."""
    command = [sys.executable, "-c", HOLDING, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_an_edge_reclaims_what_a_killed_process_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of a live one, of another program, or of a user."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = [tmp_path / f"{PREFIX}{name}" for name in ("dead", "live")]
    processes = [other_process(folder) for folder in folders]
    try:
        for folder in folders:
            (folder / "state.safetensors").write_bytes(b"0" * 100)
        others = [tmp_path / f"{PREFIX}scale-1", tmp_path / "of-a-user"]
        for folder in others:
            folder.mkdir()
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        edge = LocalEdge()
        first = edge.start(TASK)
        mine = tmp_path / f"{PREFIX}{first}"
        second = edge.start(TASK)
        assert mine.is_dir()
        assert [folder.exists() for folder in (*folders, *others)] == [
            False,
            True,
            True,
            True,
        ]
        edge.stop(first)
        edge.stop(second)
        assert sorted(tmp_path.iterdir()) == sorted([folders[1], *others])
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_folder_with_two_owners_stays_until_both_are_gone(tmp_path: Path) -> None:
    """An actor restarts in the folder that its strategy holds."""
    folder = tmp_path / f"{PREFIX}edge"
    first, second = claim(folder), claim(folder)
    first.close()
    delete_abandoned(tmp_path)
    assert folder.exists()
    second.close()
    delete_abandoned(tmp_path)
    assert not folder.exists()


def test_without_locks_a_live_folder_would_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: nobody locks."""

    def unlocked(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / spill_folders._LOCK).touch()

    unlocked(tmp_path / f"{PREFIX}live")
    delete_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []
