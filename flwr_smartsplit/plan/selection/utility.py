"""SelectByUtility: SmartSplit's choice of devices and routes, as we rebuild it.

SmartSplit weighs memory budget, training capacity and data distribution of each device
together (its abstract); how is not public. The factors are those of FedHybrid by the
same authors, as far as reviews tell, and of Oort; the sum of their normalised
logarithms is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.plan.placement import Places
from flwr_smartsplit.plan.selection.candidates import Candidate
from flwr_smartsplit.plan.selection.label_coverage import coverage_gains
from flwr_smartsplit.plan.selection.selection import (
    EDGES_FULL,
    Selection,
    SelectionRequest,
)
from flwr_smartsplit.types import RouteOption
from flwr_smartsplit.types.sizes import own_numbers

Floats = npt.NDArray[np.float64]

CLIP = 3.0
LEAST_CONSIDERED = 256  # Of a fleet of so many, all are considered
MOST_PASSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The factors of all candidates, shape (candidates,); NaN where nothing is known.

    All but ``waiting`` are logarithms; that one, in time, outweighs all else.
    """

    loss: Floats  # Examples times the root mean squared loss of the last round
    memory: Floats  # Budget over what the whole model needs, at most 1
    speed: Floats  # One over the seconds of the fastest route that fits
    waiting: Floats  # Rounds since it took part, over those until all could have


def factors_of(candidates: Sequence[Candidate], request: SelectionRequest) -> Factors:
    """Work out the factors; a client that never took part has the median loss."""
    latest = request.history.latest
    seen = [latest.get(each.client_key) for each in candidates]
    typical = np.median([s.loss_rms for s in latest.values()] or [1.0])
    examples = np.array([each.device.num_examples for each in candidates], np.float64)
    losses = np.array([typical if s is None else s.loss_rms for s in seen], np.float64)
    last = np.array([0 if s is None else s.round_number for s in seen], np.float64)
    missed = request.round_number - 1 - last
    share = [
        1.0
        if each.device.budget_bytes is None
        else min(1.0, each.device.budget_bytes / each.space.whole_peak_bytes)
        for each in candidates
    ]
    seconds = np.array([each.best_seconds for each in candidates], np.float64)
    return Factors(
        loss=np.log(np.maximum(examples * losses, 1e-12)),
        memory=np.log(np.array(share, np.float64)),
        speed=-np.log(seconds),
        waiting=missed * request.num_clients / max(len(candidates), 1),
    )


def normalised(values: Floats) -> Floats:
    """Shift and scale to mean 0 and deviation 1, cut off at 3; what is unknown is 0."""
    is_known = np.isfinite(values)
    known = values[is_known]
    scaled = np.zeros_like(values)
    deviation = float(known.std()) if len(known) else 0.0
    if deviation > 1e-9:  # noqa: PLR2004 - else they differ by rounding only
        scaled[is_known] = np.clip((known - known.mean()) / deviation, -CLIP, CLIP)
    return scaled


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectByUtility:
    """Choose whose utility is highest, one by one, with the route that serves best.

    The utility is the weighted sum of the normalised logarithms of these factors, as if
    they were multiplied; a weight of 0 switches one off. What a device does not report
    counts as average.

    Parameters
    ----------
    loss : float
        Weight of statistical utility: examples times the root mean squared loss.
    memory : float
        Weight of the share of the model's memory that a device has.
    speed : float
        Weight of one over the time that the client's part takes.
    coverage : float
        Weight of how much closer its labels, if it counts them, bring those of the
        chosen clients to those of all.
    waiting : float
        Weight of the rounds since a client took part: fairness.
    considered : int
        Candidates to consider per wanted client, the most promising before labels
        count; never fewer than 256 in all.
    """

    loss: float = 1.0
    memory: float = 0.0
    speed: float = 1.0
    coverage: float = 3.0
    waiting: float = 0.3
    considered: int = 10

    def __post_init__(self) -> None:
        own_numbers(self)

    def __call__(self, request: SelectionRequest) -> Selection:
        """Choose a round's clients."""
        return _Choosing(self, request).selection()


BY_UTILITY = SelectByUtility()


