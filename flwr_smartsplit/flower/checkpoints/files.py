"""Numbered folders that are there whole or not at all.

Each holds ``state.safetensors``, the arrays, and ``run.json``, all else, with the
SHA-256 of both. A folder is written under another name, forced to the disk, renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

_STATE = "state.safetensors"
_RUN = "run.json"
_UNFINISHED = ".unfinished"

Run = dict[str, Any]


class Damaged(Exception):
    """A folder is not as it was written."""


def numbers_in(folder: Path) -> list[int]:
    """List the numbers of the finished folders, the newest first; drop unfinished."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)
    names = (path.name for path in folder.glob("*") if path.is_dir())
    return sorted((int(n) for n in names if n.isdecimal()), reverse=True)


def write(
    folder: Path, number: int, run: Run, arrays: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write one folder; ``OSError`` if the disk is full or the number is taken."""
    unfinished = folder / f"{number}{_UNFINISHED}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    state, text = unfinished / _STATE, unfinished / _RUN
    try:
        save_file(dict(arrays), state)
        sha256 = {"state": _sha_of_file(state), "run": _sha_of(run)}
        text.write_text(json.dumps({"sha256": sha256, "run": run}))
        for path in (state, text, unfinished):
            _force(path)
        unfinished.rename(folder / str(number))
        _force(folder)
    except SafetensorError as error:
        raise OSError(f"{state} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read(folder: Path, number: int) -> tuple[Run, dict[str, npt.NDArray[Any]]]:
    """Read one folder, or raise ``Damaged``."""
    path = folder / str(number)
    try:
        found = json.loads((path / _RUN).read_text())
        run: Run = found["run"]
        sha256 = {"state": _sha_of_file(path / _STATE), "run": _sha_of(run)}
        if found["sha256"] != sha256:
            raise Damaged("its SHA-256 is not that with which it was written")
        return run, load_file(path / _STATE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(f"it cannot be read: {error!r:.120}") from error


def delete(folder: Path, number: int) -> None:
    """Delete one folder; it is never seen in part."""
    unfinished = folder / f"{number}{_UNFINISHED}"
    (folder / str(number)).rename(unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)


def set_aside(folder: Path, numbers: list[int]) -> Path:
    """Move folders out of the way; return where they are."""
    names = (folder / f"set-aside-{index}" for index in count(1))
    aside = next(path for path in names if not path.exists())
    aside.mkdir()
    for number in numbers:
        (folder / str(number)).rename(aside / str(number))
    return aside


def _sha_of(run: Run) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def _sha_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _force(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows opens no folder.
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
