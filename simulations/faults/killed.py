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

_ATTEMPTS, _TOO_LATE = 5, "it was over before"
_STRUCK = 2  # Moments: when it was due, and when it was done
# The edge keeps what a killed process began there for the lease; nobody waits for it.
_RULES = Rules(
    strategy_is_back=True, most_seconds=120.0, lease_seconds=600.0, tidy_seconds=0.0
)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One run that was killed once, and resumed."""

    api: str
    in_round: int
    after_seconds: float  # Since the round began
    resumed_after: int  # The last round that was saved; 0: it began anew
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
    stage = Stage(options_of(folder / "whole", api, num_rounds), _RULES)
    whole, chance = stage.play(), random.Random(f"{api} {seed}")
    if whole.state is None or whole.left_out:
        raise RuntimeError(f"the undisturbed run fails: {whole.log[-2000:]}")
    seconds = _seconds_of_a_round(whole)
    found = []
    for index in range(num_moments):
        after_round, late = chance.randrange(num_rounds), chance.uniform(0, seconds)
        for attempt in range(_ATTEMPTS):  # The last round may be shorter than others.
            at = folder / f"{index}-{attempt}"
            options = options_of(at, api, num_rounds)
            kill = _killed(options, (after_round, late / 2**attempt), whole)
            if kill.problems != [_TOO_LATE]:
                break
        found.append(kill)
        on_kill(kill)
    if all(each.is_same and not each.problems for each in found):
        shutil.rmtree(folder)
    return found


def _killed(options: RunOptions, moment: tuple[int, float], whole: Ended) -> Kill:
    after_round, seconds = moment
    due: list[float] = []
    mark = f"[ROUND {after_round + 1}"
    log = options.folder / "strategy.log"

    def strike(strategy: Any) -> None:
        if not due and log.exists() and mark in log.read_text(errors="replace"):
            due.append(time.monotonic() + seconds)
        if len(due) == 1 and time.monotonic() >= due[0]:
            due.append(0.0)
            strategy.kill()

    ended = Stage(options, _RULES).play(during=strike)
    resumed = re.findall(r"Resumed from .*/(\d+):", ended.log)
    problems = ["it hangs"] if ended.was_hung else []
    problems += [_TOO_LATE] if len(due) < _STRUCK else []
    if ended.state is None:
        problems.append(f"it does not end: {ended.log[-500:]}")
    is_same = ended.state is not None and not differences(
        ended.state, whole.state or {}
    )
    return Kill(
        api=options.api,
        in_round=after_round + 1,
        after_seconds=round(seconds, 3),
        resumed_after=int(resumed[-1]) if resumed else 0,
        is_same=is_same and _routes(ended) == _routes(whole),
        problems=problems,
    )


def _seconds_of_a_round(ended: Ended) -> float:
    """Return how long a round takes, its training and its evaluation."""
    rows = [row for row in ended.rows if "round_wall_clock_sec" in row]
    total = sum(row["round_wall_clock_sec"] for row in rows)
    return float(total) / len({row["round"] for row in rows})


def _routes(ended: Ended) -> dict[Any, Any]:
    """Say who did what in which round; a round that was trained again counts once."""
    return {
        (row["phase"], row["round"], row["client_key"]): (row["status"], row["loss"])
        for row in ended.rows
        if row.get("phase") in {"train", "evaluate"} and "loss" in row
    }


def shown(found: list[Kill]) -> Table:
    """Lay the kills out, for people."""
    table = Table("API", "killed in round", "after, s", "resumed after", box=None)
    table.add_column("bits")
    table.add_column("problems")
    for each in found:
        table.add_row(
            each.api,
            str(each.in_round),
            f"{each.after_seconds:.2f}",
            str(each.resumed_after),
            "the same" if each.is_same else "DIFFERENT",
            "\n".join(each.problems) or "none",
        )
    return table
