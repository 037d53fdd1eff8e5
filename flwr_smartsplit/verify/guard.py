"""The guard: before a task is first trained, its chain trains beside the stock module.

It knows no list of what a trace, a rerun or a moved cut may get wrong. Two steps of a
small batch, along a few routes, must give the stock module's bits. At most ten steps of
the whole model, once for each task, version and machine.
"""

import hashlib
import math
import os
import platform
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from flwr_smartsplit.errors import NotExact, bytes_text
from flwr_smartsplit.memory.cap import CapMode
from flwr_smartsplit.plan.checkpointing.stages import stages_of
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.python_state import chance_restored
from flwr_smartsplit.task import Task, copied_loss
from flwr_smartsplit.task_digest.facts import facts_digest, task_facts
from flwr_smartsplit.types import (
    KEEP_ALL,
    ChainProfile,
    Codec,
    RecomputePlan,
    Rerun,
    Route,
    Verify,
)
from flwr_smartsplit.verify.equivalence import CutCheck, RouteChecker, example_batches
from flwr_smartsplit.verify.reference import Batches

CACHE_VARIABLE = "SMARTSPLIT_CACHE"
"""Names the folder that remembers which tasks were compared."""
VERIFY_VARIABLE = "SMARTSPLIT_VERIFY"
"""``off`` lets ``verify="once"`` compare nothing, as in tests of tiny runs."""

