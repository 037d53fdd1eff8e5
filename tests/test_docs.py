"""The API pages show every public name, and say nothing false of its arguments.

The site prints type and default of each argument. Of names that share a docstring's
line, it takes those of the first for all.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

import flwr_smartsplit

PAGES = Path(__file__).parents[1] / "docs" / "api"
SHOWN = [
    name
    for page in sorted(PAGES.glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
]
SHARED_LINE = re.compile(r"^\**\w+(?:, \**\w+)+(?= :|$)", re.MULTILINE)


def shared_line_problems(item: Callable[..., Any]) -> list[str]:
    """List the docstring's lines whose names differ in annotation or default."""
    parameters = inspect.signature(item).parameters
    problems = []
    for line in SHARED_LINE.findall(inspect.getdoc(item) or ""):
        known = [parameters[n] for n in line.split(", ") if n in parameters]
        if len({(str(p.annotation), str(p.default)) for p in known}) > 1:
            problems.append(line)
    return problems


def test_every_public_name_is_shown_once():
    shown = Counter(name.removeprefix("flwr_smartsplit.") for name in SHOWN)
    assert {name: shown[name] for name in flwr_smartsplit.__all__} == dict.fromkeys(
        flwr_smartsplit.__all__, 1
    )


@pytest.mark.parametrize("name", SHOWN)
def test_names_that_share_a_line_share_type_and_default(name):
    item = resolve_name(name)
    assert inspect.ismodule(item) or shared_line_problems(item) == []


def test_a_shared_line_with_two_defaults_is_seen():
    def planted(first: int = 0, second: int = 1, third: int = 1) -> None:
        """Do.

        Parameters
        ----------
        first, second : int
            Differ.
        second, third : int
            Do not differ.
        """

    assert shared_line_problems(planted) == ["first, second"]
