"""``smartsplit edge`` as a process of its own, to be killed and started again."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr_smartsplit import GrpcEdge
from flwr_smartsplit.edge.hosts.edge import Edge
from tests.edge.hosts.served import Authority
from tests.flwr_cli import ROOT, free_port

MODEL = "tests.tasks:build_task"


class EdgeProcess:
    """An edge with TLS and an admin secret, on a port that stays its own.

    Parameters
    ----------
    folder : Path
        For its files, which outlive it.
    words : Sequence[str]
        More options.
    """

    def __init__(
        self,
        folder: Path,
        *words: str,
        model: str = MODEL,
        name: str = "edge",
        authority: Authority | None = None,
    ) -> None:
        self.name = name
        self.port = free_port()
        self.authority = authority or Authority.make(folder / "certificates")
        certificate, key = self.authority.issue(name)
        self.secret_file = folder / f"{name}.secret"
        self.secret_file.write_text("s" * 64)
        self.words = [model, "--name", name, "--port", str(self.port)]
        self.words += ["--tls-certificate", str(certificate), "--tls-key", str(key)]
        self.words += ["--admin-secret-file", str(self.secret_file)]
        self.words += ["--spill", str(folder / name), *words]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> "EdgeProcess":
        """Start it, and wait until it is ready."""
        self.process = start(self.words)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert re.match(f"Edge '{self.name}' is ready at .*:{self.port} ", line), line
        return self

    def kill(self) -> None:
        """End it as a power cut does."""
        assert self.process is not None
        with self.process:
            self.process.kill()

    def stop(self) -> int:
        """End it as its machine's supervisor does; return its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with self.process:
            return self.process.wait(60)

    def edge(self, **options: Any) -> Edge:
        """Describe it for the strategy."""
        return GrpcEdge(
            f"localhost:{self.port}",
            name=self.name,
            root_certificates=self.authority.roots,
            admin_secret_file=self.secret_file,
            **options,
        )


def start(words: Sequence[str]) -> "subprocess.Popen[str]":
    """Start ``smartsplit edge`` as a user would."""
    return subprocess.Popen(
        [sys.executable, "-m", "flwr_smartsplit.cli", "edge", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
