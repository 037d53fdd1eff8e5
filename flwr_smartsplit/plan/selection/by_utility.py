"""SelectByUtility: SmartSplit's choice of devices and routes, as we rebuild it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, log
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.plan.placement import Places
from flwr_smartsplit.plan.selection.candidates import Candidate
from flwr_smartsplit.plan.selection.label_coverage import coverage_gains
from flwr_smartsplit.plan.selection.selection import (
    EDGES_FULL,
    Chosen,
    Selection,
    SelectionRequest,
    place,
)
from flwr_smartsplit.plan.selection.utility import factors_of, normalised

if TYPE_CHECKING:  # It needs scikit-learn, and is off by default.
    from flwr_smartsplit.plan.selection.surrogate import Surrogate

Floats = npt.NDArray[np.float64]
OFFERS_PER_CLIENT = 3
LEAST_SHORTLIST = 64
LEAST_POOL = 256
"""Of a fleet of so many, all are considered."""
MOST_PASSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectByUtility:
    """Choose whose utility is highest, one by one, with the route that serves best.

    The utility is the weighted sum of the normalised logarithms of these factors, so
    their product; a weight of 0 switches one off. What a device does not say counts as
    average.

    Parameters
    ----------
    loss : float
        Weight of statistical utility: examples times the root mean squared loss.
    memory : float
        Weight of the share of the model's memory that a device has.
    speed : float
        Weight of one over the time that the client's part takes.
    coverage : float
        Weight of how much closer a client brings the labels of those chosen to the
        labels of all; only of clients that share their label counts.
    waiting : float
        Weight of the rounds since a client took part: fairness.
    surrogate : Surrogate or None
        Adds what a Gaussian process expects a client and a cut to bring; None: nothing.
    surrogate_weight : float
        Its weight.
    considered : int
        For each client that is wanted, so many of the most promising are considered,
        labels aside; never fewer than 256.

    Examples
    --------
    >>> SelectByUtility(coverage=0.0).coverage
    0.0
    """

    loss: float = 1.0
    memory: float = 0.0
    speed: float = 1.0
    coverage: float = 3.0
    waiting: float = 0.3
    surrogate: "Surrogate | None" = None
    surrogate_weight: float = 0.3
    considered: int = 10

    def __call__(self, request: SelectionRequest) -> Selection:
        """Choose a round's clients."""
        return _Choosing(self, request).selection()


BY_UTILITY = SelectByUtility()
"""With its usual weights."""


