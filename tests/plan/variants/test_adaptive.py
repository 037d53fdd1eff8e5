"""Adaptive and deadline widths: what is recorded, weighed and chosen, by hand."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest

from flwr_smartsplit import (
    AdaptiveWidths,
    ClientOutcome,
    DeadlineWidths,
    RoundOutcome,
    VariantRequest,
)
from flwr_smartsplit.types import WHOLE, ChannelGroup, Variant, width_of
from tests.plan.profiles import device

GROUPS = (ChannelGroup(name="a", size=16, axes=()),)
RATES = AdaptiveWidths.PUBLISHED_RATES
EXACT = AdaptiveWidths(rates=RATES, window=0, delay=0, scale=1.0)


def outcome(
    round_number: int, fisher: Mapping[str, float], **changes: Any
) -> RoundOutcome:
    """End a round in which clients reported these; rounds take them a second."""
    facts: dict[str, Any] = {
        "variant": WHOLE,
        "num_examples": 1,
        "loss": 2.0,
        "seconds": 1.0,
        **changes,
    }
    clients = {
        key: ClientOutcome(metrics={"fisher": value}, **facts)
        for key, value in fisher.items()
    }
    return RoundOutcome(
        round_number=round_number,
        clients=clients,
        state={},
        groups=GROUPS,
        seconds_of=lambda *_: 1.0,
    )


def after(rule: AdaptiveWidths, *rounds: Mapping[str, float], **changes: Any) -> Any:
    """Return what a rule remembers of rounds, from the first one on."""
    memory = None
    for number, fisher in enumerate(rounds, start=1):
        told = replace(outcome(number, fisher, **changes), memory=memory)
        memory = rule.learned(told)
    return memory


def names(rule: Any, memory: Any = None, seconds: Any = lambda _: 1.0) -> list[str]:
    """Name what client ``a`` is offered."""
    request = VariantRequest(
        device=device("a"),
        round_number=9,
        groups=GROUPS,
        memory=memory,
        seconds_of=seconds,
    )
    return [variant.name for variant in rule.offered(request)]


@pytest.mark.parametrize(
    ("weight", "rate"),
    [
        *((2.0, 1.0), (0.8, 1.0), (0.79999, 0.5), (0.6, 0.5), (0.59999, 0.25)),
        *((0.4, 0.25), (0.39999, 0.125), (0.2, 0.125), (0.19999, 0.0625), (0, 0.0625)),
    ],
)
def test_the_published_thresholds_choose_a_rate(weight: float, rate: float) -> None:
    """At equality the wider one."""
    assert RATES[EXACT.chosen(weight)] == rate


def test_utilities_are_the_published_formula() -> None:
    """Examples, the root of the proxy, and time: 72 x sqrt(0.01) x 20 / 4 / 50."""
    rule = AdaptiveWidths.published(delay=0)
    memory = after(rule, {"a": 0.01}, num_examples=72, seconds=4.0)
    assert memory["weights"]["a"] == pytest.approx(72 * 0.1 * 20 / 4 / 50)
    assert names(rule, memory)[0] == "width 0.5"
    early = after(AdaptiveWidths.published(), {"a": 0.01}, num_examples=72, seconds=4.0)
    assert early["weights"]["a"] == pytest.approx(72 * 1e-5 * 20 / 4 / 50)


def test_the_window_is_some_rounds_around_one_some_rounds_ago() -> None:
    """After round 6 with a delay of 3 and one on either side: rounds 2, 3 and 4."""
    rule = AdaptiveWidths(window=1, delay=3, scale=1.0)
    rounds = [{"a": float(value)} for value in (1, 2, 4, 9, 100, 1000)]
    memory = after(rule, *rounds)
    assert memory["weights"]["a"] == pytest.approx(5.0**0.5)
    assert after(rule, *rounds[:4])["weights"]["a"] == pytest.approx(1e-5)
    assert after(rule, *rounds[:5])["weights"]["a"] == pytest.approx((7 / 3) ** 0.5)


def test_an_aliased_window_is_another_one() -> None:
    """The authors' code: each record is the latest; the planted error of the above."""
    rule = AdaptiveWidths(window=1, delay=3, scale=1.0, has_aliased_window=True)
    rounds = [{"a": float(value)} for value in (1, 2, 4, 9, 100, 1000)]
    assert after(rule, *rounds)["weights"]["a"] == pytest.approx(1000**0.5)


def test_dividing_in_the_loop_makes_less_of_the_window() -> None:
    """Of 2 p + 1 equal records F, F (1 - w ** -w) / (w - 1): 0.25 F at p = 2."""
    rule = AdaptiveWidths(window=2, delay=2, scale=1.0, divides_in_loop=True)
    memory = after(rule, *[{"a": 4.0}] * 5)
    expected = 4.0 * (1 - 5.0**-5) / 4
    assert memory["weights"]["a"] == pytest.approx(expected**0.5)


def test_the_scale_is_the_largest_utility_of_the_first_full_window() -> None:
    """From then on it stays."""
    rule = AdaptiveWidths(window=0, delay=1)
    memory = after(rule, {"a": 4.0, "b": 1.0})
    assert (memory["scale"], memory["weights"]["a"]) == (None, 0.0)
    memory = after(rule, {"a": 4.0, "b": 1.0}, {"a": 16.0, "b": 0.25})
    assert (memory["scale"], memory["weights"]) == (2.0, {"a": 1.0, "b": 0.5})
    memory = after(rule, {"a": 4.0}, {"a": 16.0}, {"a": 1.0})
    assert memory["weights"]["a"] == 2.0


