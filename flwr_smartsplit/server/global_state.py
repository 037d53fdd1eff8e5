"""The global state in two parts: what training cannot change is sent once, by digest.

An edge, and a node that can, keep the frozen part. Whoever has lost it, or has another,
is sent it again; a digest says so before anything is trained.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.edge.tensors import (
    array_digests,
    digest_of,
    joined_digest,
    state_digest,
)
from flwr_smartsplit.types import WHOLE, Variant


@dataclass(frozen=True, slots=True)
class GlobalState:
    """A global state, divided by what training can change."""

    changing: State = field(default_factory=dict)
    frozen: State = field(default_factory=dict)
    digest: str = ""  # Of all
    rest: str = ""  # Of the frozen part; "" if there is none
    frozen_digests: Mapping[str, str] = field(default_factory=dict)  # By name
    variant: Variant = WHOLE  # What it is the state of
    _others: dict[str, str] = field(default_factory=dict)  # Of changing arrays

    @classmethod
    def of(
        cls, state: State, changing: Collection[str], variant: Variant = WHOLE
    ) -> Self:
        """Divide a variant's state by the names that training can change."""
        mine = {name: array for name, array in state.items() if name in changing}
        frozen = {name: array for name, array in state.items() if name not in changing}
        digests = array_digests(frozen)
        rest = digest_of(digests) if frozen else ""
        digest = joined_digest(rest, state_digest(mine))
        return cls(mine, frozen, digest, rest, digests, variant)

    def digests_of(self, names: Iterable[str]) -> dict[str, str]:
        """Return arrays' digests by name; those a step freezes are found once."""
        names = list(names)
        new = set(names) - self.frozen_digests.keys() - self._others.keys()
        self._others.update(array_digests({n: self.changing[n] for n in sorted(new)}))
        known = {**self.frozen_digests, **self._others}
        return {name: known[name] for name in names}

    def is_still(self, state: State) -> bool:
        """Say whether a state, read anew, is this one in every bit.

        To compare takes a fraction of what a digest takes.
        """
        mine = {**self.changing, **self.frozen}
        return (
            bool(self.digest)
            and mine.keys() == state.keys()
            and all(_are_same(mine[name], array) for name, array in state.items())
        )


class KeptByNodes:
    """What each client's node keeps of the frozen state, as far as its replies say.

    A node that has lost it says so in its reply, and is sent it in the next round.
    """

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, str]] = {}

    def has(self, client_key: str, wanted: Mapping[str, str]) -> bool:
        """Say whether a node keeps arrays with these digests, by name."""
        kept = self._kept.get(client_key, {})
        return bool(wanted) and wanted.items() <= kept.items()

    def learn(
        self, client_key: str, sent: Mapping[str, str], reported_digest: str
    ) -> None:
        """Note what a reply says of the frozen arrays of its plan."""
        if sent and reported_digest == digest_of(sent):
            self._kept[client_key] = {**self._kept.get(client_key, {}), **sent}
        elif sent:
            self._kept.pop(client_key, None)


def _are_same(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Compare bits; an array that is the other one may have changed with it."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return not np.may_share_memory(one, other) and np.array_equal(
        _bits(one), _bits(other)
    )


def _bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"u{min(array.itemsize, 8)}")
