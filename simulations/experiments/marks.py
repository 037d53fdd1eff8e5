"""Marks: the small file that a method leaves beside its journal when it has finished.

A method without one was cut short. Runs are deterministic, so it starts again, from its
newest checkpoint or its first round, and ends at the same weights; the digest in the
mark is what proves it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUFFIX = ".finished.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What is known of a method's run once it has ended."""

    method: str  # Its name
    state_sha256: str  # ``state_digest`` of the final global state
    accuracy: float  # Share of the test set that the final model gets right
    num_rounds: int  # Rounds that were run


def mark_path(out: Path, method: str) -> Path:
    """Say where a method's mark is."""
    return out / f"{method}{SUFFIX}"


def state_digest(state: Mapping[str, NDArray[Any]]) -> str:
    """Digest names, types, shapes and bytes of a state, in the order of the names."""
    digest = sha256()
    for name in sorted(state):
        values = np.ascontiguousarray(state[name])
        header = json.dumps([name, values.dtype.str, state[name].shape])
        digest.update(header.encode() + b"\n" + values.tobytes())
    return digest.hexdigest()


def write_mark(out: Path, mark: Mark) -> None:
    """Write a mark, whole or not at all."""
    write_whole(mark_path(out, mark.method), json.dumps(asdict(mark)) + "\n")


def read_marks(out: Path) -> dict[str, Mark]:
    """Read the marks of a results folder, by method; none if there is no folder."""
    read = (
        Mark(**json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(out.glob(f"*{SUFFIX}"))
    )
    return {mark.method: mark for mark in read}


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new, never a part."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
