"""The report of ``smartsplit plan``: a model's options, or the plan of one route."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import RenderableType

from flwr_smartsplit.cli.profile_report import count_text
from flwr_smartsplit.cli.subject import Subject, empty_table
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
_UNIT_HEADERS = ("", "unit\non the device", "forward\nruns", "selective", "fwd.\nFLOPs")
_LEGEND = (
    "again: units whose forward runs twice or more; selective: units that keep only "
    "the results of their costly operators, and recompute the cheap ones."
)


@dataclass(frozen=True)
class FrontReport:
    """The options that no other dominates, and the recommended one for a budget.

    ``options`` is the front without the budget, ordered by peak; ``budget_bytes`` is
    None if none was given.
    """

    subject: Subject
    options: tuple[RouteOption, ...]
    budget_bytes: int | None

    @cached_property
    def recommended(self) -> RouteOption | None:
        """The option to take within the budget; None without a budget."""
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
        facts = self.subject.facts() | {
            "budget_bytes": self.budget_bytes,
            "choices": [_option_facts(self.subject, each) for each in self.shown],
        }
        if self.budget_bytes is not None:
            best = self.recommended
            facts["recommended"] = best and _option_facts(self.subject, best)
        return json.dumps(facts)

    def for_people(self) -> RenderableType:
        """Lay the options out as a table, with the recommendation below."""
        table = empty_table(_HEADERS, left=("", *_HEADERS[2:4]))
        for option in self.shown:
            is_best = option == self.recommended
            table.add_row(
                "→" if is_best else "",
                _cut_text(option.route),
                self.subject.last_unit(option.route),
                recompute_text(option.recompute, len(self.subject.profile.units)),
                bytes_text(option.peak_bytes),
                count_text(option.work.extra_flops),
                f"{option.work.extra_fraction:.0%}",
                bytes_text(option.work.boundary_bytes) if option.route.cuts else "",
                f"{option.work.device_fraction:.0%}",
                style="bold" if is_best else None,
            )
        is_legend_needed = any(not each.recompute.is_empty for each in self.shown)
        lines = [_LEGEND] if is_legend_needed else []
        lines += [*self._recommendation()]
        return self.subject.page(table, *lines, self.subject.no_cut_reason)

    def _recommendation(self) -> Iterator[str]:
        best, budget_bytes = self.recommended, self.budget_bytes
        if best is None or budget_bytes is None:
            return
        within = f"Recommended within {bytes_text(budget_bytes)}: {best.route}"
        if best.recompute.is_empty:
            yield f"{within}, the deepest of these that fits with nothing recomputed."
            return
        yield (
            f"{within}, of least extra work: {_extra_text(best)}. --cut "
            f"{_cut_text(best.route)} lists what runs again."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteReport:
    """The plan of one route for one budget."""

    subject: Subject
    option: RouteOption
    budget_bytes: int

    def as_json(self) -> str:
        """Write everything as one JSON object."""
        facts = self.subject.facts() | {
            "budget_bytes": self.budget_bytes,
            "choice": _option_facts(self.subject, self.option),
            "units": [
                {"name": name, "num_runs": num_runs, "is_selective": is_selective}
                for _, name, num_runs, is_selective in self._units()
            ],
        }
        return json.dumps(facts)

    def for_people(self) -> RenderableType:
        """List the units on the device, with how often each runs."""
        option, profile = self.option, self.subject.profile
        table = empty_table(_UNIT_HEADERS, left=(_UNIT_HEADERS[1], "selective"))
        for index, name, num_runs, is_selective in self._units():
            flops = profile.units[index].forward_flops
            selective = "selective" if is_selective else ""
            table.add_row(
                str(index + 1), name, str(num_runs), selective, count_text(flops)
            )
        needed = f"{option.route} needs {bytes_text(option.peak_bytes)}"
        if option.recompute.is_empty:
            return self.subject.page(table, f"{needed} with nothing recomputed.")
        plain_bytes = option_of(profile, option.route, KEEP_ALL).peak_bytes
        summary = (
            f"{needed}, and {bytes_text(plain_bytes)} with nothing recomputed. Extra "
            f"work: {_extra_text(option)}."
        )
        plan_text = f"The plan: {option.recompute}"
        return self.subject.page(table, summary, plan_text, _LEGEND)

    def _units(self) -> Iterator[tuple[int, str, int, bool]]:
        """Yield index, name, forward runs, and if it is selective, of each unit."""
        plan, units = self.option.recompute, self.subject.profile.units
        for leg in self.option.route.device_legs(len(units)):
            for index in range(leg.start, leg.stop):
                is_selective = index in plan.selective
                yield index, units[index].name, plan.num_runs(index), is_selective


def front_report(
    subject: Subject,
    track: Callable[[Sequence[Route]], Iterable[Route]],
    *,
    budget_bytes: int | None,
) -> FrontReport:
    """Plan every route worth it, and keep the best options.

    ``track`` shows the progress over the routes. Raises NoFeasiblePlan if nothing fits
    the budget, with the bytes that would do.
    """
    options = [
        option
        for route in track(routes_worth_a_plan(subject.profile))
        for option in options_of_route(subject.profile, route)
    ]
    report = FrontReport(subject, undominated(options), budget_bytes)
    if budget_bytes is not None and not report.shown:
        least = report.options[0].route
        plan_recompute(subject.profile, least, budget_bytes=budget_bytes)
    return report


def route_report(subject: Subject, cut: int, *, budget_bytes: int) -> RouteReport:
    """Plan one cut, or with all units the whole model, for one budget."""
    profile = subject.profile
    route = Route.whole() if cut == len(profile.units) else Route.split(cut)
    plan = plan_recompute(profile, route, budget_bytes=budget_bytes)
    option = option_of(profile, route, plan)
    return RouteReport(subject=subject, option=option, budget_bytes=budget_bytes)


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


def _cut_text(route: Route) -> str:
    return str(route.cuts[0]) if route.cuts else "whole"


def _extra_text(option: RouteOption) -> str:
    return (
        f"{count_text(option.work.extra_flops)} FLOPs, "
        f"{option.work.extra_fraction:.0%} of the device's forward"
    )


def _option_facts(subject: Subject, option: RouteOption) -> dict[str, Any]:
    return {
        "route": str(option.route),
        "cuts": option.route.cuts,
        "last_unit": subject.last_unit(option.route),
        "recompute": option.recompute.to_lists(),
        "peak_bytes": option.peak_bytes,
        "extra_flops": option.work.extra_flops,
        "extra_flops_fraction": option.work.extra_fraction,
        "boundary_bytes": option.work.boundary_bytes,
        "device_flops_fraction": option.work.device_fraction,
    }
