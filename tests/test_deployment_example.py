"""The deployment example: true processes, both APIs, with and without TLS."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "deployment"
ROUTES = {
    "device-0": "whole",
    "device-1": "device[:7] > edge[7:]",
    "device-2": "device[:1] > edge[1:]",
}


def test_no_index_is_asked_for_the_package() -> None:
    """Its name is free there: whoever takes it could run code on every machine."""
    project = (EXAMPLE / "pyproject.toml").read_text("utf-8")
    named = [line for line in project.splitlines() if not line.startswith("#")]
    assert "flwr-smartsplit" not in "".join(named)
    script = (EXAMPLE / "deploy.py").read_text("utf-8")
    assert "--disable-runtime-dependency-installation" in script
    assert "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION" in script


@pytest.mark.slow
def test_it_trains_over_both_apis_with_and_without_tls(tmp_path: Path) -> None:
    """The routes that its page promises, the same result, and no process left."""
    found = {}
    for name, words in {
        "message": ["--insecure"],
        "legacy": ["--api", "legacy"],
    }.items():
        journal = tmp_path / f"{name}.jsonl"
        options = ["--rounds", "2", "--journal", str(journal), *words]
        run = subprocess.run(
            [sys.executable, str(EXAMPLE / "deploy.py"), *options],
            cwd=tmp_path,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(EXAMPLE.parents[1]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
            check=False,
        )
        assert run.returncode == 0, run.stdout[-3000:]
        pids = [int(pid) for pid in re.findall(r"\(pid (\d+)\)", run.stdout)]
        assert len(pids) == 5
        assert not any(map(psutil.pid_exists, pids))
        rows = [json.loads(line) for line in journal.read_text("utf-8").splitlines()]
        trained = [r for r in rows if r["kind"] == "client" and r["phase"] == "train"]
        assert {r["client_key"]: r["route"] for r in trained} == ROUTES
        assert {r["status"] for r in trained} == {"accepted"}
        found[name] = [(r["round"], r["client_key"], r["loss"]) for r in trained]
    assert found["message"] == found["legacy"]
