"""What ``smartsplit plan`` says: the options of a model, or the plan of one route."""

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
    option_of,
    options_of_route,
    recommended_option,
    routes_worth_a_plan,
    undominated,
)
from flwr_smartsplit.types import KEEP_ALL, RecomputePlan, Route, RouteOption

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
    "again: units whose forward runs twice or more; selective: units that keep their "
    "costly results only, and make the cheap ones anew."
)


@dataclass(frozen=True)
class FrontReport:
    """The options that no other beats, and the one to take within a budget.

    Parameters
    ----------
    subject : Subject
        The model and its profile.
    options : tuple[RouteOption, ...]
        The front, whatever fits; the least memory first.
    budget_bytes : int or None
        What a device's tensors may take; None if nobody asked.
    """

    subject: Subject
    options: tuple[RouteOption, ...]
    budget_bytes: int | None

    @cached_property
    def recommended(self) -> RouteOption | None:
        """The option to take within the budget; None without one."""
        if self.budget_bytes is None:
            return None
        return recommended_option(
            self.subject.profile, self.options, budget_bytes=self.budget_bytes
        )

    @cached_property
    def shown(self) -> tuple[RouteOption, ...]:
        """The options within the budget, the recommended one among them."""
        extra = () if self.recommended is None else (self.recommended,)
        return undominated((*self.options, *extra), budget_bytes=self.budget_bytes)

    def as_json(self) -> str:
        """Write everything as one JSON object."""
        facts = _facts(self.subject, self.budget_bytes)
        facts["choices"] = [_option_facts(self.subject, each) for each in self.shown]
        if self.budget_bytes is not None:
            best = self.recommended
            facts["recommended"] = best and _option_facts(self.subject, best)
        return json.dumps(facts)

    def for_people(self) -> RenderableType:
        """Lay the options out as a table, with what they mean below."""
        table = _table(_HEADERS, _LEFT)
        for option in self.shown:
            is_best = option == self.recommended
            table.add_row(
                "→" if is_best else "",
                *_option_cells(self.subject, option),
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
    option : RouteOption
        The route, its plan and what they cost.
    budget_bytes : int
        What a device's tensors may take.
    """

    subject: Subject
    option: RouteOption
    budget_bytes: int

    def as_json(self) -> str:
        """Write everything as one JSON object."""
        facts = _facts(self.subject, self.budget_bytes)
        facts["choice"] = _option_facts(self.subject, self.option)
        facts["units"] = [
            {"name": name, "num_runs": num_runs, "is_selective": is_selective}
            for _, name, num_runs, is_selective in self._units()
        ]
        return json.dumps(facts)

    def for_people(self) -> RenderableType:
        """List the units on the device, with how often each runs."""
        option, profile = self.option, self.subject.profile
        table = _table(
            ("", "unit\non the device", "forward\nruns", "selective", "fwd.\nFLOPs"),
            ("unit\non the device", "selective"),
        )
        for index, name, num_runs, is_selective in self._units():
            flops = profile.units[index].forward_flops
            selective = "selective" if is_selective else ""
            table.add_row(
                str(index + 1), name, str(num_runs), selective, count_text(flops)
            )
        lines = [self._summary()]
        if not option.recompute.is_empty:
            lines += [f"The plan: {option.recompute}", *_legend([option])]
        heading = self.subject.heading()
        return Group(f"{heading}\n", table, *(f"\n{line}" for line in lines))

    def _summary(self) -> str:
        option, profile = self.option, self.subject.profile
        plain_bytes = option_of(profile, option.route, KEEP_ALL).peak_bytes
        needed = f"{option.route} needs {bytes_text(option.peak_bytes)}"
        if option.recompute.is_empty:
            return f"{needed} with nothing recomputed."
        return (
            f"{needed}, and {bytes_text(plain_bytes)} with nothing recomputed. Extra "
            f"work: {_extra_text(option)}."
        )

    def _units(self) -> Iterator[tuple[int, str, int, bool]]:
        """Yield each unit's index, name and number of runs, and if it is selective."""
        plan, units = self.option.recompute, self.subject.profile.units
        for leg in self.option.route.device_legs(len(units)):
            for index in range(leg.start, leg.stop):
                is_selective = index in plan.selective
                yield index, units[index].name, plan.num_runs(index), is_selective


def planned_routes(subject: Subject) -> tuple[Route, ...]:
    """List the routes that a front is made of."""
    return routes_worth_a_plan(subject.profile)


def planned_options(subject: Subject, route: Route) -> tuple[RouteOption, ...]:
    """Plan one route for several budgets."""
    return options_of_route(subject.profile, route)


def front_report(
    subject: Subject, options: tuple[RouteOption, ...], *, budget_bytes: int | None
) -> FrontReport:
    """Keep the best options, and make sure that one fits.

    Raises
    ------
    NoFeasiblePlan
        If none does; with the bytes that would do.
    """
    report = FrontReport(subject, undominated(options), budget_bytes)
    if budget_bytes is not None and not report.shown:
        least = report.options[0].route
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
        option=option_of(profile, route, plan),
        budget_bytes=budget_bytes,
    )


