"""What ``smartsplit plan`` says: the choices of a model, or the plan of one route."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from flwr_smartsplit.cli.profile_report import count_text, versions
from flwr_smartsplit.cli.subject import Subject
from flwr_smartsplit.errors import bytes_text
from flwr_smartsplit.plan.checkpointing.plan import plan_recompute
from flwr_smartsplit.plan.search_space import (
    Choice,
    choice_of,
    choices_of_route,
    recommended_choice,
    routes_worth_a_plan,
    undominated,
)
from flwr_smartsplit.types import KEEP_ALL, RecomputePlan, Route

_HEADERS = (
    "",
    "cut",
    "last unit\non the device",
    "recomputed",
    "device\npeak",
    "extra\nFLOPs",
    "of its\nforward",
    "bound-\nary",
    "device\nshare",
)
_LEFT = ("", "last unit\non the device", "recomputed")
_LEGEND = (
    "again: units whose forward runs twice or more; light: units that keep their "
    "costly results only, and make the cheap ones anew."
)


@dataclass(frozen=True)
class FrontReport:
    """The choices that no other beats, and the one to take within a budget.

    Parameters
    ----------
    subject : Subject
        The model and its profile.
    choices : tuple[Choice, ...]
        The front, whatever fits; the least memory first.
    budget_bytes : int or None
        What a device's tensors may take; None if nobody asked.
    """

    subject: Subject
    choices: tuple[Choice, ...]
    budget_bytes: int | None

    @cached_property
    def recommended(self) -> Choice | None:
        """The choice to take within the budget; None without one."""
        if self.budget_bytes is None:
            return None
        return recommended_choice(
            self.subject.profile, self.choices, budget_bytes=self.budget_bytes
        )

    @cached_property
    def shown(self) -> tuple[Choice, ...]:
        """The choices within the budget, the recommended one among them."""
        extra = () if self.recommended is None else (self.recommended,)
        return undominated((*self.choices, *extra), budget_bytes=self.budget_bytes)

    def as_json(self) -> str:
        """Write everything as one JSON object."""
        facts = _facts(self.subject, self.budget_bytes)
        facts["choices"] = [_choice_facts(self.subject, each) for each in self.shown]
        if self.budget_bytes is not None:
            best = self.recommended
            facts["recommended"] = best and _choice_facts(self.subject, best)
        return json.dumps(facts)

    def for_people(self) -> RenderableType:
        """Lay the choices out as a table, with what they mean below."""
        table = _table(_HEADERS, _LEFT)
        for choice in self.shown:
            is_best = choice == self.recommended
            table.add_row(
                "→" if is_best else "",
                *_choice_cells(self.subject, choice),
                style="bold" if is_best else None,
            )
        lines = [*_legend(self.shown), *self._recommendation()]
        if self.subject.no_cut_reason is not None:
            lines.append(self.subject.no_cut_reason)
        heading = self.subject.heading()
        return Group(f"{heading}\n", table, *(f"\n{line}" for line in lines))

    def _recommendation(self) -> Iterator[str]:
        best, budget_bytes = self.recommended, self.budget_bytes
        if best is None or budget_bytes is None:
            return
        within = f"Recommended within {bytes_text(budget_bytes)}: {best.route}"
        if best.recompute.is_empty:
            yield (f"{within}, the deepest of these that fits with nothing recomputed.")
            return
        yield (
            f"{within}, of least extra work: {_extra_text(best)}. --cut "
            f"{_cut_text(best.route)} lists what runs again."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteReport:
    """The plan of one route for one budget.

    Parameters
    ----------
    subject : Subject
        The model and its profile.
    choice : Choice
        The route, its plan and what they cost.
    budget_bytes : int
        What a device's tensors may take.
    """

    subject: Subject
    choice: Choice
    budget_bytes: int

    def as_json(self) -> str:
        """Write everything as one JSON object."""
        facts = _facts(self.subject, self.budget_bytes)
        facts["choice"] = _choice_facts(self.subject, self.choice)
        facts["units"] = [
            {"name": name, "num_runs": num_runs, "is_light": is_light}
            for _, name, num_runs, is_light in self._units()
        ]
        return json.dumps(facts)

    def for_people(self) -> RenderableType:
        """List the units on the device, with how often each runs."""
        choice, profile = self.choice, self.subject.profile
        table = _table(
            ("", "unit\non the device", "forward\nruns", "light", "fwd.\nFLOPs"),
            ("unit\non the device", "light"),
        )
        for index, name, num_runs, is_light in self._units():
            flops = profile.units[index].forward_flops
            light = "light" if is_light else ""
            table.add_row(str(index + 1), name, str(num_runs), light, count_text(flops))
        lines = [self._summary()]
        if not choice.recompute.is_empty:
            lines += [f"The plan: {choice.recompute}", *_legend([choice])]
        heading = self.subject.heading()
        return Group(f"{heading}\n", table, *(f"\n{line}" for line in lines))

    def _summary(self) -> str:
        choice, profile = self.choice, self.subject.profile
        plain_bytes = choice_of(profile, choice.route, KEEP_ALL).peak_bytes
        needed = f"{choice.route} needs {bytes_text(choice.peak_bytes)}"
        if choice.recompute.is_empty:
            return f"{needed} with nothing recomputed."
        return (
            f"{needed}, and {bytes_text(plain_bytes)} with nothing recomputed. Extra "
            f"work: {_extra_text(choice)}."
        )

    def _units(self) -> Iterator[tuple[int, str, int, bool]]:
        """Yield index, name, number of forward runs and lightness of each unit."""
        plan, units = self.choice.recompute, self.subject.profile.units
        for leg in self.choice.route.device_legs(len(units)):
            for index in range(leg.start, leg.stop):
                is_light = index in plan.light
                yield index, units[index].name, plan.num_runs(index), is_light


def planned_routes(subject: Subject) -> tuple[Route, ...]:
    """List the routes that a front is made of."""
    return routes_worth_a_plan(subject.profile)


def planned_choices(subject: Subject, route: Route) -> tuple[Choice, ...]:
    """Plan one route for several budgets."""
    return choices_of_route(subject.profile, route)


def front_report(
    subject: Subject, choices: tuple[Choice, ...], *, budget_bytes: int | None
) -> FrontReport:
    """Keep the best choices, and make sure that one fits.

    Raises
    ------
    NoFeasiblePlan
        If none does; with the bytes that would do.
    """
    report = FrontReport(subject, undominated(choices), budget_bytes)
    if budget_bytes is not None and not report.shown:
        least = report.choices[0].route
        plan_recompute(subject.profile, least, budget_bytes=budget_bytes)
    return report


def route_report(subject: Subject, cut: int, *, budget_bytes: int) -> RouteReport:
    """Plan one cut, or the whole model, for one budget.

    Parameters
    ----------
    subject : Subject
        The model and its profile.
    cut : int
        How many units the device has; all of them make the whole model.
    budget_bytes : int
        What a device's tensors may take.

    Raises
    ------
    NoFeasiblePlan
        If no plan fits; with the bytes that would do, and the nearest cut.
    """
    profile = subject.profile
    route = Route.whole() if cut == len(profile.units) else Route.split(cut)
    plan = plan_recompute(profile, route, budget_bytes=budget_bytes)
    return RouteReport(
        subject=subject,
        choice=choice_of(profile, route, plan),
        budget_bytes=budget_bytes,
    )


def recompute_text(plan: RecomputePlan, num_units: int) -> str:
    """Say in a few words what a plan runs again.

    Examples
    --------
    >>> from flwr_smartsplit.types import Rerun
    >>> recompute_text(RecomputePlan((Rerun(0, 3, (Rerun(0, 1),)),), (4,)), 5)
    '3 again, 1 light'
    >>> recompute_text(RecomputePlan(), 5)
    'none'
    """
    again = sum(plan.num_runs(unit) > 1 for unit in range(num_units))
    counts = {"again": again, "light": len(plan.light)}
    parts = [f"{count} {word}" for word, count in counts.items() if count]
    return ", ".join(parts) or "none"


def last_unit(subject: Subject, route: Route) -> str:
    """Name the unit before a route's first cut; the last one of a whole model."""
    return subject.profile.units[route.cuts[0] - 1 if route.cuts else -1].name


