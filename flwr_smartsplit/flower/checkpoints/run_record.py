"""RunRecord: what a run has done so far, saved after its rounds and taken up again.

A resumed run goes through Flower's own loop from round 1 on. In the rounds that the
checkpoint holds, nothing is asked of anybody: the strategy answers what came out then.
So Flower's round numbers, log and results are those of one whole run.
"""

import secrets
from collections.abc import Callable, Mapping
from logging import ERROR, INFO, WARNING, Filter, LogRecord, getLogger
from typing import Any

import numpy.typing as npt

from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower.checkpoints.checkpoints import (
    Checkpoints,
    Saved,
    newest,
    save,
)
from flwr_smartsplit.flower.checkpoints.files import numbers_in
from flwr_smartsplit.flower.checkpoints.values import (
    Arrays,
    from_tree,
    object_tree,
    set_object,
    to_tree,
)
from flwr_smartsplit.flower.rounds.manager import CentralManager

State = Mapping[str, npt.NDArray[Any]]
Config = Any  # A ``ConfigRecord``, which Flower hands to every round
_MANAGED = ("history", "shapes", "has_merged", "variants_memory", "proxies")
_FLOWERS_LOOPS = ("strategy", "server", "default_workflows")
_log = getLogger("flwr")


class RunRecord:
    """Keep what came out of each round; save it, and answer with it after a restart.

    Without checkpoints, it keeps nothing.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        central: CentralManager,
        objects: Mapping[str, object],  # Whose state is saved, by name
    ) -> None:
        self._checkpoints = checkpoints
        self._central = central
        self._objects = objects
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.lineage = secrets.token_hex(8)
        """Names the run, also after it is resumed."""
        self.done = -1
        """The last round that a checkpoint has brought."""
        self.has_begun = False
        self._num_rounds: int | None = None
        self._results: dict[str, dict[int, Any]] = {}
        self._configs: dict[bool, Config] = {}
        self._saved_configs: dict[bool, Any] = {}
        self._left_out: set[str] = set()

    def begin(
        self,
        num_rounds: int | None,
        task_digest: Callable[[], str],
        settings: Callable[[], Mapping[str, str]],
    ) -> State | None:
        """Take up the newest checkpoint; return its state, or None to start anew."""
        if self._checkpoints is None:
            return None
        self.end()
        self._begin_anew()
        self._digests = task_digest(), settings()
        saved = newest(self._checkpoints, *self._digests)
        self.has_begun, self._num_rounds = True, num_rounds
        if saved is None:
            return None
        if num_rounds is not None and num_rounds < saved.number:
            raise SmartSplitError(
                f"num_rounds={num_rounds}, and the checkpoint {saved.number} in "
                f"{self._checkpoints.folder} is of a later round. Give the number of "
                "all rounds, another folder, or Checkpoints(..., resume=False)."
            )
        state = self._take_up(saved)
        _log.log(
            INFO,
            "Resumed from %s: rounds 1 to %s are done",
            self._checkpoints.path / str(saved.number),
            saved.number,
        )
        _log.addFilter(_OldRounds(saved.number))
        return state

    def end(self) -> None:
        """Show Flower's log again, wherever a run of this process ended."""
        for each in [each for each in _log.filters if isinstance(each, _OldRounds)]:
            _log.removeFilter(each)

    def _take_up(self, saved: Saved) -> State:
        run, arrays = saved.run, saved.arrays
        self.lineage, self.done = run["lineage"], saved.number
        self._results = from_tree(run["results"], arrays)
        self._saved_configs = from_tree(run["configs"], arrays)
        for name, value in from_tree(run["manager"], arrays).items():
            setattr(self._central, name, value)
        self._central.rounds.failures[:] = from_tree(run["failures"], arrays)
        for name, thing in self._objects.items():
            set_object(thing, run["objects"][name], arrays)
        state: State = from_tree(run["state"], arrays)
        return state

    # --- the rounds that a checkpoint holds ---------------------------------------

    def has(self, round_number: int) -> bool:
        """Say whether a checkpoint has brought the results of a round."""
        return round_number <= self.done

    def result(self, phase: str, round_number: int) -> Any:
        """Return what came out of a phase then; None if it was skipped."""
        return self._results.get(phase, {}).get(round_number)

    # --- the rounds of this process -----------------------------------------------

    def note(self, phase: str, round_number: int, result: Any) -> Any:
        """Keep what comes out of a phase, and return it."""
        if self.has_begun:
            self._results.setdefault(phase, {})[round_number] = result
        return result

    def follow(self, config: Config, *, is_train: bool) -> None:
        """Keep a phase's config in view, since Flower's strategies may change it."""
        if is_train in self._saved_configs:
            values = self._saved_configs.pop(is_train)
            config.clear()
            config.update(values)
        self._configs[is_train] = config

    def end_round(self, round_number: int, state: Callable[[], State]) -> None:
        """Save a round, if it is one of those to save. A full disk ends no run."""
        each = self._checkpoints
        if each is None or not self.has_begun or self.has(round_number):
            return
        if round_number % each.every and round_number != self._num_rounds:
            return
        try:
            save(each, round_number, *self._written(round_number, state()))
        except OSError as error:
            _log.log(
                ERROR,
                "The checkpoint of round %s cannot be written, and the run goes on: %s",
                round_number,
                error,
            )

    def oldest(self) -> int:
        """Return the first round after which the run may be resumed; 0 is its start."""
        if self._checkpoints is None or not self.has_begun:
            return -1
        return min(numbers_in(self._checkpoints.path), default=0)

    def _written(
        self, round_number: int, state: State
    ) -> tuple[dict[str, Any], Arrays]:
        arrays: Arrays = {}
        task_digest, settings = self._digests
        objects = {}
        for name, thing in self._objects.items():
            objects[name], left_out = object_tree(thing, arrays, name)
            self._warn_of(left_out)
        manager = {name: getattr(self._central, name) for name in _MANAGED}
        values = {
            "state": dict(state),
            "results": self._results,
            "configs": self._configs,
            "manager": manager,
            "failures": self._central.rounds.failures,
        }
        run = {
            "round": round_number,
            "lineage": self.lineage,
            "task": task_digest,
            "settings": dict(settings),
            "objects": objects,
            **{name: to_tree(value, arrays, name) for name, value in values.items()},
        }
        return run, arrays

    def _warn_of(self, left_out: list[str]) -> None:
        new = [name for name in left_out if name not in self._left_out]
        if new:
            self._left_out |= set(new)
            _log.log(
                WARNING,
                "Checkpoints leave out %s: if a round changes it, give it "
                "state_dict() and load_state_dict(state).",
                ", ".join(new),
            )


class _OldRounds(Filter):
    """Hide what Flower's loop logs about the rounds that were done before."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._last = last
        self._hides = False

    def filter(self, record: LogRecord) -> bool:
        """Say whether a line is to be shown."""
        text = str(record.msg)
        if text.startswith("[ROUND ") and isinstance(record.args, tuple):
            self._hides = int(str(record.args[0])) <= self._last
            if not self._hides:
                _log.removeFilter(self)
        elif text.startswith(("Strategy execution finished", "[SUMMARY]")):
            self._hides = False
        return not (self._hides and record.module in _FLOWERS_LOOPS)
