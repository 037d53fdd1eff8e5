"""Each row of docs/support.md has a test of its name, and each such test a row."""

import re
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "support.md"

FILES = [
    f for f in Path(__file__).parent.glob("test_support*.py") if f != Path(__file__)
]
ROW = re.compile(r"^\| .* \| (?:yes|refused) \| .* \| `(test_\w+)` \|$", re.MULTILINE)

TEST = re.compile(r"^def (test_\w+)\(", re.MULTILINE)


def rows() -> Iterator[str]:
    """List the tests that the page names."""
    yield from ROW.findall(PAGE.read_text(encoding="utf-8"))


def missing(named: list[str], defined: set[str]) -> list[str]:
    """List rows without a test, and tests without a row."""
    return sorted(set(named) ^ defined)


def test_each_row_has_a_test_and_each_test_a_row() -> None:
    """And a planted row without one is seen."""
    defined = {
        name
        for file in FILES
        for name in TEST.findall(file.read_text(encoding="utf-8"))
    }
    named = list(rows())
    assert missing(named, defined) == []
    assert missing([*named, "test_of_nothing"], defined) == ["test_of_nothing"]