class _Choosing:
    """One selection: the candidates as arrays, and who is chosen so far."""

    def __init__(self, rule: SelectByUtility, request: SelectionRequest) -> None:
        self._order = list(range(len(request.candidates)))
        request.rng.shuffle(self._order)  # Among equals, chance decides.
        self._candidates = [request.candidates[index] for index in self._order]
        self._request = request
        self._places = Places(request.edges)
        factors = factors_of(self._candidates, request)
        parts = {
            "loss": rule.loss * normalised(factors.loss),
            "memory": rule.memory * normalised(factors.memory),
            "speed": rule.speed * normalised(factors.speed),
            "waiting": rule.waiting * factors.waiting,
        }
        self._counts, self._target, self._has_counts = _labels(self._candidates)
        self._coverage = rule.coverage * request.num_clients / log(2.0)
        self._prior = np.sum(list(parts.values()), axis=0)
        # Plain floats: those of numpy take several times as long to print.
        self._shown = [(name, part.tolist()) for name, part in parts.items()]
        size = max(rule.considered * request.num_clients, LEAST_CONSIDERED)
        self._pool = np.zeros(len(self._candidates), bool)  # Who is considered
        self._pool[np.argsort(-self._prior, kind="stable")[:size]] = True

    def selection(self) -> Selection:
        """Choose greedily, exchange, and see who finds room at an edge."""
        options: dict[int, RouteOption] = {}
        passed: dict[str, str] = {}
        is_left = self._pool.copy()
        queue = self._exchanged(self._greedy(self._request.num_clients))
        while len(options) < self._request.num_clients and is_left.any():
            index = queue.pop(0) if queue else self._next(list(options), is_left)
            is_left[index] = False
            candidate = self._candidates[index]
            option = self._places.place(
                candidate.device,
                candidate.preferred(),
                self._request.home(self._order[index]),
            )
            if option is None:
                passed[candidate.client_key] = EDGES_FULL
            else:
                options[index] = option
        taken = list(options)
        chosen = [
            self._candidates[index].assigned(option, why=self._why(index, taken))
            for index, option in options.items()
        ]
        return Selection(chosen=chosen, passed=passed | self._others(taken, passed))

    def _greedy(self, num_clients: int) -> list[int]:
        """Take one by one who adds most: each changes what others' labels add."""
        taken: list[int] = []
        is_left = self._pool.copy()
        for _ in range(min(num_clients, int(is_left.sum()))):
            taken.append(self._next(taken, is_left))
            is_left[taken[-1]] = False
        return taken

    def _next(self, taken: Sequence[int], is_left: npt.NDArray[np.bool_]) -> int:
        added = self._prior + self._gains(taken, is_left)
        return int(np.where(is_left, added, -np.inf).argmax())

    def _exchanged(self, taken: list[int]) -> list[int]:
        """Exchange one chosen client for another while that adds, for a few passes."""
        if not self._coverage or len(taken) == len(self._candidates):
            return taken
        for _ in range(MOST_PASSES):
            before = list(taken)
            for position in range(len(taken)):
                rest = taken[:position] + taken[position + 1 :]
                is_left = self._pool.copy()
                is_left[rest] = False
                taken[position] = self._next(rest, is_left)
            if taken == before:
                break
        return taken

    def _gains(self, taken: Sequence[int], asked: npt.NDArray[np.bool_]) -> Floats:
        """Say what the labels of some clients would add to those of others."""
        gains = np.zeros(len(self._candidates))
        rows = (asked & self._has_counts).nonzero()[0]
        if self._coverage and len(rows):
            covered = self._counts[list(taken)].sum(axis=0)
            found = coverage_gains(covered, self._counts[rows], self._target)
            gains[rows] = self._coverage * found
        return gains

    def _others(
        self, taken: Sequence[int], passed: Mapping[str, str]
    ) -> dict[str, str]:
        """Say of everybody who was not chosen how far down the list it is."""
        keys = [each.client_key for each in self._candidates]
        is_left = np.array([key not in passed for key in keys], bool)
        is_left[list(taken)] = False
        gains = self._gains(taken, is_left).tolist()
        left = is_left.nonzero()[0]
        ranked = left[np.argsort(-(self._prior + gains)[left], kind="stable")].tolist()
        wanted, total = self._request.num_clients, len(self._candidates)
        return {
            keys[index]: f"not chosen: number {len(taken) + rank} of {total}, "
            f"{wanted} were wanted; {self._said(index, gains[index])}"
            for rank, index in enumerate(ranked, start=1)
        }

    def _why(self, index: int, taken: Sequence[int]) -> str:
        """Say what a chosen client adds to the others."""
        asked = np.zeros(len(self._candidates), bool)
        asked[index] = True
        rest = [other for other in taken if other != index]
        return self._said(index, self._gains(rest, asked).item(index))

    def _said(self, index: int, gain: float) -> str:
        parts = [f"{name} {part[index]:+.2f}" for name, part in self._shown]
        total = self._prior.item(index) + gain
        return f"utility {total:+.2f} ({', '.join(parts)}, labels {gain:+.2f})"


def _labels(
    candidates: Sequence[Candidate],
) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Return each client's label counts, the distribution of all, and who says so."""
    told = [each.device.traits.label_counts for each in candidates]
    num_classes = max((len(counts) for counts in told if counts is not None), default=1)
    table = np.zeros((len(candidates), num_classes))
    for row, counts in zip(table, told, strict=True):
        if counts is not None:
            row[: len(counts)] = counts
    totals = table.sum(axis=0)
    has_counts = np.array([counts is not None for counts in told], bool)
    return table, totals / max(totals.sum(), 1.0), has_counts
