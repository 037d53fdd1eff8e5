"""Widths: which shares of the channels are offered, in which order."""

from typing import Any

import pytest

from flwr_smartsplit import VariantRequest, Whole, Widths
from flwr_smartsplit.types import WHOLE, ChannelGroup
from tests.plan.profiles import device

GROUPS = (
    ChannelGroup(name="a", size=4, axes=()),
    ChannelGroup(name="b", size=8, multiple=4, axes=()),
)


def request(round_number: int = 1) -> VariantRequest:
    """Ask for one device."""
    return VariantRequest(device=device("c0"), round_number=round_number, groups=GROUPS)


def kept(rule: Any, round_number: int = 1) -> list[Any]:
    """List what is kept of both groups, variant by variant."""
    return [tuple(v.kept.values()) for v in rule.offered(request(round_number))]


def test_the_widest_is_offered_first() -> None:
    """In every round the first channels, as in HeteroFL."""
    rule = Widths((1.0, 0.5, 0.25))
    names = [variant.name for variant in rule.offered(request())]
    assert names == ["whole", "width 0.5", "width 0.25"]
    assert kept(rule) == [(), ((0, 1), (0, 1, 2, 3)), ((0,), (0, 1, 2, 3))]
    assert kept(rule) == kept(rule, round_number=7)


def test_rolling_windows_move_by_one_run_a_round() -> None:
    """As in FedRolex; where they end, they begin again."""
    rule = Widths((0.5,), roll=True)
    assert kept(rule, 1) == [((0, 1), (0, 1, 2, 3))]
    assert kept(rule, 2) == [((1, 2), (4, 5, 6, 7))]
    assert kept(rule, 4) == [((0, 3), (4, 5, 6, 7))]
    assert kept(rule, 5) == kept(rule, 1)


def test_rates_that_keep_the_same_are_offered_once() -> None:
    """Under the name of the largest."""
    rule = Widths((0.9, 0.8, 0.5, 0.4))
    names = [variant.name for variant in rule.offered(request())]
    assert names == ["whole", "width 0.5"]


def test_the_scaler_is_the_variants() -> None:
    """Nobody else need know the rule."""
    assert all(v.is_scaled for v in Widths((0.5, 0.25)).offered(request()))
    assert not any(v.is_scaled for v in Widths((0.5,), scale=False).offered(request()))


def test_by_default_the_whole_model_is_offered() -> None:
    """The neutral value."""
    assert Whole().offered(request()) == (WHOLE,)


@pytest.mark.parametrize(
    "rates", [(), (0.5, 0.5), (0.25, 0.5), (1.5,), (0.0,), ("a",), (True,)]
)
def test_rates_fall_within_0_and_1(rates: Any) -> None:
    """Else the widest that fits is not what is trained."""
    with pytest.raises(ValueError, match=r"give (falling shares|a number)"):
        Widths(rates)
