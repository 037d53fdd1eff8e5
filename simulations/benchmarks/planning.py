"""What planning costs, and what rounding costs.

``python -m simulations.benchmarks.planning``.

Plans of recomputation are found in slots of memory. More slots are more exact and take
longer. Printed are, for chains of 10, 30 and 60 units, the time of one plan, and how
much extra work it has beside the plan found with ten times as many slots.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flwr_smartsplit import Route, predicted_peak_bytes, profile_chain
from flwr_smartsplit.cli.specs import TORCHVISION, task_of
from flwr_smartsplit.plan.checkpointing.optimal import Rotor
from flwr_smartsplit.plan.checkpointing.plan import cost_of, least_bytes
from flwr_smartsplit.plan.checkpointing.stages import Stage, stages_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import ChainProfile

MODEL = "efficientnet_b0"
SIZES = (10, 30, 60)
SLOTS, FINE_SLOTS = 500, 5000
NUM_BUDGETS = 5


@dataclass(frozen=True, kw_only=True)
class PlanningCost:
    """What planning costs for one length of a chain."""

    num_units: int  # Of the device's segment
    num_stages: int
    seconds: float  # Median CPU time of a plan
    most_gap_fraction: float  # The most that rounding costs, over a forward's FLOPs
    num_missed: int  # Budgets for which only more slots find a plan


def measured(profile: ChainProfile, num_units: int) -> PlanningCost:
    """Plan for budgets between the least that does and all that can be used."""
    route = Route.split(num_units)
    leg = route.device_legs(len(profile.units))[0]
    stages = stages_of(profile, leg)
    forward = sum(unit.forward_flops for unit in profile.units[:num_units])
    static = predicted_peak_bytes(profile, route) - _dynamic_bytes(profile, num_units)
    least, most = least_bytes(profile, route), predicted_peak_bytes(profile, route)
    seconds, gaps, missed = [], [0.0], 0
    for part in range(NUM_BUDGETS):
        free = least + (most - least) * part // NUM_BUDGETS - static
        started = time.process_time()
        coarse = _cost(stages, free, SLOTS)
        seconds.append(time.process_time() - started)
        fine = _cost(stages, free, FINE_SLOTS)
        if coarse is not None and fine is not None:
            gaps.append((coarse - fine) / forward)
        missed += coarse is None and fine is not None
    return PlanningCost(
        num_units=num_units,
        num_stages=len(stages),
        seconds=statistics.median(seconds),
        most_gap_fraction=max(gaps),
        num_missed=missed,
    )


def _dynamic_bytes(profile: ChainProfile, num_units: int) -> int:
    """Size of what does not always stay."""
    resident = sum(unit.resident_bytes for unit in profile.units[:num_units])
    peak = profile.units[num_units - 1].device_peak_bytes
    return peak - resident - profile.batch_bytes


def _cost(stages: tuple[Stage, ...], free_bytes: int, slots: int) -> float | None:
    plan = Rotor(stages, free_bytes, slots=slots).plan()
    return None if plan is None else cost_of(stages, plan)


def main(
    *, batch_size: int = 32, as_json: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """Time plans for chains of three lengths, and state what rounding costs."""
    task = task_of(
        f"{TORCHVISION}{MODEL}", input_shape=(3, 32, 32), optimizer="momentum"
    )
    profile = profile_chain(build_chain(task), batch_size=batch_size, task=task)
    costs = [measured(profile, size) for size in SIZES]
    if as_json:
        sys.stdout.write(json.dumps([asdict(cost) for cost in costs]) + "\n")
        return
    table = Table("units", "stages", "ms", "rounding costs", "missed", box=None)
    for cost in costs:
        table.add_row(
            str(cost.num_units),
            str(cost.num_stages),
            f"{1e3 * cost.seconds:.0f}",
            f"{cost.most_gap_fraction:.2%} of the forward's FLOPs",
            f"{cost.num_missed} of {NUM_BUDGETS}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
