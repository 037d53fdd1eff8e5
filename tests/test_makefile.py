"""What ``make`` installs, and that ``make test`` fails if anything does."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {n: v for n, v in os.environ.items() if not n.startswith("MAKE")}
    command = ["make", f"--makefile={ROOT / 'Makefile'}", *words]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("target", ["install", "test", "test-gpu"])
def test_make_installs_the_named_versions(target):
    done = make("--dry-run", "VENV=no-such-venv", target)
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a folder whose environment has tools that do nothing but succeed."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", ".venv/.installed"):
        (tmp_path / name).touch()
    for name in ("ruff", "mypy", "mkdocs", "python"):
        give(tmp_path, name, "echo all is well with $0")
    give(tmp_path, "python", "sleep 0.2; echo 7 passed")
    return tmp_path


def give(project: Path, tool: str, script: str) -> None:
    path = project / ".venv" / "bin" / tool
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("target", ["test", "test-all"])
def test_the_tests_have_the_last_word_where_nothing_fails(project, target):
    done = make(target, folder=project)
    assert (done.returncode, done.stdout) == (0, "7 passed\n")


def test_checks_that_end_after_the_tests_are_waited_for(project):
    give(project, "mkdocs", "sleep 0.5; echo a broken link; exit 1")
    done = make("test", folder=project)
    assert done.returncode != 0
    assert done.stdout.splitlines()[:2] == [
        "7 passed",
        "all is well with .venv/bin/ruff",
    ]
    assert "a broken link" in done.stdout


@pytest.mark.parametrize("tool", ["ruff", "mypy", "mkdocs", "python"])
def test_whatever_fails_is_shown_and_fails_the_whole(project, tool):
    give(project, tool, f"echo {tool} is not pleased; exit 1")
    done = make("test", folder=project)
    assert done.returncode != 0
    assert f"{tool} is not pleased" in done.stdout
