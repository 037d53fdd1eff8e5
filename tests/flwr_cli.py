"""``flwr run`` with a local SuperLink of its own, for tests."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Flower:
    """A home and a local SuperLink of their own.

    Parameters
    ----------
    environment : Mapping[str, str]
        What ``flwr`` runs with.
    home : Path
        The folder of both.
    """

    environment: Mapping[str, str]
    home: Path

    def flwr(self, *words: str, cwd: Path | None = None, attempts: int = 1) -> str:
        """Run ``flwr`` and return what it prints.

        The SuperLink stays in the folder where the first call started it, and apps
        leave their journals there.
        """
        for _ in range(attempts):
            run = subprocess.run(
                ["flwr", *words],
                cwd=self.home if cwd is None else cwd,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=400,
                check=False,
            )
            if run.returncode == 0:
                return run.stdout
        raise AssertionError(run.stdout[-3000:])

    def run(self, words: Sequence[str], cwd: Path) -> str:
        """Run an app by a command that begins with ``run``; return its log.

        Raises
        ------
        AssertionError
            If it did not finish well: ``flwr run`` itself returns 0 then, too.
        """
        log = self.flwr(*words, cwd=cwd)
        (run_id,) = re.findall(r"Successfully started run (\d+)", log)
        listed = self.flwr("list", "--run-id", run_id, "--format", "json")
        (run,) = json.loads(listed[listed.index("{") :])["runs"]
        assert run["status"] == "finished:completed", log[-3000:]
        return log


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """Prepare what ``flwr run`` needs, and end the SuperLink that it starts."""
    home = tmp_path_factory.mktemp("flower")
    tools = Path(sys.executable).parent
    # `flwr run` starts this in place of the true one, which then has the same pid.
    shim = home / "bin" / "flower-superlink"
    shim.parent.mkdir()
    pid_file = home / "superlink.pid"
    shim.write_text(
        f'#!/bin/sh\necho $$ > "{pid_file}"\nexec "{tools / shim.name}" "$@"\n'
    )
    shim.chmod(0o755)
    yield Flower(
        {
            **os.environ,
            "PATH": f"{shim.parent}:{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        },
        home,
    )
    if pid_file.exists():
        end(int(pid_file.read_text()))


def end(pid: int) -> None:
    """End a process that is nobody's child here, and those that it started."""
    try:
        os.killpg(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    for _ in range(100):
        try:
            os.killpg(pid, 0)
        except OSError:
            return
        time.sleep(0.1)
    os.killpg(pid, signal.SIGKILL)
