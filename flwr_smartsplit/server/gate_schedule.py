"""PruneSchedule: how many channels the gates of a model open, round by round.

The phases live in the state: the server writes a gate's budget and its open channels
between two rounds, so every place of a round, and every resumed run, has the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.gates import BUDGET, GATE_END, LOGITS, OPEN
from flwr_smartsplit.server.aggregation import RoundSummary
from flwr_smartsplit.train.rng import derived_seed
from flwr_smartsplit.types import GATE
from flwr_smartsplit.types.sizes import whole

_CERTAIN = 0.9  # VCCprune's: gates above it have been of use
_OPEN, _CLOSED = 15.0, -15.0
_WIDTH = 3.0
_FULL_OF_22 = 7  # VCCprune's figures: 15 rounds at the budget, then 7 with all channels


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePhase:
    """Some rounds with one budget.

    Parameters
    ----------
    rounds : int
        How many.
    budget : int, optional
        How many channels of each gate are open; None opens all, unrounded.
    reset : "reopen" or "narrow", optional
        What the phase does to the gates' parameters as it begins. ``reopen`` draws
        those below 0.9 anew, and opens the others for good; ``narrow`` draws those
        above 0.9 anew, and closes the others for good.
    """

    rounds: int
    budget: int | None
    reset: Literal["reopen", "narrow"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", whole(self.rounds, "rounds"))
        if self.budget is not None:
            object.__setattr__(self, "budget", whole(self.budget, "budget"))
        if self.rounds < 1 or (self.budget is not None and self.budget < 1):
            raise ValueError(
                f"rounds={self.rounds}, budget={self.budget}: a phase has at least 1 "
                "round, and opens at least 1 channel; budget=None opens all."
            )
        if self.reset not in {None, "reopen", "narrow"}:
            raise ValueError(
                f'reset is {self.reset!r}: give "reopen", "narrow" or None.'
            )


@dataclass(frozen=True, slots=True)
class PruneSchedule:
    """Open some channels of each gate in some rounds, as ``between_rounds``.

    In a round with a budget, the channels with the largest parameters in the merged
    state are open, of equal ones the first; all clients have the same. The last phase
    goes on to the end of the run.

    Parameters
    ----------
    phases : Sequence[GatePhase]
        In the order of the rounds.
    width : float
        Parameters that are drawn anew lie between 0 and this.
    seed : int
        Of these draws.

    Examples
    --------
    >>> schedule = PruneSchedule.deprune(budget=4, rounds=22)
    >>> [(phase.rounds, phase.budget) for phase in schedule.phases]
    [(15, 4), (7, None)]
    """

    phases: Sequence[GatePhase]
    width: float = _WIDTH
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases or not 0 < self.width < float("inf"):
            raise ValueError(
                f"phases={self.phases}, width={self.width}: give at least one phase, "
                "and a width above 0."
            )

    @classmethod
    def deprune(
        cls, *, budget: int, rounds: int, full_rounds: int | None = None, seed: int = 0
    ) -> Self:
        """Begin with few channels, end with all.

        Parameters
        ----------
        budget : int
            How many channels are open at first.
        rounds : int
            All rounds.
        full_rounds : int, optional
            How many of them, at the end, have all channels; 7 of 22 by default.
        seed : int
            Of the draws as they open.
        """
        full = max(1, round(rounds * _FULL_OF_22 / 22))
        full = full if full_rounds is None else full_rounds
        first = GatePhase(rounds=rounds - full, budget=budget)
        last = GatePhase(rounds=full, budget=None, reset="reopen")
        return cls((first, last), seed=seed)

    @classmethod
    def prune(
        cls,
        *,
        budgets: Sequence[int] = (32, 4),
        rounds: Sequence[int] = (10, 10),
        seed: int = 0,
    ) -> Self:
        """Close more and more channels of a model that was trained with all of them.

        Parameters
        ----------
        budgets : Sequence[int]
            How many channels are open, phase by phase.
        rounds : Sequence[int]
            How long.
        seed : int
            Of the draws as each phase begins.
        """
        if len(budgets) != len(rounds):
            raise ValueError(f"budgets={budgets}, rounds={rounds}: give one per phase.")
        return cls(
            [
                GatePhase(rounds=each, budget=budget, reset="narrow")
                for budget, each in zip(budgets, rounds, strict=True)
            ],
            seed=seed,
        )

    def first_state(self, state: State) -> State:
        """Return a run's first state with the gates as round 1 has them.

        Raises
        ------
        InvalidTask
            If the model has no gate, or one with fewer channels than a budget.
        """
        gates = dict(_gates(state))
        if not gates:
            raise InvalidTask(
                "the model has no gate for the PruneSchedule: wrap Task.model_fn in "
                "gated(model_fn, after=...)."
            )
        budgets = [phase.budget or 0 for phase in self.phases]
        for name, logits in gates.items():
            if max(budgets) > len(logits):
                raise InvalidTask(
                    f"the gate {name} has {len(logits)} channels, and a phase of the "
                    f"PruneSchedule opens {max(budgets)}: give smaller budgets."
                )
        return self._at(1, state)

    def __call__(self, round_number: int, state: State, summary: RoundSummary) -> State:
        """Return the state of the round after this one."""
        del summary
        return self._at(round_number + 1, state)

    def _at(self, round_number: int, state: State) -> State:
        phase, begins = self._phase(round_number)
        changed: dict[str, npt.NDArray[Any]] = {}
        for name, before in _gates(state):
            logits = before
            if begins and phase.reset is not None:
                seed = derived_seed(self.seed, round_number, "gates", name)
                logits = self._reset(before, phase.reset, np.random.default_rng(seed))
                changed[f"{name}{GATE}.{LOGITS}"] = logits
            is_open = np.ones(len(logits), bool)
            if phase.budget is not None:
                is_open[np.argsort(-logits, kind="stable")[phase.budget :]] = False
            for end in (GATE, GATE_END):
                changed[f"{name}{end}.{OPEN}"] = is_open
                changed[f"{name}{end}.{BUDGET}"] = np.array(phase.budget or 0, np.int64)
        return {**state, **changed}

    def _phase(self, round_number: int) -> tuple[GatePhase, bool]:
        """Return the phase of a round, and whether it begins with it."""
        first = 1
        for phase in self.phases[:-1]:
            if round_number < first + phase.rounds:
                return phase, round_number == first
            first += phase.rounds
        return self.phases[-1], round_number == first

    def _reset(
        self, logits: npt.NDArray[Any], how: str, rng: np.random.Generator
    ) -> npt.NDArray[Any]:
        drawn = rng.uniform(0.0, self.width, len(logits)).astype(logits.dtype)
        if how == "reopen":
            return np.where(logits < _CERTAIN, drawn, logits.dtype.type(_OPEN))
        return np.where(logits > _CERTAIN, drawn, logits.dtype.type(_CLOSED))


def _gates(state: Mapping[str, Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield what stands before the names of each gate, and its parameters."""
    last = f"{GATE}.{LOGITS}"
    for name, array in state.items():
        if name == last or name.endswith(f".{last}"):
            yield name.removesuffix(last), np.asarray(array)