_log = getLogger("flwr")
_MOST_EXAMPLES = 2
_MOST_NAMED = 3
_COPIES = 3  # Of the state: initial, final, and that of the edges
_done: set[tuple[str, bool]] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One way to train two steps: see ``RouteChecker.check``."""

    route: Route
    recompute: tuple[RecomputePlan, RecomputePlan] = (KEEP_ALL, KEEP_ALL)
    move_to: int | None = None
    is_evaluated: bool = False

    def __str__(self) -> str:
        return ", ".join(filter(None, (f"route {self.route}", self.change())))

    def change(self) -> str:
        """Say what it does beside going along its route."""
        words = []
        if any(not plan.is_empty for plan in self.recompute):
            first, second = self.recompute
            words.append(f"recomputing {first} in the first step and {second} after it")
        if self.move_to is not None:
            words.append(f"the first cut moved to {self.move_to} after one step")
        return ", ".join(words)

    def run(self, checker: RouteChecker, codecs: tuple[Codec, ...] = ()) -> CutCheck:
        """Train and compare."""
        return checker.check(
            self.route,
            recompute=self.recompute,
            move_to=self.move_to,
            is_evaluated=self.is_evaluated,
            codecs=codecs,
        )

    def growing(self, size: int) -> list[tuple[int, "Trial"]]:
        """List trials that change one unit more each, with that unit; the last is this.

        Units are recomputed from the first on, and moved from the cut on.
        """
        if self.move_to is not None:
            cut = self.route.cuts[0]
            if self.move_to < cut:
                moves = range(cut - 1, self.move_to - 1, -1)
                return [(to, replace(self, move_to=to)) for to in moves]
            moves = range(cut + 1, self.move_to + 1)
            return [(to - 1, replace(self, move_to=to)) for to in moves]
        plan = self.recompute[0]
        found = []
        for stop in range(1, size + 1):
            part = RecomputePlan(
                tuple(
                    Rerun(rerun.start, min(rerun.stop, stop))
                    for rerun in plan.reruns
                    if rerun.start < stop
                ),
                tuple(unit for unit in plan.selective if unit < stop),
            )
            found.append((stop - 1, replace(self, recompute=(part, part))))
        return found

    def parts(self) -> Iterator["Trial"]:
        """Yield simpler trials, to find out which part of this one goes wrong."""
        plain = Trial(route=Route.whole(), is_evaluated=self.is_evaluated)
        yield plain
        for cut in self.route.cuts:
            yield replace(plain, route=Route.split(cut))
        for plan in dict.fromkeys(self.recompute):
            if not plan.is_empty:
                yield replace(plain, route=self.route, recompute=(plan, plan))
        if self.move_to is not None:
            yield replace(plain, route=self.route, move_to=self.move_to)


def guard_trials(profile: ChainProfile, *, may_recompute: bool = True) -> list[Trial]:
    """List what the guard compares: three trials of two steps.

    The whole model recomputes all that it may, in both ways. One cut lies behind almost
    all units and moves before them; over several edges, one moves the other way.
    """
    size = len(profile.units)
    plans = _plans(profile, Route.whole()) if may_recompute else (KEEP_ALL, KEEP_ALL)
    trials = [Trial(route=Route.whole(), recompute=plans)]
    if size > 1:
        last = size - 1
        move_to = 1 if last > 1 else None
        trials.append(Trial(route=Route.split(last), move_to=move_to))
    cuts = tuple(sorted({1, size // 2, 3 * size // 4} - {0, size}))
    if len(cuts) > 1:
        route = Route.hops(cuts, edges=tuple(f"edge {cut}" for cut in cuts))
        move_to = cuts[1] - 1 if cuts[1] - 1 > cuts[0] else None
        trials.append(Trial(route=route, move_to=move_to))
    trials[-1] = replace(trials[-1], is_evaluated=True)
    return trials


def route_trials(profile: ChainProfile, route: Route) -> list[Trial]:
    """List what ``smartsplit check`` adds on a route: recompute, and move the cut."""
    size = len(profile.units)
    trials = [Trial(route=route, recompute=_plans(profile, route))]
    if len(route.cuts) == 1 and size > 2:  # noqa: PLR2004 - there is another cut
        cut = route.cuts[0]
        trials.append(Trial(route=route, move_to=cut - 1 if cut > 1 else cut + 1))
    return [trial for trial in trials if trial != Trial(route=route)]


def _plans(profile: ChainProfile, route: Route) -> tuple[RecomputePlan, RecomputePlan]:
    """Plan to rerun all that may be, and to be selective wherever that saves memory."""
    leg, *_ = route.device_legs(len(profile.units))
    stages = stages_of(profile, leg)
    reruns = []
    for may, group in groupby(stages, key=lambda stage: stage.can_rerun):
        found = list(group)
        if may:
            reruns.append(Rerun(found[0].start, found[-1].stop))
    selective = {
        unit for stage in stages for run in stage.runs for unit in run.selective
    }
    return RecomputePlan(tuple(reruns)), RecomputePlan((), tuple(sorted(selective)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Where a task is compared, and how often.

    With ``budget_bytes``, only if the comparison fits. ``"always"`` reads no record of
    earlier comparisons; a client's process compares once even so.
    """

    mode: Verify = "once"
    place: str = "the strategy"
    is_client: bool = False
    may_recompute: bool = True
    budget_bytes: int | None = None

    def verify(
        self,
        task: Task,
        profile: Callable[[], ChainProfile],
        *,
        config: Mapping[str, Any],
        task_digest: str = "",
    ) -> None:
        """Compare a task's chain with its stock module, unless that was done before.

        ``profile`` finds the chain's costs at any batch size; ``config`` is a round's;
        ``task_digest`` is the task's, if the caller knows it. Raises ``NotExact`` with
        the unit and tensor that differ.
        """
        once = self.mode == "once"
        if self.mode == "off" or (once and os.environ.get(VERIFY_VARIABLE) == "off"):
            return
        digest = task_digest or facts_digest(task_facts(task, build_chain(task).model))
        key = self._key(digest)
        record = cache_folder() / "verified" / key
        looked = key, self.is_client
        is_known = looked in _done and (once or self.is_client)
        if is_known or (once and record.exists()):
            return
        known = profile()
        if task.defence is not None:  # No stock module has one.
            task = replace(task, defence=None)
            known = profile_of(task, batch_size=known.batch_size)
        if not self._has_room(known):
            return
        trials = guard_trials(known, may_recompute=self.may_recompute)
        if compare(task, trials, config=config, place=self.place):
            _remember(record)
        _done.add(looked)

    def _has_room(self, profile: ChainProfile) -> bool:
        """Say whether a whole step and copies of the state fit the budget."""
        state = sum(unit.parameter_bytes + unit.buffer_bytes for unit in profile.units)
        needed = profile.units[-1].device_peak_bytes + _COPIES * state
        if self.budget_bytes is None or needed <= self.budget_bytes:
            return True
        _log.debug(
            "%s does not compare the chain with the stock module: that takes %s, and "
            "the budget is %s.",
            *(self.place, bytes_text(needed), bytes_text(self.budget_bytes)),
        )
        return False

    def _key(self, task_digest: str) -> str:
        """Identify what a comparison depends on: the task, our code, the machine."""
        machine = platform.machine(), torch.backends.cpu.get_cpu_capability()
        text = repr(
            (task_digest, _our_code(), torch.__version__, machine, self.may_recompute)
        )
        return hashlib.sha256(text.encode()).hexdigest()


def compare(
    task: Task, trials: Sequence[Trial], *, config: Mapping[str, Any], place: str
) -> bool:
    """Run trials beside the stock module; raise ``NotExact`` at the first difference.

    Returns whether that was possible: a task may not take batches that nobody chose.
    """
    with chance_restored():
        checker = _checker(task, config, place)
        if checker is None:
            return False
        with checker:
            for trial in trials:
                found = trial.run(checker).differences
                if found:
                    raise _not_exact(checker, trial, found, place)
    return True