def _legend(choices: Iterable[Choice]) -> list[str]:
    """Explain the words for what runs again, if anything does."""
    is_needed = any(not choice.recompute.is_empty for choice in choices)
    return [_LEGEND] if is_needed else []


def _choice_cells(subject: Subject, choice: Choice) -> list[str]:
    num_units = len(subject.profile.units)
    return [
        _cut_text(choice.route),
        last_unit(subject, choice.route),
        recompute_text(choice.recompute, num_units),
        bytes_text(choice.peak_bytes),
        count_text(choice.extra_flops),
        f"{choice.extra_flops_fraction:.0%}",
        bytes_text(choice.boundary_bytes) if choice.route.cuts else "",
        f"{choice.device_flops_fraction:.0%}",
    ]


def _cut_text(route: Route) -> str:
    return str(route.cuts[0]) if route.cuts else "whole"


def _extra_text(choice: Choice) -> str:
    return (
        f"{count_text(choice.extra_flops)} FLOPs, "
        f"{choice.extra_flops_fraction:.0%} of the device's forward"
    )


def _facts(subject: Subject, budget_bytes: int | None) -> dict[str, Any]:
    return {
        "model": subject.model,
        "input_shapes": subject.input_shapes,
        "batch_size": subject.profile.batch_size,
        "optimizer": subject.optimizer,
        "versions": versions(),
        "no_cut_reason": subject.no_cut_reason,
        "budget_bytes": budget_bytes,
    }


def _choice_facts(subject: Subject, choice: Choice) -> dict[str, Any]:
    return {
        "route": str(choice.route),
        "cuts": choice.route.cuts,
        "last_unit": last_unit(subject, choice.route),
        "recompute": choice.recompute.to_lists(),
        "peak_bytes": choice.peak_bytes,
        "extra_flops": choice.extra_flops,
        "extra_flops_fraction": choice.extra_flops_fraction,
        "boundary_bytes": choice.boundary_bytes,
        "device_flops_fraction": choice.device_flops_fraction,
    }


def _table(headers: tuple[str, ...], left: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for header in headers:
        is_left = header in left
        table.add_column(
            header, justify="left" if is_left else "right", overflow="fold"
        )
    return table
