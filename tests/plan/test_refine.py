"""What an edge makes of speed and importance, worked by hand; errors are planted."""

from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.plan import refine
from flwr_smartsplit.plan.refine import (
    RULES,
    Progress,
    advised,
    changed,
    cohort_of,
    importance_of,
    updated,
)
from flwr_smartsplit.types import Advice, Cohort, Wish

COHORT = Cohort(median_step_seconds=2.0, median_importance=50.0, low_importance=20.0)
"""Slow is above 3 s, fast below 1.4 s."""


def after(
    *steps: float | None,
    loss: float = 1.0,
    num_examples: int = 60,
    importance: float = 0.0,
) -> Progress:
    """Take in steps of four examples, given their seconds."""
    progress = Progress(num_examples=num_examples, importance_before=importance)
    for seconds in steps:
        progress = updated(
            progress, COHORT, loss=loss, num_examples=4, step_seconds=seconds
        )
    return progress


# --- importance and cohort ------------------------------------------------------------


def test_importance_grows_with_examples_and_losses() -> None:
    """Losses 1 and 7 on 4 examples each: the mean square is 25, so 10 x 5."""
    progress = Progress(num_examples=10)
    for loss in (1.0, 7.0):
        progress = updated(
            progress, COHORT, loss=loss, num_examples=4, step_seconds=None
        )
    assert progress.importance == 50.0
    assert replace(progress, importance_before=100.0).importance == 85.0


def test_a_larger_batch_counts_for_more() -> None:
    """Loss 1 on 3 examples and 5 on one: the mean square is 28 / 4."""
    progress = Progress(num_examples=1)
    for loss, size in ((1.0, 3), (5.0, 1)):
        progress = updated(
            progress, COHORT, loss=loss, num_examples=size, step_seconds=None
        )
    assert progress.importance == pytest.approx(7**0.5)


def test_importance_in_a_round_ends_as_the_strategy_works_it_out() -> None:
    """From the same losses, by the same average."""
    progress = after(1.0, 1.0, loss=3.0, importance=40.0)
    assert progress.importance == importance_of(60, 3.0, before=40.0)
    assert progress.importance == pytest.approx(0.7 * 40 + 0.3 * 180)


@pytest.mark.parametrize("loss", [nan, inf])
def test_a_loss_that_is_no_number_leaves_importance_as_it_was(loss: float) -> None:
    """Else one client could end the run."""
    assert importance_of(60, loss, before=40.0) == 40.0
    assert importance_of(60, loss) == 0.0


def test_a_cohort_is_medians_and_a_quartile() -> None:
    """Of what is known; the order does not matter."""
    pairs = [(9.0, 10.0), (None, 20.0), (1.0, 30.0), (2.0, None), (4.0, 40.0)]
    pairs += [(nan, None), (inf, None), (0.0, None), (None, nan), (None, inf)]
    expected = Cohort(
        median_step_seconds=3.0, median_importance=25.0, low_importance=17.5
    )
    assert cohort_of(pairs) == cohort_of(reversed(pairs)) == expected


@pytest.mark.parametrize(
    "pairs",
    [[], [(1.0, None)], [(None, 1.0), (None, None)], [(0.0, 1.0)], [(2.0, nan)]],
)
def test_there_is_no_cohort_without_times_and_importances(
    pairs: list[tuple[float | None, float | None]],
) -> None:
    """Then nobody is refined."""
    assert cohort_of(pairs) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"median_step_seconds": 0.0},
        {"median_step_seconds": nan},
        {"median_step_seconds": inf},
        {"low_importance": -1.0},
        {"low_importance": 51.0},
        {"median_importance": inf},
    ],
)
def test_a_cohort_of_nonsense_is_refused(changes: dict[str, float]) -> None:
    """With the number."""
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(COHORT, **changes)


# --- each rule ------------------------------------------------------------------------

CASES: dict[str, tuple[float, float, Wish | None]] = {
    "slow and important": (3.1, 60.0, Wish.EARLIER),
    "slow and just important": (3.1, 50.0, Wish.EARLIER),
    "slow and neither": (3.1, 40.0, None),
    "slow and just unimportant": (3.1, 20.0, Wish.RELEASE),
    "slow and unimportant": (3.1, 10.0, Wish.RELEASE),
    "just not slow": (3.0, 60.0, None),
    "just not slow, unimportant": (3.0, 10.0, None),
    "as all": (2.0, 60.0, None),
    "just not fast": (1.4, 60.0, None),
    "fast and important": (1.3, 60.0, Wish.LATER),
    "fast and unimportant": (1.3, 10.0, Wish.LATER),
}


def wish_of(seconds: float, importance: float) -> Wish | None:
    """Say what is advised after two such steps."""
    advice = advised(after(seconds, seconds, loss=importance / 60), COHORT)
    return None if advice is None else advice.wish


@pytest.mark.parametrize("case", CASES)
def test_what_is_advised_is_what_the_rules_say(case: str) -> None:
    """At their thresholds too: 1.5 and 0.7 of the median, half, and a quarter."""
    seconds, importance, wish = CASES[case]
    assert wish_of(seconds, importance) == wish