def _checker(task: Task, config: Mapping[str, Any], place: str) -> RouteChecker | None:
    """Train the stock module on drawn batches; on the examples if it cannot."""
    micro = min(task.accumulate, 2)
    own = replace(
        task, accumulate=micro, is_local=None, loss_fn=copied_loss(task.loss_fn)
    )
    reason = ""
    for batches in _batches(own, size=_MOST_EXAMPLES * micro):
        try:
            made = RouteChecker(
                own, batches, cap_mode=CapMode.OFF, config=config, ends=batches[:1]
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if made.is_finite:
            return made
        reason = "its loss or state is not finite after two steps"
    _log.warning(
        "%s cannot compare the chain with the stock module, which does not train on "
        "the task's example inputs: %s. Give examples of your data's values, or "
        "SmartSplit(verify=False).",
        *(place, reason),
    )
    return None


def _batches(task: Task, *, size: int) -> Iterator[Batches]:
    """Draw two small batches like the examples; then repeat the examples."""
    yield example_batches(task, batch_size=size)[:2]
    examples = task.example_inputs, task.example_targets

    def repeated(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim():
            return tensor
        return torch.cat([tensor] * math.ceil(size / len(tensor)))[:size]

    yield [tree_map_only(torch.Tensor, repeated, examples)] * 2


# --- what to say ----------------------------------------------------------------------


def _not_exact(
    checker: RouteChecker, trial: Trial, differences: Sequence[str], place: str
) -> NotExact:
    """Find the simplest part of a trial that differs, and its first unit that does."""
    tried = ((part, part.run(checker).differences) for part in trial.parts())
    part, found = next((x for x in tried if x[1]), (trial, differences))
    unit, tensor = _blamed(checker, part, found)
    named = ", ".join(found[:_MOST_NAMED])
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return NotExact(
        f"{type(checker.chain.model).__name__} does not train as its stock PyTorch "
        f"module does. Unit {unit!r} differs first ({tensor}), at {part}: "
        f"{named}{more}. Nothing was trained. {_ADVICE} (Compared on {place}, in two "
        "steps from the same values.)",
        unit=unit,
        tensor=tensor,
        trial=str(part),
    )


def _blamed(
    checker: RouteChecker, part: Trial, found: Sequence[str]
) -> tuple[str, str]:
    """Name the unit that goes wrong, and the tensor that shows it."""
    names = checker.chain.unit_names
    unit, tensor = culprit(checker.chain, found)
    if part.change():
        trials = part.growing(len(names))
        first = bisect_left(
            trials, True, key=lambda each: bool(each[1].run(checker).differences)
        )
        index, fewest = trials[min(first, len(trials) - 1)]
        found = fewest.run(checker).differences or found
        return names[index], culprit(checker.chain, found)[1] or found[0]
    if part.route.cuts:
        return names[part.route.cuts[0] - 1], tensor or found[0]
    return (unit, tensor) if unit else checker.first_difference()


_ADVICE = (
    "List its units by hand (Task(units_fn=...)), or write the unit's forward with "
    "tensors and registered buffers only; `smartsplit check` shows every cut. "
    "SmartSplit(verify=False) trains it all the same."
)


def culprit(chain: Chain, differences: Sequence[str]) -> tuple[str, str]:
    """Name the unit and the tensor that differ first; empty names if none stands out.

    Backward runs from the last unit to the first. So if the units behind one have the
    right gradients in the first step that differs, that one is to blame.
    """
    owner: dict[str, int] = {}
    for index in range(len(chain)):
        for name in chain.state_names(index, index + 1):
            owner.setdefault(name, index)
    trained = {n for n, p in chain.model.named_parameters() if p.requires_grad}
    behind = max((owner[name] for name in trained & owner.keys()), default=-1)
    gradients = [text.split() for text in differences if text.startswith("gradient ")]
    step = min((words[-1] for words in gradients), default="")
    names = [words[1] for words in gradients if words[-1] == step]
    names = names or [t.split()[1] for t in differences if t.startswith("state ")]
    known = [name for name in names if name in owner]
    last = max(known, key=lambda name: owner[name], default="")
    if not last or (gradients and owner[last] == behind):
        return "", ""  # Forward went wrong, or all of it.
    return chain.unit_names[owner[last]], last


# --- what was compared before ---------------------------------------------------------


def cache_folder() -> Path:
    """Name the user's folder for what was compared; a variable sets another."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flwr_smartsplit"


@cache
def _our_code() -> str:
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for source in sorted(folder.rglob("*.py")):
        digest.update(source.relative_to(folder).as_posix().encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _remember(record: Path) -> None:
    """Write down that a task was compared; without a disk it is compared again."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.touch()
    except OSError as error:
        _log.debug("cannot write %s: %s", record, error)
