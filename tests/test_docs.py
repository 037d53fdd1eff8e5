"""The pages name files that exist; the API pages show every public name, rightly.

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

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "api"
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


# --- files ----------------------------------------------------------------------------

FILE_NAME = re.compile(
    r"(?<![\w/.{<-])((?:[\w-]+/)*[\w-]+\.(?:py|toml|jinja|txt|yml))\b"
)
READERS_OWN = {"mymodels.py", "like/this.py", "simulations/studies/even.py"}
"""Files that a page asks its reader to write, or that stand for any."""


def missing_files(text: str, known: list[str]) -> list[str]:
    """List the files that a page names and the repository does not have."""
    return [
        name
        for name in sorted(set(FILE_NAME.findall(text)) - READERS_OWN)
        if not any(path == name or path.endswith(f"/{name}") for path in known)
    ]


def files_of_the_repository() -> list[str]:
    """List every file below the folders that are kept, and at the root."""
    folders = ("flwr_smartsplit", "simulations", "examples", "tests", "docs", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    return [path.relative_to(ROOT).as_posix() for path in (*paths, *ROOT.glob("*.*"))]


def pages_that_speak_of_today() -> list[Path]:
    """List the pages, without those that tell of their day: decisions, changelog."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md")]
    pages += (ROOT / "docs").rglob("*.md")
    return [p for p in pages if "decisions" not in p.parts and p.stem != "CHANGELOG"]


def test_every_file_that_a_page_names_exists():
    known = files_of_the_repository()
    missing = {
        page.relative_to(ROOT).as_posix(): names
        for page in pages_that_speak_of_today()
        if (names := missing_files(page.read_text("utf-8"), known))
    }
    assert missing == {}


def test_a_file_that_is_not_there_is_seen():
    page = "Read `split/chain.py`, `split/gone.py` and gone.toml, not `a.b.py.c`."
    assert missing_files(page, ["flwr_smartsplit/split/chain.py"]) == [
        "gone.toml",
        "split/gone.py",
    ]