PLANTED = {
    "slow_factor": ("slow_factor", 1.4),
    "slow_factor, high": ("slow_factor", 1.6),
    "fast_factor": ("fast_factor", 0.64),
    "fast_factor, high": ("fast_factor", 0.71),
    "patience_steps": ("patience_steps", 3),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_wrong_threshold_is_seen(error: str) -> None:
    """Planted: each number is a little off, and some case tells."""
    name, value = PLANTED[error]
    rules = replace(RULES, **{name: value})
    wrong = []
    for case, (seconds, importance, wish) in CASES.items():
        progress = Progress(num_examples=60)
        for _ in range(2):
            progress = updated(
                progress,
                COHORT,
                loss=importance / 60,
                num_examples=4,
                step_seconds=seconds,
                rules=rules,
            )
        advice = advised(progress, COHORT, rules)
        if (None if advice is None else advice.wish) != wish:
            wrong.append(case)
    assert wrong


@pytest.mark.parametrize(
    "cohort",
    [
        replace(COHORT, median_importance=51.0),
        replace(COHORT, low_importance=19.0),
        replace(COHORT, median_importance=39.0),
        replace(COHORT, low_importance=41.0),
    ],
)
def test_a_wrong_cohort_is_seen(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: half and quarter are a little off."""
    monkeypatch.setitem(globals(), "COHORT", cohort)
    wishes = {case: wish_of(seconds, imp) for case, (seconds, imp, _) in CASES.items()}
    assert wishes != {case: wish for case, (_, _, wish) in CASES.items()}


def test_an_advice_says_why() -> None:
    """With the numbers on both sides."""
    assert advised(after(4.0, 4.0), COHORT) == Advice(
        Wish.EARLIER,
        "the edge finds it slow: 4 s a step, the median is 2 s; its importance is 60, "
        "the median is 50",
    )


# --- patience -------------------------------------------------------------------------


def test_one_step_is_not_enough() -> None:
    """Nor are two that speak for different things: 0.7 x 1.3 + 0.3 x 8 is above 3."""
    assert advised(after(4.0), COHORT) is None
    assert advised(after(1.3, 8.0), COHORT) is None
    assert advised(after(1.3, 8.0, 8.0), COHORT) is not None


def test_the_seconds_are_a_moving_average() -> None:
    """One long step of 5 s among steps of 2 s is 0.7 x 2 + 0.3 x 5."""
    assert after(2.0, 5.0).step_seconds == pytest.approx(2.9)
    assert advised(after(2.0, 5.0, 2.0), COHORT) is None


@pytest.mark.parametrize("seconds", [None, 0.0, -1.0, nan, inf])
def test_a_time_that_is_none_changes_nothing(seconds: float | None) -> None:
    """A device that does not know, or talks nonsense, is left alone."""
    assert after(seconds, seconds).step_seconds is None
    assert advised(after(seconds, seconds, seconds), COHORT) is None


@pytest.mark.parametrize("loss", [nan, inf, 1e300])
def test_a_loss_that_is_no_number_releases_nobody(loss: float) -> None:
    """What it means is for the seal to say."""
    advice = advised(after(4.0, 4.0, loss=loss), COHORT)
    assert advice is None or advice.wish is Wish.EARLIER


def test_after_a_change_all_is_looked_at_anew() -> None:
    """Times of the cut before do not count, and four steps must pass."""
    progress = changed(after(4.0, 4.0))
    assert progress.step_seconds is None
    assert progress.importance == 60.0
    advice = []
    for _ in range(5):
        progress = updated(progress, COHORT, loss=1.0, num_examples=4, step_seconds=4.0)
        advice.append(advised(progress, COHORT) is not None)
    assert advice == [False, False, False, True, True]


STEPS = st.lists(
    st.tuples(
        st.none() | st.floats(0.1, 9.0),
        st.floats(0.0, 3.0),
        st.booleans(),
    ),
    max_size=60,
)


def changes_of(steps: list[tuple[float | None, float, bool]]) -> list[int]:
    """List after how many steps there was advice; budgets move the cut, too."""
    progress, advice_at = Progress(num_examples=30), []
    last = -RULES.spacing_steps
    for index, (seconds, loss, moves) in enumerate(steps):
        progress = updated(
            progress, COHORT, loss=loss, num_examples=4, step_seconds=seconds
        )
        if advised(progress, COHORT) is not None:
            advice_at.append(index - last)
            last, progress = index, changed(progress)
        elif moves:
            last, progress = index, changed(progress)
    return advice_at


@given(STEPS)
def test_no_two_changes_come_within_four_steps(
    steps: list[tuple[float | None, float, bool]],
) -> None:
    """Whatever the times and losses are, and whoever moves the cut besides."""
    assert min(changes_of(steps), default=4) >= RULES.spacing_steps == 4


def test_changes_that_come_too_close_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a change is forgotten."""
    monkeypatch.setitem(globals(), "changed", lambda progress: progress)
    assert min(changes_of([(4.0, 3.0, False)] * 9)) < RULES.spacing_steps


def test_another_average_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: more is forgotten."""
    monkeypatch.setattr(refine, "KEPT_FRACTION", 0.6)
    with pytest.raises(AssertionError):
        test_the_seconds_are_a_moving_average()


def test_an_edge_that_needs_no_relief_gives_no_work_away() -> None:
    """Whoever is fast stays as it is; whoever is slow is advised as ever."""
    ample = replace(COHORT, relieves_edge=False)
    for seconds, wishes in ((1.3, (Wish.LATER, None)), (9.0, (Wish.EARLIER,) * 2)):
        found = []
        for cohort in (COHORT, ample):
            progress = Progress(num_examples=10, importance_before=1e9)
            for _ in range(5):
                progress = updated(
                    progress, cohort, loss=1.0, num_examples=2, step_seconds=seconds
                )
            advice = advised(progress, cohort)
            found.append(None if advice is None else advice.wish)
        assert tuple(found) == wishes
