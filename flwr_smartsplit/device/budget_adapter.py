"""Adapter: follows a changing memory budget, and the edge's advice, between steps."""

from dataclasses import dataclass, replace

from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.errors import MemoryCapExceeded, RefusedMove
from flwr_smartsplit.memory.budget import MemoryBudget
from flwr_smartsplit.plan.adaptation import Standing, adapted, followed, is_calm, scaled
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.coding import route_profile
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import Action, ChainProfile, RouteOption


@dataclass
class _Known:
    """Which budgets are known to be too small for less work, and which to suffice."""

    standing: Standing | None = None
    no_room_bytes: float = -1
    room_bytes: float = float("inf")


class Adapter:
    """Change recompute plan and cut between steps, by a budget and the edge's advice.

    The budget limits what is possible. Where a cut moved on the edge's advice, that is
    the route to which the device returns when the budget allows.
    """

    def __init__(self, budget: MemoryBudget, task: Task, *, batch_size: int) -> None:
        self._budget = budget
        self._task = task
        self._batch_size = batch_size
        self._calm_steps = 0
        self._is_fixed = False
        self._profile: ChainProfile | None = None
        self._known = _Known()
        self._planned: RouteOption | None = None

    def __call__(self, runner: RouteRunner) -> None:
        """Adapt a route before its next step, or raise ``NoFeasiblePlan``."""
        budget_bytes = self._budget.read(
            step=runner.num_steps, live_bytes=runner.live_bytes
        )
        if budget_bytes is not None:
            budget_bytes = max(0, budget_bytes - runner.cap.spare_bytes)
        runner.cap.limit(budget_bytes)
        self._follow(runner, budget_bytes)
        if self._is_at_ease(runner, budget_bytes):
            return
        profile, standing = self._costs(runner), self._standing(runner)
        change = adapted(profile, standing, budget_bytes)
        if change is not None and not self._is_done(runner, *change):
            # The cut cannot move; only tighter recompute plans remain.
            self._is_fixed = True
            change = adapted(profile, self._standing(runner), budget_bytes)
            if change is not None:
                option, reason = change
                runner.replan(option.recompute, reason=reason)
        standing = self._standing(runner)
        is_room = change is None and self._is_calm(profile, standing, budget_bytes)
        self._calm_steps = self._calm_steps + 1 if is_room else 0

    def _costs(self, runner: RouteRunner) -> ChainProfile:
        if self._profile is None:
            task = replace(self._task, accumulate=runner.accumulate)
            found = profile_of(
                task, batch_size=self._batch_size, variant=runner.plan.variant
            )
            plan = runner.plan
            self._profile = route_profile(found, plan.route, plan.codecs)
        return self._profile

    def _follow(self, runner: RouteRunner, budget_bytes: int | None) -> None:
        """Move the cut as the edge advises, if possible."""
        advice, cohort = runner.advice, runner.plan.cohort
        if advice is None or advice.action is Action.RELEASE or cohort is None:
            return
        profile, now = self._costs(runner), _option(runner)
        latest = runner.timer.latest(runner.route, runner.recompute)
        if latest is None:
            return  # The time of a step is not known yet.
        seconds_of = runner.timer.given or scaled(profile, now, latest)
        found = followed(
            profile,
            now,
            advice.action,
            budget_bytes=budget_bytes,
            cohort=cohort,
            seconds_of=seconds_of,
            constraints=runner.plan.constraints,
        )
        if found is None:
            return
        is_new = advice.action is Action.EARLIER or (
            found.route.cuts > self._plan(runner).route.cuts
        )
        if self._is_done(runner, found, advice.reason) and is_new:
            peak = predicted_peak_bytes(profile, found.route, found.recompute)
            self._planned = replace(found, peak_bytes=peak)

    def _plan(self, runner: RouteRunner) -> RouteOption:
        """Return the plan: the strategy's, or the edge's since."""
        return self._planned or RouteOption(
            route=runner.plan.route,
            recompute=runner.plan.recompute,
            peak_bytes=runner.plan.predicted_peak_bytes or 0,
        )

    def _is_at_ease(self, runner: RouteRunner, budget_bytes: int | None) -> bool:
        """Return whether all is as planned and fits, so that no costs are needed."""
        planned = self._plan(runner)
        fits = budget_bytes is None or 0 < planned.peak_bytes <= budget_bytes
        now = (runner.route, runner.recompute)
        return fits and now == (planned.route, planned.recompute)

    def _is_calm(
        self, profile: ChainProfile, standing: Standing, budget_bytes: int | None
    ) -> bool:
        """Return whether less work fits; skip planning where other budgets decide it.

        Planning considers many cuts, and free memory changes from step to step.
        """
        standing = replace(standing, calm_steps=0)
        if standing != self._known.standing:
            self._known = _Known(standing)
        known = self._known
        if budget_bytes is None:
            return is_calm(profile, standing, None)
        if budget_bytes <= known.no_room_bytes:
            return False
        if budget_bytes >= known.room_bytes:
            return True
        is_room = is_calm(profile, standing, budget_bytes)
        if is_room:
            known.room_bytes = budget_bytes
        else:
            known.no_room_bytes = budget_bytes
        return is_room

    def _standing(self, runner: RouteRunner) -> Standing:
        return Standing(
            planned=self._plan(runner).route,
            option=_option(runner),
            calm_steps=self._calm_steps,
            is_fixed=self._is_fixed,
            constraints=runner.plan.constraints,
        )

    def _is_done(self, runner: RouteRunner, option: RouteOption, reason: str) -> bool:
        """Change to an option; return whether its cut could be reached."""
        if option.route.cuts != runner.route.cuts:
            try:
                runner.move(
                    option.route.cuts[0], recompute=option.recompute, reason=reason
                )
            except (RefusedMove, MemoryCapExceeded):
                return False
            return True
        runner.replan(option.recompute, reason=reason)
        return True


def _option(runner: RouteRunner) -> RouteOption:
    """Return the present option; what never changes is the plan's."""
    return RouteOption(
        route=runner.route,
        recompute=runner.recompute,
        variant=runner.plan.variant,
        codecs=runner.plan.codecs,
        accumulate=runner.plan.accumulate,
    )