def test_time_is_of_the_full_width_or_of_the_last_one() -> None:
    """Of a narrow client the full time is predicted, and the last one was measured."""
    narrow = width_of(GROUPS, 0.5, is_scaled=True)
    full = after(EXACT, {"a": 1.0}, variant=narrow, seconds=0.25)
    last = replace(EXACT, time_of="last")
    assert full["weights"]["a"] == 1.0
    assert after(last, {"a": 1.0}, variant=narrow, seconds=0.25)["weights"]["a"] == 4.0


def test_losses_may_stand_for_gradients() -> None:
    """Then clients need not report anything more."""
    rule = replace(EXACT, efficiency="loss")
    assert not rule.wants_fisher
    assert EXACT.wants_fisher
    assert after(rule, {"a": 100.0})["weights"]["a"] == 2.0


@pytest.mark.parametrize("value", [nan, inf])
def test_what_is_not_finite_is_not_recorded(value: float) -> None:
    """The last number that was one stands; without any, nothing is to be learned."""
    memory = after(EXACT, {"a": 4.0}, {"a": value})
    assert memory["weights"]["a"] == 2.0
    assert after(EXACT, {"a": value})["weights"]["a"] == 0.0


def test_no_gradient_and_endless_rounds_mean_the_narrowest() -> None:
    """Whoever has nothing to learn, or never ends."""
    for memory in (after(EXACT, {"a": 0.0}), after(EXACT, {"a": 1.0}, seconds=inf)):
        assert memory["weights"]["a"] == 0.0
        assert names(EXACT, memory) == ["width 0.0625"]


def test_who_was_away_counts_by_what_came_before() -> None:
    """A client that is seen in a few rounds only."""
    rule = AdaptiveWidths(window=0, delay=2, scale=1.0)
    rounds: list[Mapping[str, float]] = [{"a": 9.0, "b": 1.0}, *[{"b": 1.0}] * 8]
    assert after(rule, *rounds)["weights"]["a"] == 3.0


def test_old_records_go() -> None:
    """Memory is that of a window, whatever the number of rounds."""
    rule = AdaptiveWidths(window=1, delay=3)
    memory = after(rule, *[{"a": 1.0}] * 50)
    assert len(memory["clients"]["a"]["records"]) <= 3 + 2 + 1 + 1


def test_the_wanted_width_is_offered_first_and_narrower_ones_after() -> None:
    """Never a wider one; before a window is full, the narrowest."""
    rule = AdaptiveWidths(rates=(1.0, 0.5, 0.25), window=0, delay=0, scale=1.0)
    assert names(rule, after(rule, {"a": 1.0})) == ["whole", "width 0.5", "width 0.25"]
    assert names(rule, after(rule, {"a": 0.25})) == ["width 0.5", "width 0.25"]
    assert names(rule) == ["width 0.25"]


def test_whose_time_nobody_knows_goes_by_memory_alone() -> None:
    """As with plain widths."""
    rule = AdaptiveWidths(rates=(1.0, 0.5))
    assert names(rule, seconds=lambda _: None) == ["whole", "width 0.5"]
    blind = replace(outcome(1, {"a": 1.0}, seconds=None), seconds_of=lambda *_: None)
    memory = rule.learned(replace(blind, clients=blind.clients))
    assert memory["weights"] == {}


def test_a_floor_keeps_some_clients_wide() -> None:
    """Those of the largest utility, so that every value is trained by somebody."""
    rule = replace(EXACT, floor=1)
    memory = after(rule, {"a": 1e-6, "b": 1e-8})
    assert names(rule, memory)[0] == "whole"
    assert names(replace(rule, floor=0), memory | {"wide": []}) == ["width 0.0625"]


def test_rates_that_keep_the_same_channels_are_one() -> None:
    """Under the name of the largest, also for who wants the smaller one."""
    rule = AdaptiveWidths(rates=(1.0, 0.06, 0.05), window=0, delay=0, scale=1.0)
    assert names(rule) == ["width 0.06"]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"window": 4}, {"window": -1}, {"delay": 1.5}, {"beta": -1.0}),
        *({"beta": nan}, {"seconds_target": 0.0}, {"scale": 0.0}, {"scale": "most"}),
        *({"efficiency": "hope"}, {"time_of": "next"}, {"floor": -1}),
        *({"rates": ()}, {"rates": (0.5, 1.0)}, {"rates": (1.5,)}),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    """By the argument and its value."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*: give"):
        AdaptiveWidths(**wrong)


def test_a_deadline_chooses_the_widest_that_ends_in_time() -> None:
    """At equality, too; the narrowest if none does, and all if nobody knows."""

    def seconds(variant: Variant) -> float:
        return {"whole": 8.0, "width 0.5": 4.0, "width 0.25": 2.0}[variant.name]

    rates = (1.0, 0.5, 0.25)
    assert names(DeadlineWidths(4.0, rates), seconds=seconds) == [
        "width 0.5",
        "width 0.25",
    ]
    assert names(DeadlineWidths(1.0, rates), seconds=seconds) == ["width 0.25"]
    assert len(names(DeadlineWidths(1.0, rates), seconds=lambda _: None)) == len(rates)
    with pytest.raises(ValueError, match="seconds is 0"):
        DeadlineWidths(0)
