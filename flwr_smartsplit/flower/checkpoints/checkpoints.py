"""Checkpoints: where a run is saved, how often, and which one a new process takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower.checkpoints import files
from flwr_smartsplit.types.sizes import whole

_FORMAT = 2
_MOST_SHOWN = 3
_log = getLogger("flwr")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Save a run after its rounds, so that a new process goes on where it ended.

    Parameters
    ----------
    folder : str or Path
        One folder for one run, on a disk that outlives the process.
    every : int
        Save after each ``every``-th round, and after the last.
    keep : int
        How many to keep.
    resume : bool or "required"
        True goes on from the newest checkpoint of the same task, if there is one. False
        starts anew; ``"required"`` raises if there is none. Checkpoints that are not
        used are moved into ``set-aside-1`` and so on.
    """

    folder: str | Path
    every: int = 1
    keep: int = 2
    resume: bool | Literal["required"] = True

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            number = whole(getattr(self, name), name)
            object.__setattr__(self, name, number)
            if number < 1:
                raise ValueError(f"Checkpoints({name}={number}): give at least 1.")
        if self.resume not in {True, False, "required"}:
            raise ValueError(
                f'Checkpoints(resume={self.resume!r}): give True, False or "required".'
            )
        object.__setattr__(self, "folder", Path(self.folder).absolute())

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint: its round and its content."""

    number: int
    run: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]


def newest(
    checkpoints: Checkpoints, task_digest: str, settings: Mapping[str, str]
) -> Saved | None:
    """Find the newest checkpoint of a task, and set aside all that are not of its run.

    Damaged and foreign ones are logged and skipped. Raises ``SmartSplitError`` if it is
    of a run with other settings, or if one is required and there is none, and
    ``OSError`` if there can be no such folder.
    """
    folder, found = checkpoints.path, None
    kept: list[int] = []
    folder.mkdir(parents=True, exist_ok=True)
    numbers = files.numbers_in(folder)
    for number in numbers if checkpoints.resume else ():
        try:
            run, arrays = files.read(folder, number)
            why = _why_foreign(run, task_digest)
        except files.Damaged as error:
            why = f"is damaged: {error}"
        if not why:
            _require_same(folder / str(number), run["settings"], settings)
            found = Saved(number, run, arrays)
            kept = [number, *_older(folder, run, numbers)]
            break
        _log.log(
            WARNING, "The checkpoint %s is skipped: it %s", folder / str(number), why
        )
    if found is None and checkpoints.resume == "required":
        raise SmartSplitError(
            f'Checkpoints(resume="required"): {folder} has no checkpoint of this task, '
            f"and {len(numbers)} that are damaged or of another. Give the folder of "
            "the run, or resume=True to start anew."
        )
    unused = [number for number in numbers if number not in kept]
    if unused:
        aside = files.set_aside(folder, unused)
        what = "starts anew" if found is None else f"resumes after round {found.number}"
        rounds = ", ".join(map(str, unused))
        _log.log(
            WARNING,
            "The run %s; the checkpoints of rounds %s are not of it, and now in %s",
            what,
            rounds,
            aside,
        )
    return found


def save(
    checkpoints: Checkpoints,
    number: int,
    run: files.Run,
    arrays: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Save a round, then delete all but the newest few."""
    files.write(checkpoints.path, number, {"format": _FORMAT, **run}, arrays)
    for old in files.numbers_in(checkpoints.path)[checkpoints.keep :]:
        files.delete(checkpoints.path, old)


def _why_foreign(run: Mapping[str, Any], task_digest: str) -> str:
    if run.get("format") != _FORMAT:
        return "was written by another release of flwr_smartsplit"
    return "" if run["task"] == task_digest else "is of another task"


def _older(folder: Path, run: Mapping[str, Any], numbers: list[int]) -> list[int]:
    """List the sound checkpoints of the same run from before one."""
    older = []
    for number in numbers:
        try:
            other, _ = files.read(folder, number)
        except files.Damaged:
            continue
        if other["lineage"] == run["lineage"] and other["round"] < run["round"]:
            older.append(number)
    return older


def _require_same(
    path: Path, there: Mapping[str, str], here: Mapping[str, str]
) -> None:
    names = [n for n in {**here, **there} if here.get(n) != there.get(n)]
    if names:
        shown = "; ".join(
            f"{n} is {there.get(n, 'missing')} there and {here.get(n, 'missing')} here"
            for n in names[:_MOST_SHOWN]
        )
        more = len(names) - _MOST_SHOWN
        raise SmartSplitError(
            f"the checkpoint {path} is of a run with other settings: {shown}"
            f"{f'; and {more} more' if more > 0 else ''}. Give those of that run, "
            "another folder, or Checkpoints(..., resume=False) to start anew."
        )
