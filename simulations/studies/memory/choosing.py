"""Which cut needs least memory, which useful one does, and what no cut can go below.

Nothing here runs a model: the numbers are a profile's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from flwr_smartsplit import Route, predicted_peak_bytes
from flwr_smartsplit.errors import InvalidPlan
from flwr_smartsplit.plan.checkpointing.plan import (
    cheapest_plan,
    extra_flops,
    least_bytes,
)
from flwr_smartsplit.plan.checkpointing.stages import stages_of
from flwr_smartsplit.types import ChainProfile, RecomputePlan, Rerun
from simulations.report.summary import bytes_text
from simulations.studies.memory.greedy import greedy_plan

USEFUL_FRACTION = 0.1
"""The least share of a model's forward FLOPs that is worth a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A cut and what is recomputed before it."""

    cut: int
    plan: RecomputePlan
    predicted_bytes: int


def least_choice(profile: ChainProfile, cuts: Iterable[int]) -> Choice | None:
    """Find the cut that needs least if its device recomputes what helps.

    A cut is passed over where even one stage alone needs more than another cut does.
    """
    best: tuple[int, int] | None = None
    for bound, cut in sorted((_bound(profile, cut), cut) for cut in cuts):
        if best is not None and bound >= best[0]:
            break
        found = least_bytes(profile, Route.split(cut)), cut
        best = min(best or found, found)
    if best is None:
        return None
    needed, cut = best
    plan = cheapest_plan(profile, Route.split(cut), needed)
    if plan is None:
        raise RuntimeError(f"no plan needs {needed} bytes, the least at cut {cut}.")
    return Choice(cut=cut, plan=plan, predicted_bytes=needed)


def _bound(profile: ChainProfile, cut: int) -> int:
    """Find what a cut needs at least: any stage's backward, by itself."""
    (leg,) = Route.split(cut).device_legs(len(profile.units))
    most = later = 0
    for stage in reversed(stages_of(profile, leg)):
        own = min(run.backward_peak_bytes for run in stage.runs)
        most = max(most, later + own)
        later += stage.left_bytes
    resident = sum(unit.resident_bytes for unit in profile.units[:cut])
    return profile.batch_bytes + resident + most


def all_cuts(profile: ChainProfile) -> range:
    """List the cuts of a chain."""
    return range(1, len(profile.units))


def useful_cuts(profile: ChainProfile, input_bytes: int) -> list[int]:
    """List the cuts that relieve an edge and send no more than the inputs."""
    return [
        cut
        for cut in all_cuts(profile)
        if flops_fraction(profile, cut) >= USEFUL_FRACTION
        and profile.units[cut - 1].boundary_bytes <= input_bytes
    ]


def flops_fraction(profile: ChainProfile, cut: int) -> float:
    """Return the share of a forward's FLOPs that lies before a cut."""
    before = list(accumulate(unit.forward_flops for unit in profile.units))
    return before[cut - 1] / max(before[-1], 1)


def floor_parts(profile: ChainProfile) -> dict[str, int]:
    """List what every device holds at once when its first unit goes backward.

    No cut can go below their sum, whatever is recomputed.
    """
    first = profile.units[0]
    return {
        "batch": profile.batch_bytes,
        "parameters and optimizer state of the first unit": first.resident_bytes,
        "gradient of the first unit's output": first.boundary_bytes,
        "gradient of the first unit's parameters": first.gradient_bytes,
    }


def floor_text(profile: ChainProfile, *, cut: int, peak_bytes: int) -> str:
    """Say in a sentence what the floor is made of, or why a peak is above it."""
    parts = floor_parts(profile)
    above = peak_bytes - sum(parts.values())
    if above <= 0:
        name = max(parts, key=parts.__getitem__)
        return f"At the floor; most of it is the {name} ({bytes_text(parts[name])})."
    first = profile.units[0]
    gaps = max(0, first.step.gradient_bytes - first.boundary_bytes)
    known = {
        "activations that the first unit keeps": first.step.kept_bytes,
        "gaps in the gradient that arrives": gaps,
        "parameters and state of later units": sum(
            unit.resident_bytes for unit in profile.units[1:cut]
        ),
    }
    known["temporaries in backward"] = max(0, above - sum(known.values()))
    names = sorted(filter(known.get, known), key=lambda name: -known[name])
    reasons = ", ".join(f"{bytes_text(known[name])} of {name}" for name in names)
    return f"{bytes_text(above)} above the floor: {reasons}."


NUM_BUDGETS = 16
PROGRAMME, GREEDY, SEQUENTIAL = (
    "dynamic programme",
    "greedy rule",
    "checkpoint_sequential",
)

Point = tuple[int, float]
"""Predicted peak in bytes, and what it adds to the model's forward FLOPs."""


def plan_curves(profile: ChainProfile, cut: int) -> dict[str, list[Point]]:
    """Compare what each rule adds to a forward for which peak, at one cut.

    Returns
    -------
    dict[str, list[tuple[int, float]]]
        For each rule: predicted peaks in bytes, and the extra FLOPs of that plan as a
        fraction of the whole model's forward. A budget that a rule finds no plan for
        has no point.
    """
    route = Route.split(cut)
    total = max(1, sum(unit.forward_flops for unit in profile.units))

    def points(plans: Iterator[RecomputePlan | None]) -> list[Point]:
        found = {
            (
                predicted_peak_bytes(profile, route, plan),
                extra_flops(profile, route, plan) / total,
            )
            for plan in plans
            if plan is not None
        }
        return sorted(found)

    limits = budgets(profile, route)
    others = {
        GREEDY: points(
            greedy_plan(profile, route, budget_bytes=limit) for limit in limits
        ),
        SEQUENTIAL: points(sequential_plans(profile, route)),
    }
    # At the others' own peaks, too: between two budgets it would look worse.
    reached = {peak for own in others.values() for peak, _ in own}
    limits = sorted({*limits, *(peak for peak in reached if peak <= limits[-1])})
    plans = (cheapest_plan(profile, route, limit) for limit in limits)
    return {PROGRAMME: points(plans), **others}


def budgets(profile: ChainProfile, route: Route) -> list[int]:
    """Spread budgets evenly from the least that does to where all is kept."""
    least, most = least_bytes(profile, route), predicted_peak_bytes(profile, route)
    steps = NUM_BUDGETS - 1
    return sorted(
        {least + (most - least) * step // steps for step in range(NUM_BUDGETS)}
    )


def sequential_plans(profile: ChainProfile, route: Route) -> Iterator[RecomputePlan]:
    """Plan as ``torch.utils.checkpoint.checkpoint_sequential`` would, for every k.

    It divides the stages into k segments of equal length and keeps the last, which
    takes the remainder.
    """
    (leg,) = route.device_legs(len(profile.units))
    stages = stages_of(profile, leg)
    for num in range(2, len(stages) + 1):
        size = len(stages) // num
        ends = [stages[size * part].start for part in range(num)]
        plan = RecomputePlan(tuple(Rerun(low, high) for low, high in pairwise(ends)))
        try:
            predicted_peak_bytes(profile, route, plan)
        except InvalidPlan:
            continue  # One of its stages must not run twice.
        yield plan
