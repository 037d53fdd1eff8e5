"""Adapter: follows a budget that moves, and the edge's wishes, between two steps."""

from dataclasses import dataclass, replace

from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.errors import MemoryCapExceeded, RefusedMove
from flwr_smartsplit.memory.budget import MemoryBudget
from flwr_smartsplit.plan.adapting import Change, Standing, adapted, is_calm
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.following import Way, followed, scaled
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ChainProfile, Wish


@dataclass
class _Known:
    """Between which budgets it is not known whether there is room for less work."""

    standing: Standing | None = None
    no_room_bytes: float = -1
    room_bytes: float = float("inf")


@dataclass(frozen=True)
class _Planned:
    """What a device does as long as its budget allows it, and needs for it."""

    way: Way
    peak_bytes: int | None


class Adapter:
    """Change plan and cut between steps, as a budget and the edge's advice say.

    The budget says what is possible, the edge what is planned: where a cut has moved
    by its advice, that is the route which the device goes back to.

    Parameters
    ----------
    budget : MemoryBudget
        What the device's tensors may take.
    task : Task
        What is trained.
    batch_size : int
        Examples per step.
    """

    def __init__(self, budget: MemoryBudget, task: Task, *, batch_size: int) -> None:
        self._budget = budget
        self._task = task
        self._batch_size = batch_size
        self._calm_steps = 0
        self._is_fixed = False
        self._profile: ChainProfile | None = None
        self._known = _Known()
        self._planned: _Planned | None = None

    def __call__(self, runner: RouteRunner) -> None:
        """Adapt a route before its next step.

        Raises
        ------
        NoFeasiblePlan
            If nothing fits.
        """
        budget_bytes = self._budget.read(
            step=runner.num_steps, live_bytes=runner.live_bytes
        )
        runner.cap.limit(budget_bytes)
        self._follow(runner, budget_bytes)
        if self._is_at_ease(runner, budget_bytes):
            return
        profile, standing = self._costs(), self._standing(runner)
        change = adapted(profile, standing, budget_bytes)
        if change is not None and not self._is_done(runner, change):
            # The cut stays where it is; what is left are tighter plans.
            self._is_fixed = True
            change = adapted(profile, self._standing(runner), budget_bytes)
            if change is not None:
                runner.replan(change.recompute, reason=change.reason)
        standing = self._standing(runner)
        is_room = change is None and self._is_calm(profile, standing, budget_bytes)
        self._calm_steps = self._calm_steps + 1 if is_room else 0

    def _costs(self) -> ChainProfile:
        """Find the chain's costs the first time that they are needed."""
        if self._profile is None:
            self._profile = profile_of(self._task, batch_size=self._batch_size)
        return self._profile

    def _follow(self, runner: RouteRunner, budget_bytes: int | None) -> None:
        """Move the cut where the edge would have it, if it can go there."""
        advice, cohort = runner.advice, runner.plan.cohort
        if advice is None or advice.wish is Wish.RELEASE or cohort is None:
            return
        profile, way = self._costs(), (runner.route, runner.recompute)
        latest = runner.timer.latest(*way)
        if latest is None:
            return  # Nobody knows what a step takes now.
        seconds_of = runner.timer.given or scaled(profile, way, latest)
        found = followed(
            profile,
            way,
            advice.wish,
            budget_bytes=budget_bytes,
            cohort=cohort,
            seconds_of=seconds_of,
            min_device_units=runner.plan.constraints.min_device_units,
        )
        if found is None:
            return
        change = Change(route=found[0], recompute=found[1], reason=advice.reason)
        is_new = advice.wish is Wish.EARLIER or (
            found[0].cuts > self._plan(runner).way[0].cuts
        )
        if self._is_done(runner, change) and is_new:
            self._planned = _Planned(found, predicted_peak_bytes(profile, *found))

    def _plan(self, runner: RouteRunner) -> _Planned:
        """Say what is planned: what the strategy did, or the edge since."""
        plan = runner.plan
        return self._planned or _Planned(
            (plan.route, plan.recompute), plan.predicted_peak_bytes
        )

    def _is_at_ease(self, runner: RouteRunner, budget_bytes: int | None) -> bool:
        """Say whether all is as planned and fits, so that no costs are needed."""
        planned = self._plan(runner)
        needed = planned.peak_bytes
        fits = budget_bytes is None or (needed is not None and needed <= budget_bytes)
        return (runner.route, runner.recompute) == planned.way and fits

    def _is_calm(
        self, profile: ChainProfile, standing: Standing, budget_bytes: int | None
    ) -> bool:
        """Look whether there is room, unless a look at another budget has told.

        A look plans for many cuts, and what is free changes from step to step.
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
            planned=self._plan(runner).way[0],
            route=runner.route,
            recompute=runner.recompute,
            calm_steps=self._calm_steps,
            is_fixed=self._is_fixed,
            min_device_units=runner.plan.constraints.min_device_units,
        )

    def _is_done(self, runner: RouteRunner, change: Change) -> bool:
        """Change; say whether the cut could be moved where it had to."""
        if change.route.cuts != runner.route.cuts:
            try:
                runner.move(
                    change.route.cuts[0],
                    recompute=change.recompute,
                    reason=change.reason,
                )
            except (RefusedMove, MemoryCapExceeded):
                return False
            return True
        runner.replan(change.recompute, reason=change.reason)
        return True
