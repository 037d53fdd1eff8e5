"""Kill a ServerApp's process at random moments, resume it, and compare the bits."""

import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from simulations.faults.run import RunOptions
from simulations.faults.stage import Ended, Rules, Stage
from simulations.faults.table import differences

# The edge keeps what a killed process began there for the lease; nobody waits for it.
_RULES = Rules(
    strategy_is_back=True, most_seconds=120.0, lease_seconds=600.0, tidy_seconds=0.0
)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One run that was killed once, and resumed."""

    api: str
    after_seconds: float  # Since its process began
    resumed_after: int | None  # The last round that was saved; None: it began anew
    is_same: bool  # State and rows are those of the undisturbed run, bit for bit
    problems: list[str]


def options_of(folder: Path, api: str, num_rounds: int) -> RunOptions:
    """Describe the run: FedAdam, half of the clients by given speeds, evaluation."""
    return RunOptions(
        folder=folder,
        api=api,
        inner="FedAdam",
        num_rounds=num_rounds,
        has_checkpoints=True,
        evaluates=True,
        chooses=True,
    )


def kills(
    api: str,
    *,
    num_moments: int,
    num_rounds: int,
    seed: int,
    on_kill: Callable[[Kill], object],
) -> list[Kill]:
    """Kill a run at so many moments, one in each run."""
    folder = Path(tempfile.mkdtemp(prefix="killed-"))
    began, ended_at = [0.0], [0.0]

    def note(strategy: Any) -> None:
        began[0] = began[0] or time.monotonic()
        ended_at[0] = time.monotonic()

    stage = Stage(options_of(folder / "whole", api, num_rounds), _RULES)
    whole, chance = stage.play(during=note), random.Random(f"{api} {seed}")
    if whole.state is None or whole.left_out:
        raise RuntimeError(f"the undisturbed run fails: {whole.log[-2000:]}")
    found = []
    for index in range(num_moments):
        moment = chance.uniform(0.1, ended_at[0] - began[0])
        options = options_of(folder / str(index), api, num_rounds)
        found.append(_killed(options, moment, whole))
        on_kill(found[-1])
    if all(each.is_same and not each.problems for each in found):
        shutil.rmtree(folder)
    return found


def _killed(options: RunOptions, moment: float, whole: Ended) -> Kill:
    began: list[float] = []

    def strike(strategy: Any) -> None:
        if not began:
            began.append(time.monotonic())
        if len(began) == 1 and time.monotonic() - began[0] >= moment:
            began.append(moment)
            strategy.kill()

    ended = Stage(options, _RULES).play(during=strike)
    resumed = re.findall(r"Resumed from .*/(\d+):", ended.log)
    problems = ["it hangs"] if ended.was_hung else []
    problems += ["it was over before"] if len(began) == 1 else []
    if ended.state is None:
        problems.append(f"it does not end: {ended.log[-500:]}")
    is_same = ended.state is not None and not differences(
        ended.state, whole.state or {}
    )
    return Kill(
        api=options.api,
        after_seconds=round(moment, 3),
        resumed_after=int(resumed[-1]) if resumed else None,
        is_same=is_same and _routes(ended) == _routes(whole),
        problems=problems,
    )


def _routes(ended: Ended) -> dict[Any, Any]:
    """Say who did what in which round; a round that was trained again counts once."""
    return {
        (row["phase"], row["round"], row["client_key"]): (row["status"], row["loss"])
        for row in ended.rows
        if row.get("phase") in {"train", "evaluate"} and "loss" in row
    }


def shown(found: list[Kill]) -> Table:
    """Lay the kills out, for people."""
    table = Table("API", "killed after, s", "resumed after round", box=None)
    table.add_column("bits")
    table.add_column("problems")
    for each in found:
        table.add_row(
            each.api,
            f"{each.after_seconds:.2f}",
            str(each.resumed_after or "-"),
            "the same" if each.is_same else "DIFFERENT",
            "\n".join(each.problems) or "none",
        )
    return table
