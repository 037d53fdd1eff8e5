"""Which cases of a test are for every day; ``make test-all`` runs the others too."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def daily(is_daily: Callable[..., bool], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Mark the cases as slow for which ``is_daily`` says no."""
    found = [
        pytest.param(*case, marks=() if is_daily(*case) else pytest.mark.slow)
        for case in cases
    ]
    assert any(not case.marks for case in found), "one case at least is for every day"
    return found
