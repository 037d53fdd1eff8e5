"""Momentum: the server goes on in the direction of the rounds before.

References
----------
Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated
Visual Classification. 2019. arXiv:1909.06335 (the server's momentum).
Liu et al.: Efficient Federated Learning Using Dynamic Update and Adaptive Pruning with
Momentum on Shared Server Data. ACM TIST 2024. arXiv:2408.05678 (FedDUM).
"""

from typing import Any

import numpy as np

from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.edge.regions import cut_state
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.server.aggregation import RoundStart, RoundSummary
from flwr_smartsplit.types import Regions
from flwr_smartsplit.types.sizes import plain


class Momentum:
    """A server step with a memory m of the changes so far.

    With the change ``d`` of a round it is ``m = beta * m + (1 - dampening) * d``, and
    the next state is the one before plus ``m``; the first change is ``m`` itself. With
    ``dampening=0`` it is FedAvgM with a server learning rate of 1. With
    ``Momentum(beta=0.9, dampening=0.9)``, FedDUM's, ``m`` is a mean of the last
    changes, and the state follows them some ten rounds late.

    It may stand in ``server_steps`` several times, as FedDUM's does, before and after
    the server's training; the memory is one, and ``d`` is then what changed since. Only
    parameters have momentum; buffers, such as BatchNorm's statistics, stay as they were
    merged. The memory is float64, part of checkpoints, and empty in round 1.

    Parameters
    ----------
    beta : float
        Share of the memory that is kept, at least 0 and below 1.
    dampening : float
        Share of a change that is left out of the memory, at least 0 and below 1.

    Examples
    --------
    >>> Momentum(beta=0.9, dampening=0.9)
    Momentum(beta=0.9, dampening=0.9)
    """

    def __init__(self, beta: float = 0.5, *, dampening: float = 0.0) -> None:
        self.beta, self.dampening = plain(beta), plain(dampening)
        if not (0 <= self.beta < 1 and 0 <= self.dampening < 1):
            raise ValueError(
                f"beta={beta}, dampening={dampening}: give numbers from 0 to below 1."
            )
        self._memory = _Memory()

    def __repr__(self) -> str:
        """Write it as it is made."""
        return f"Momentum(beta={self.beta}, dampening={self.dampening})"

    def prepare(self, start: RoundStart) -> None:
        """Forget another run's changes in round 1."""
        self._memory.names = start.parameter_names
        self._memory.left = {}
        if start.round_number == 1:
            self._memory.changes = {}

    def step(self, before: State, after: State, summary: RoundSummary) -> State:
        """Return the next state."""
        del summary
        memory, stepped = self._memory, dict(after)
        if memory.names is None:
            raise SmartSplitError(
                f"{self!r} has not been told which arrays are parameters: give it to "
                "SmartSplit(server_steps=...), which does so in each round."
            )
        for name in [name for name in after if name in memory.names]:
            array = after[name]
            wide = np.complex128 if array.dtype.kind == "c" else np.float64
            change = array.astype(wide) - memory.left.get(name, before[name])
            first = name not in memory.changes
            kept = change if first else self.beta * memory.changes[name]
            if not first:
                extra = kept - self.dampening * change
                # Where there is nothing to add, not even a negative zero changes.
                moved = np.where(extra == 0, array, array + extra)
                stepped[name] = moved.astype(array.dtype)
                kept = extra + change
            memory.changes[name] = kept
        memory.left = stepped
        return stepped

    def cut(self, regions: Regions) -> None:
        """Keep the memory of these values: the model has become smaller."""
        self._memory.changes = dict(cut_state(self._memory.changes, regions))

    def state_dict(self) -> dict[str, Any]:
        """Return the memory, for a checkpoint."""
        return dict(self._memory.changes)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint says."""
        self._memory.changes = dict(state)


class _Memory:
    """What a run leaves; no setting that a resumed run must have, too."""

    __slots__ = ("changes", "left", "names")

    def __init__(self) -> None:
        self.changes: dict[str, Any] = {}
        self.left: State = {}  # The state after its last step in this round
        self.names: frozenset[str] | None = None  # The parameters
