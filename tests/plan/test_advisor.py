"""What an edge makes of speed and importance, worked by hand; errors are planted."""

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_smartsplit.plan.advisor import Progress, StragglerAdvisor, judged
from flwr_smartsplit.plan.selection import history
from flwr_smartsplit.plan.selection.history import importance_of
from flwr_smartsplit.types import Action, Advice, Cohort

COHORT = Cohort(median_step_seconds=2.0, median_importance=50.0, low_importance=20.0)
"""Slow is above 3 s, fast below 1.4 s."""


def judged_after(
    *steps: float | None,
    loss: float = 1.0,
    importance: float = 0.0,
    cohort: Cohort | None = None,
) -> tuple[Progress, Advice | None]:
    """Take in steps of four examples, given their seconds; return the last judgement.

    The client has 60 examples.
    """
    progress, advice = Progress(num_examples=60, importance_before=importance), None
    for seconds in steps:
        progress, advice = judged(
            progress, cohort or COHORT, loss=loss, num_examples=4, step_seconds=seconds
        )
    return progress, advice


def advised(*steps: float | None, **facts: Any) -> Advice | None:
    """Return what is advised after these steps."""
    return judged_after(*steps, **facts)[1]


def with_losses(num_examples: int, *losses_and_sizes: tuple[float, int]) -> Progress:
    """Take in steps of which only the losses are known."""
    progress = Progress(num_examples=num_examples)
    for loss, size in losses_and_sizes:
        progress, _ = judged(
            progress, COHORT, loss=loss, num_examples=size, step_seconds=None
        )
    return progress


# --- importance and cohort ------------------------------------------------------------


def test_importance_grows_with_examples_and_losses() -> None:
    """Losses 1 and 7 on 4 examples each: the mean square is 25, so 10 x 5."""
    progress = with_losses(10, (1.0, 4), (7.0, 4))
    assert progress.importance == 50.0
    assert replace(progress, importance_before=100.0).importance == 85.0


def test_a_larger_batch_counts_for_more() -> None:
    """Loss 1 on 3 examples and 5 on one: the mean square is 28 / 4."""
    progress = with_losses(1, (1.0, 3), (5.0, 1))
    assert progress.importance == pytest.approx(7**0.5)


def test_importance_in_a_round_ends_as_the_strategy_works_it_out() -> None:
    """From the same losses, by the same average."""
    progress, _ = judged_after(1.0, 1.0, loss=3.0, importance=40.0)
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
    assert (
        StragglerAdvisor().cohort(pairs)
        == StragglerAdvisor().cohort(reversed(pairs))
        == expected
    )


@pytest.mark.parametrize(
    "pairs",
    [[], [(1.0, None)], [(None, 1.0), (None, None)], [(0.0, 1.0)], [(2.0, nan)]],
)
def test_there_is_no_cohort_without_times_and_importances(
    pairs: list[tuple[float | None, float | None]],
) -> None:
    """Then nobody is advised."""
    assert StragglerAdvisor().cohort(pairs) is None


def test_an_advisors_numbers_are_in_its_cohort() -> None:
    """So an edge needs no code of the strategy's."""
    advisor = StragglerAdvisor(slow_factor=3.0, spacing_steps=9)
    cohort = advisor.cohort([(1.0, 1.0)])
    assert cohort is not None
    assert (cohort.slow_factor, cohort.spacing_steps) == (3.0, 9)
    usual = StragglerAdvisor().cohort([(1.0, 1.0)])
    assert usual == replace(cohort, slow_factor=1.5, spacing_steps=4)


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

CASES: dict[str, tuple[float, float, Action | None]] = {
    "slow and important": (3.1, 60.0, Action.EARLIER),
    "slow and just important": (3.1, 50.0, Action.EARLIER),
    "slow and neither": (3.1, 40.0, None),
    "slow and just unimportant": (3.1, 20.0, Action.RELEASE),
    "slow and unimportant": (3.1, 10.0, Action.RELEASE),
    "just not slow": (3.0, 60.0, None),
    "just not slow, unimportant": (3.0, 10.0, None),
    "as all": (2.0, 60.0, None),
    "just not fast": (1.4, 60.0, None),
    "fast and important": (1.3, 60.0, Action.LATER),
    "fast and unimportant": (1.3, 10.0, Action.LATER),
}


def action_of(
    seconds: float, importance: float, cohort: Cohort | None = None
) -> Action | None:
    """Say what is advised after two such steps."""
    advice = advised(seconds, seconds, loss=importance / 60, cohort=cohort)
    return None if advice is None else advice.action


