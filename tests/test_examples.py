"""The examples run as their first line says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.ray
def test_the_quickstart_runs_and_learns(tmp_path: Path) -> None:
    """Costs are shown, three of four clients take part, and the model learns."""
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "whole" in run.stdout
    journal = (tmp_path / "out" / "example.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in journal]
    rounds = [row for row in rows if row["kind"] == "round"]
    assert [row["accepted"] for row in rounds] == [3] * 5
    losses = [row["loss"] for row in rows if row.get("status") == "accepted"]
    assert losses[-1] < losses[0] / 2
