"""Oort: choose clients by loss and speed, among those that hold the whole model.

Written anew from the paper and the defaults of its authors' code. Oort knows no memory
limits: a device that cannot hold the model cannot take part.

References
----------
Lai, Zhu, Madhyastha, Chowdhury: Oort: Efficient Federated Learning via Guided
Participant Selection. OSDI 2021. arXiv:2010.06081.
"""

from dataclasses import dataclass
from math import isnan, log, sqrt

import numpy as np
import numpy.typing as npt

from flwr_smartsplit import Selection, SelectionRequest
from flwr_smartsplit.plan.selection.candidates import Candidate
from flwr_smartsplit.plan.selection.history import Observation
from simulations.methods.method import NO_RECOMPUTE, Method, split_strategy

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectLikeOort:
    """Exploit clients of high utility; explore new ones, the fast ones first."""

    # Share of clients never tried: at first, times so much each round, and at least
    exploration: float = 0.9
    exploration_decay: float = 0.95
    least_exploration: float = 0.2
    clip_quantile: float = 0.98  # Utilities above this quantile count as that
    penalty: float = 2.0  # Exponent of preferred over real duration, for slower ones
    preferred_percentile: float = 50.0  # Of the durations seen
    cutoff: float = 0.7  # Within this share of the last one needed are drawn from, too

    def __call__(self, request: SelectionRequest) -> Selection:
        """Choose a round's clients."""
        seen = request.history.latest
        tried = [c for c in request.candidates if c.client_key in seen]
        new = [c for c in request.candidates if c.client_key not in seen]
        decay = self.exploration_decay ** (request.round_number - 1)
        share = max(self.exploration * decay, self.least_exploration)
        wanted = min(request.num_clients, len(request.candidates))
        num_new = min(len(new), max(round(wanted * share), wanted - len(tried)))
        chosen = [
            *self._exploit(request, tried, wanted - num_new),
            *_explore(request, new, num_new),
        ]
        return request.take(chosen)

    def _exploit(
        self, request: SelectionRequest, tried: list[Candidate], count: int
    ) -> list[Candidate]:
        """Draw from the best, in proportion to their utility."""
        if count == 0:
            return []
        last = [request.history.latest[each.client_key] for each in tried]
        utilities = self.utilities(last, request.round_number)
        least = self.cutoff * np.sort(utilities)[-count]
        pool = [index for index, value in enumerate(utilities) if value >= least]
        drawn = []
        for _ in range(count):
            weights = [max(float(utilities[index]), 1e-12) for index in pool]
            index = request.rng.choices(pool, weights)[0]
            pool.remove(index)
            drawn.append(tried[index])
        return drawn

    def utilities(self, last: list[Observation], round_number: int) -> Floats:
        """Score clients by what they last did."""
        statistical = np.array([each.importance for each in last])
        clip = np.quantile(statistical, self.clip_quantile)
        least = statistical.min()
        scaled = (np.minimum(statistical, clip) - least) / max(clip - least, 1e-12)
        ages = [sqrt(0.1 * log(round_number) / each.round_number) for each in last]
        score: Floats = scaled + np.array(ages)
        seconds = np.array([each.seconds or np.nan for each in last])
        if np.isfinite(seconds).all():
            preferred = np.percentile(seconds, self.preferred_percentile)
            slow = np.minimum(preferred / seconds, 1.0) ** self.penalty
            score = score * slow
        return score


def _explore(
    request: SelectionRequest, new: list[Candidate], count: int
) -> list[Candidate]:
    """Draw clients never tried, in proportion to their speed if it is known."""
    pool, drawn = list(new), []
    for _ in range(count):
        speeds = [1.0 / each.best_seconds for each in pool]
        weights = None if any(map(isnan, speeds)) else speeds
        drawn.append(request.rng.choices(pool, weights)[0])
        pool.remove(drawn[-1])
    return drawn


OORT = Method(
    name="oort",
    summary="by loss and speed among those who can hold the whole model",
    strategy_fn=lambda setting: split_strategy(
        setting, has_edges=False, constraints=NO_RECOMPUTE, select=SelectLikeOort()
    ),
)