@pytest.mark.parametrize("case", CASES)
def test_what_is_advised_is_what_the_rules_say(case: str) -> None:
    """At their thresholds too: 1.5 and 0.7 of the median, half, and a quarter."""
    seconds, importance, action = CASES[case]
    assert action_of(seconds, importance) == action


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
    cohort = replace(COHORT, **{name: value})
    assert any(
        action_of(seconds, importance, cohort) != action
        for seconds, importance, action in CASES.values()
    )


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
    found = {case: action_of(seconds, imp) for case, (seconds, imp, _) in CASES.items()}
    assert found != {case: action for case, (_, _, action) in CASES.items()}


def test_an_advice_says_why() -> None:
    """With the numbers on both sides."""
    assert advised(4.0, 4.0) == Advice(
        Action.EARLIER,
        "the edge finds it slow: 4 s a step, the median is 2 s; its importance is 60, "
        "the median is 50",
    )


# --- patience -------------------------------------------------------------------------


def test_one_step_is_not_enough() -> None:
    """Nor are two that speak for different things: 0.7 x 1.3 + 0.3 x 8 is above 3."""
    assert advised(4.0) is None
    assert advised(1.3, 8.0) is None
    assert advised(1.3, 8.0, 8.0) is not None


def test_the_seconds_are_a_moving_average() -> None:
    """One long step of 5 s among steps of 2 s is 0.7 x 2 + 0.3 x 5."""
    assert judged_after(2.0, 5.0)[0].step_seconds == pytest.approx(2.9)
    assert advised(2.0, 5.0, 2.0) is None


@pytest.mark.parametrize("seconds", [None, 0.0, -1.0, nan, inf])
def test_a_time_that_is_none_changes_nothing(seconds: float | None) -> None:
    """A device that does not know, or talks nonsense, is left alone."""
    assert judged_after(seconds, seconds)[0].step_seconds is None
    assert advised(seconds, seconds, seconds) is None


@pytest.mark.parametrize("loss", [nan, inf, 1e300])
def test_a_loss_that_is_no_number_releases_nobody(loss: float) -> None:
    """What it means is for the seal to say."""
    advice = advised(4.0, 4.0, loss=loss)
    assert advice is None or advice.action is Action.EARLIER


def test_after_a_change_all_is_looked_at_anew() -> None:
    """Times of the cut before do not count, and four steps must pass."""
    progress, _ = judged_after(4.0, 4.0)
    assert progress.step_seconds is None
    assert progress.importance == 60.0
    advice = []
    for _ in range(8):
        progress, found = judged(
            progress, COHORT, loss=1.0, num_examples=4, step_seconds=4.0
        )
        advice.append(found is not None)
    assert advice == [False, False, False, True] * 2


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
    last = -COHORT.spacing_steps
    for index, (seconds, loss, moves) in enumerate(steps):
        progress, advice = judged(
            progress, COHORT, loss=loss, num_examples=4, step_seconds=seconds
        )
        if advice is not None:
            advice_at.append(index - last)
            last = index
        elif moves:
            last, progress = index, progress.restarted()
    return advice_at


@given(STEPS)
def test_no_two_changes_come_within_four_steps(
    steps: list[tuple[float | None, float, bool]],
) -> None:
    """Whatever the times and losses are, and whoever moves the cut besides."""
    assert min(changes_of(steps), default=4) >= COHORT.spacing_steps == 4


def test_changes_that_come_too_close_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a change is forgotten."""
    monkeypatch.setattr(Progress, "restarted", lambda progress: progress)
    assert min(changes_of([(4.0, 3.0, False)] * 9)) < COHORT.spacing_steps


def test_another_average_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: more is forgotten."""
    monkeypatch.setattr(history, "KEPT_FRACTION", 0.6)
    with pytest.raises(AssertionError):
        test_the_seconds_are_a_moving_average()


def test_an_edge_that_needs_no_relief_gives_no_work_away() -> None:
    """Whoever is fast stays as it is; whoever is slow is advised as ever."""
    ample = replace(COHORT, relieves_edge=False)
    for seconds, actions in ((1.3, (Action.LATER, None)), (9.0, (Action.EARLIER,) * 2)):
        advice = [
            advised(seconds, seconds, importance=1e9, cohort=cohort)
            for cohort in (COHORT, ample)
        ]
        assert tuple(each and each.action for each in advice) == actions
