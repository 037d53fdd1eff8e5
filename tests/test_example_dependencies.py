"""Examples install nothing that a stranger could serve, and say what is missing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OURS = "flwr-smartsplit"
APPS = sorted(
    file.parent
    for file in ROOT.glob("examples/**/pyproject.toml")
    if file.parent.name != "before"
)


def names(file: str) -> set[str]:
    """Find what Flower would install for an app."""
    wanted = tomllib.loads(file)["project"]["dependencies"]
    return {Requirement(line).name for line in wanted}


def test_there_are_apps() -> None:
    """Else the tests below say nothing."""
    assert len(APPS) == 8


@pytest.mark.parametrize("app", APPS, ids=lambda app: app.name)
def test_no_app_names_a_package_that_no_index_has(app: Path) -> None:
    """Whoever registers the name could run code on each device."""
    text = (app / "pyproject.toml").read_text()
    assert OURS not in names(text)
    assert OURS in names(text.replace("dependencies = [", f'dependencies = ["{OURS}",'))


@pytest.mark.parametrize("app", APPS, ids=lambda app: app.name)
def test_each_says_how_to_install_it(app: Path) -> None:
    """Before anything else is imported."""
    (package,) = (file.parent.name for file in app.glob("*/__init__.py"))
    # Without the site's packages, as in an environment that lacks it.
    code = f"import sys; sys.path.insert(0, {str(app)!r}); import {package}"
    command = [sys.executable, "-I", "-S", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"{package} needs flwr_smartsplit in this environment" in run.stderr
    assert "pip install /path/to/flwr_smartsplit" in run.stderr