def recompute_text(plan: RecomputePlan, num_units: int) -> str:
    """Say in a few words what a plan runs again.

    Examples
    --------
    >>> from flwr_smartsplit.types import Rerun
    >>> recompute_text(RecomputePlan((Rerun(0, 3, (Rerun(0, 1),)),), (4,)), 5)
    '3 again, 1 selective'
    >>> recompute_text(RecomputePlan(), 5)
    'none'
    """
    again = sum(plan.num_runs(unit) > 1 for unit in range(num_units))
    counts = {"again": again, "selective": len(plan.selective)}
    parts = [f"{count} {word}" for word, count in counts.items() if count]
    return ", ".join(parts) or "none"


def last_unit(subject: Subject, route: Route) -> str:
    """Name the unit before a route's first cut; the last one of a whole model."""
    return subject.profile.units[route.cuts[0] - 1 if route.cuts else -1].name


def _legend(options: Iterable[RouteOption]) -> list[str]:
    """Explain the words for what runs again, if anything does."""
    is_needed = any(not option.recompute.is_empty for option in options)
    return [_LEGEND] if is_needed else []


def _option_cells(subject: Subject, option: RouteOption) -> list[str]:
    num_units = len(subject.profile.units)
    return [
        _cut_text(option.route),
        last_unit(subject, option.route),
        recompute_text(option.recompute, num_units),
        bytes_text(option.peak_bytes),
        count_text(option.work.extra_flops),
        f"{option.work.extra_fraction:.0%}",
        bytes_text(option.work.boundary_bytes) if option.route.cuts else "",
        f"{option.work.device_fraction:.0%}",
    ]


def _cut_text(route: Route) -> str:
    return str(route.cuts[0]) if route.cuts else "whole"


def _extra_text(option: RouteOption) -> str:
    return (
        f"{count_text(option.work.extra_flops)} FLOPs, "
        f"{option.work.extra_fraction:.0%} of the device's forward"
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


def _option_facts(subject: Subject, option: RouteOption) -> dict[str, Any]:
    return {
        "route": str(option.route),
        "cuts": option.route.cuts,
        "last_unit": last_unit(subject, option.route),
        "recompute": option.recompute.to_lists(),
        "peak_bytes": option.peak_bytes,
        "extra_flops": option.work.extra_flops,
        "extra_flops_fraction": option.work.extra_fraction,
        "boundary_bytes": option.work.boundary_bytes,
        "device_flops_fraction": option.work.device_fraction,
    }


def _table(headers: tuple[str, ...], left: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for header in headers:
        is_left = header in left
        table.add_column(
            header, justify="left" if is_left else "right", overflow="fold"
        )
    return table