class _Choosing:
    """One selection: the candidates as arrays, and who is chosen so far."""

    def __init__(self, rule: SelectByUtility, request: SelectionRequest) -> None:
        self._order = list(range(len(request.candidates)))
        request.rng.shuffle(self._order)  # Among equals, chance decides.
        self._candidates = [request.candidates[index] for index in self._order]
        self._rule = rule
        self._request = request
        self._places = Places(request.edges)
        factors = factors_of(
            self._candidates,
            request.history,
            round_number=request.round_number,
            num_clients=request.num_clients,
        )
        self._parts = {
            "loss": rule.loss * normalised(factors.loss),
            "memory": rule.memory * normalised(factors.memory),
            "speed": rule.speed * normalised(factors.speed),
            "waiting": rule.waiting * factors.waiting,
        }
        self._counts, self._target, self._has_counts = _labels(self._candidates)
        self._coverage = rule.coverage * request.num_clients / log(2.0)
        self._prior = np.sum(list(self._parts.values()), axis=0)
        self._wanted: list[Sequence[int]] = [
            [each.best, *each.fits] for each in self._candidates
        ]
        self._features: list[tuple[float, ...]] = [()] * len(self._candidates)
        if rule.surrogate is not None:
            self._learn(rule.surrogate)
        # Plain floats: those of numpy take several times as long to print.
        self._shown = [(name, part.tolist()) for name, part in self._parts.items()]
        size = max(rule.considered * request.num_clients, LEAST_POOL)
        self._promising = np.argsort(-self._prior, kind="stable")[:size]

    def selection(self) -> Selection:
        """Choose greedily, exchange, and see who finds room at an edge."""
        chosen: list[Chosen] = []
        passed: dict[str, str] = {}
        is_left = self._pool()
        queue = self._exchanged(self._greedy(self._request.num_clients))
        taken: list[int] = []
        while len(chosen) < self._request.num_clients and is_left.any():
            index = queue.pop(0) if queue else self._next(taken, is_left)
            is_left[index] = False
            placed = place(
                self._candidates[index],
                self._wanted[index],
                self._places,
                self._request.home(self._order[index]),
            )
            if placed is None:
                passed[self._key(index)] = EDGES_FULL
            else:
                taken.append(index)
                chosen.append(placed)
        said = [
            replace(each, why=self._why(index, taken), features=self._features[index])
            for index, each in zip(taken, chosen, strict=True)
        ]
        return Selection(chosen=said, passed=passed | self._others(taken, passed))

    def _pool(self) -> npt.NDArray[np.bool_]:
        """Mark the candidates among whom the choice is made."""
        is_in = np.zeros(len(self._candidates), bool)
        is_in[self._promising] = True
        return is_in

    def _greedy(self, num_clients: int) -> list[int]:
        """Take one by one who adds most: each changes what others' labels add."""
        taken: list[int] = []
        is_left = self._pool()
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
            for position, index in enumerate(taken):
                rest = taken[:position] + taken[position + 1 :]
                is_left = self._pool()
                is_left[rest] = False
                best = self._next(rest, is_left)
                if best != index:
                    taken[position] = best
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
        keys = map(self._key, range(len(self._candidates)))
        is_left = np.array([key not in passed for key in keys], bool)
        is_left[list(taken)] = False
        gains = self._gains(taken, is_left).tolist()
        left = is_left.nonzero()[0]
        ranked = left[np.argsort(-(self._prior + gains)[left], kind="stable")].tolist()
        wanted, total = self._request.num_clients, len(self._candidates)
        return {
            self._key(index): f"not chosen: number {len(taken) + rank} of {total}, "
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

    def _key(self, index: int) -> str:
        return self._candidates[index].device.client_key

    # --- the surrogate ------------------------------------------------------------

    def _learn(self, surrogate: "Surrogate") -> None:
        """Add what the surrogate expects of the clients that promise most."""
        request = self._request
        size = max(3 * request.num_clients, LEAST_SHORTLIST)
        shortlist = np.argsort(-self._prior, kind="stable")[:size]
        pairs = [
            (int(index), offer)
            for index in shortlist
            for offer in _distinct(self._candidates[int(index)])
        ]
        features = np.array([self._pair_features(*pair) for pair in pairs], np.float64)
        window = [seen for seen in request.history.window if seen.features]
        bonus = np.zeros(len(pairs))
        if len(window) >= 2 * request.num_clients:
            bonus = surrogate.bonus(window, features, request.round_number)
        learned = np.full(len(self._candidates), float(bonus.min(initial=0.0)))
        best: dict[int, int] = {}
        for place_, (index, _) in enumerate(pairs):
            if index not in best or bonus[place_] > bonus[best[index]]:
                best[index] = place_
        for index, place_ in best.items():
            learned[index] = bonus[place_]
            offer = pairs[place_][1]
            self._wanted[index] = [offer, *self._wanted[index]]
            self._features[index] = tuple(features[place_].tolist())
        self._parts["learned"] = self._rule.surrogate_weight * learned
        self._prior = self._prior + self._parts["learned"]

    def _pair_features(self, index: int, offer: int) -> tuple[float, ...]:
        """Describe a client and a cut: the factors, the device's share, the time."""
        candidate = self._candidates[index]
        work = candidate.menu.offers[offer].work
        total = work.device_flops + work.edge_flops
        share = work.device_flops / total if total else 1.0
        seconds = float(candidate.seconds[(candidate.fits == offer).argmax()])
        longer = 0.0 if isnan(seconds) else np.log(seconds / candidate.best_seconds)
        own = [float(self._parts[name][index]) for name in self._parts]
        return (*own, share, float(longer))


def _distinct(candidate: Candidate) -> list[int]:
    """Take the fastest offers of a client; the first ones if nobody knows."""
    order = candidate.fits
    if not isnan(candidate.best_seconds):
        order = order[np.argsort(candidate.seconds, kind="stable")]
    return [int(index) for index in order[:OFFERS_PER_CLIENT]]


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
