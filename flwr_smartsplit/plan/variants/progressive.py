"""Progressive: train a model block by block, so that no step needs all of its memory.

References
----------
.. [1] Wu et al., "ProFL: Breaking the Memory Wall for Heterogeneous Federated Learning
   via Progressive Training", KDD 2025, arXiv:2404.13349, and its published code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.plan.variants.movement import Movement, noted
from flwr_smartsplit.plan.variants.variants import RoundOutcome, VariantRequest
from flwr_smartsplit.types import WHOLE, Variant
from flwr_smartsplit.types.sizes import plain

_LEAST_BLOCKS = 1


@dataclass(frozen=True, slots=True)
class Progressive:
    """Train one block of a model after the other, each behind those that are frozen.

    In step ``t``, blocks before ``t`` run forward only, block ``t`` is trained, small
    proxies stand for the blocks after it, and the units behind the last block, the
    head, are trained in every step. After the last step all of the model is trained.

    Parameters
    ----------
    blocks : tuple[str or int, ...]
        Where blocks end: the name of the last unit, or what the names of its units
        begin with, such as ``"layer1"``; or the number of the first unit behind it.
    pace : tuple[int, ...] or Movement
        Rounds of each block's step, in which somebody was merged; the last step goes on
        to the end of the run. Or until the block's effective movement has ended.

    Raises
    ------
    ValueError
        If there is no block, or the rounds are not one number for each.

    Examples
    --------
    >>> rule = Progressive(("layer1", "layer2", "layer3", "layer4"), pace=(5, 5, 5, 5))
    >>> [step.name for step in rule.steps(("conv", "layer1", "layer2", "layer3",
    ...     "layer4", "fc"))]
    ['block 1 of 4', 'block 2 of 4', 'block 3 of 4', 'block 4 of 4']
    """

    blocks: tuple[str | int, ...]
    pace: tuple[int, ...] | Movement = field(default_factory=Movement)

    def __post_init__(self) -> None:
        blocks = tuple(map(plain, self.blocks))
        if isinstance(self.blocks, str) or len(blocks) < _LEAST_BLOCKS:
            raise ValueError(
                f"blocks is {self.blocks!r:.80}: name the last unit of each block."
            )
        object.__setattr__(self, "blocks", blocks)
        if isinstance(self.pace, Movement):
            return
        pace = tuple(map(plain, self.pace))
        if len(pace) != len(blocks) or not all(type(n) is int and n > 0 for n in pace):
            raise ValueError(
                f"pace is {self.pace!r:.80}: give a number of rounds for each of the "
                f"{len(blocks)} blocks, or a Movement."
            )
        object.__setattr__(self, "pace", pace)

    # --- what the strategy asks ---------------------------------------------------

    def steps(self, units: Sequence[str]) -> tuple[Variant, ...]:
        """List all steps in their order, for a chain with these units.

        Raises
        ------
        InvalidTask
            If the blocks do not end at rising places of this chain, before its end.
        """
        ends = self._ends(units)
        return tuple(self._step(ends, at) for at in range(len(ends)))

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Return the present step."""
        at = _position(request.memory)
        return (self.steps(tuple(request.units))[at],)

    def learned(self, outcome: RoundOutcome) -> dict[str, Any]:
        """Count the round, and go on to the next step if this one has ended."""
        at, ends = _position(outcome.memory), self._ends(tuple(outcome.units))
        memory = outcome.memory or {"step": 0, "rounds": 0}
        memory = {**memory, "rounds": memory["rounds"] + 1}
        if isinstance(self.pace, Movement):
            start, stop = [0, *ends][at], ends[at]
            own = list(outcome.units.values())[start:stop]
            names = [name for unit in own for name in unit]
            memory |= noted(memory, outcome.state, names, window=self.pace.window)
        is_last = at == len(ends) - 1
        if not is_last and self._has_ended(at, memory):
            # The last movement is still to be shown.
            return {"step": at + 1, "rounds": 0, "shown": self.shown(memory)}
        return {name: value for name, value in memory.items() if name != "shown"}

    def shown(self, memory: Any) -> dict[str, float]:
        """Say what the journal's row of a round shows of what was learned."""
        memory = memory or {}
        if memory.get("movements"):
            return {"effective_movement": memory["movements"][-1]}
        return dict(memory.get("shown", {}))

    # --- the schedule -------------------------------------------------------------

    def _has_ended(self, at: int, memory: Mapping[str, Any]) -> bool:
        if isinstance(self.pace, Movement):
            return self.pace.has_ended(memory["movements"], memory["rounds"])
        return bool(memory["rounds"] >= self.pace[at])

    def _step(self, ends: Sequence[int], at: int) -> Variant:
        frozen, later = [0, *ends][at], tuple(pairwise(ends[at:]))
        if not (frozen or later):
            return WHOLE
        name = f"block {at + 1} of {len(ends)}"
        return Variant(name, frozen=frozen, proxies=later)

    def _ends(self, units: Sequence[str]) -> tuple[int, ...]:
        """Find the first unit behind each block."""
        found = tuple(_end_of(block, units) for block in self.blocks)
        are_rising = all(one < other for one, other in pairwise((0, *found)))
        if not are_rising or found[-1] >= len(units):
            raise InvalidTask(
                f"the blocks {', '.join(map(str, self.blocks))} end before units "
                f"{found} of a chain of {len(units)}: they must rise, and leave at "
                f"least one unit behind the last. The units are {', '.join(units)}."
            )
        return found


def _position(memory: Any) -> int:
    return 0 if memory is None else int(memory["step"])


def _end_of(block: str | int, units: Sequence[str]) -> int:
    if isinstance(block, int):
        return block
    found = [
        index + 1
        for index, name in enumerate(units)
        if name == block or name.startswith(f"{block}.")
    ]
    if not found:
        raise InvalidTask(
            f"no unit is {block!r} or a part of it, so no block ends there. The units "
            f"that a block can end with are {', '.join(units[:-1])}."
        )
    return found[-1]
