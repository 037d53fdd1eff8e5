"""The matrix of versions names each corner that fails, and fails with it."""

import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests import matrix


@pytest.mark.parametrize(
    ("results", "expected", "status"),
    [
        (["passed: 7", "passed: 7"], "one: passed: 7", 0),
        (["passed: 7", "FAILED with 3.13"], "failed: two", 1),
        (["not installed", "passed: 7"], "failed: one", 1),
        (["skipped: no Python", "passed: 7"], "one: skipped: no Python", 0),
        (["skipped: no Python", "skipped: no disk"], "two: skipped: no disk", 1),
    ],
)
def test_a_corner_that_fails_is_named(monkeypatch, capsys, results, expected, status):
    monkeypatch.delenv("CORNERS", raising=False)
    corners = [matrix.Corner(name, "3.11") for name in ("one", "two")]
    left = iter(results)
    monkeypatch.setattr(matrix, "CORNERS", corners)
    monkeypatch.setattr(matrix, "outcome", lambda corner: next(left))
    assert matrix.main() == status
    assert expected in capsys.readouterr().out


def test_an_unknown_corner_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("CORNERS", "newest oldets")
    assert matrix.main() == 1
    assert capsys.readouterr().out.startswith("no corner oldets; there is oldest,")


def test_a_corner_keeps_what_it_compiles(monkeypatch, tmp_path):
    """Pip compiles nothing: each process would compile torch, for 20 s of a CPU."""
    code = "import sys; sys.exit(sys.dont_write_bytecode)"
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert matrix.run(sys.executable, "-c", code, log=tmp_path / "log")


def test_the_oldest_corner_takes_the_lowest_versions_that_the_package_allows():
    project = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text())["project"]
    (oldest,) = (each for each in matrix.CORNERS if each.name == "oldest")
    assert project["requires-python"] == f">={oldest.python}"
    pinned = {pin.name: pin.specifier for pin in map(Requirement, oldest.pins)}
    for wanted in map(Requirement, project["dependencies"]):
        lowest = [each.version for each in wanted.specifier if each.operator == ">="]
        if wanted.name != "ray":  # Flower names the only one.
            assert all(version in pinned[wanted.name] for version in lowest)


def test_the_suite_exists():
    assert [file for file in matrix.SUITE if not (matrix.ROOT / file).exists()] == []
