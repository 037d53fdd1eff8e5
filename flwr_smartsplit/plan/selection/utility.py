"""Utility: what choosing a client promises, as a product of normalised factors.

SmartSplit weighs memory budget, training capacity and data distribution of each device
together (its abstract); how is not public. The factors are those of FedHybrid by the
same authors, as far as reviews tell, and of Oort; the sum of their normalised
logarithms is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.plan.selection.candidates import Candidate
from flwr_smartsplit.plan.selection.history import History

Floats = npt.NDArray[np.float64]

CLIP = 3.0
FACTORS = ("loss", "memory", "speed", "waiting")


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The factors of all candidates, as logarithms; NaN where nothing is known.

    Parameters
    ----------
    loss : ndarray
        Examples times the root mean squared loss of the client's last round, shape
        (candidates,); of clients that never took part, with the median loss.
    memory : ndarray
        Budget over what the whole model needs, at most 1.
    speed : ndarray
        One over the seconds of the fastest route that fits.
    waiting : ndarray
        Rounds since the client took part, in turns: after one, everybody could have
        taken part once. No logarithm, so that in time it outweighs all else.
    """

    loss: Floats
    memory: Floats
    speed: Floats
    waiting: Floats


def factors_of(
    candidates: Sequence[Candidate],
    history: History,
    *,
    round_number: int,
    num_clients: int,
) -> Factors:
    """Work the factors out.

    Parameters
    ----------
    candidates : Sequence[Candidate]
        Every client that has a route.
    history : History
        What earlier rounds brought.
    round_number : int
        The round that is planned, counted from 1.
    num_clients : int
        How many are to be chosen.
    """
    seen = [history.latest.get(each.device.client_key) for each in candidates]
    typical = np.median([s.loss_rms for s in history.latest.values()] or [1.0])
    examples = np.array([each.device.num_examples for each in candidates], np.float64)
    losses = np.array([typical if s is None else s.loss_rms for s in seen], np.float64)
    last = np.array([0 if s is None else s.round_number for s in seen], np.float64)
    share = [
        1.0
        if each.device.budget_bytes is None
        else min(1.0, each.device.budget_bytes / each.menu.whole_peak_bytes)
        for each in candidates
    ]
    seconds = np.array([each.best_seconds for each in candidates], np.float64)
    return Factors(
        loss=np.log(np.maximum(examples * losses, 1e-12)),
        memory=np.log(np.array(share, np.float64)),
        speed=-np.log(seconds),
        waiting=(round_number - 1 - last) * num_clients / max(len(candidates), 1),
    )


def normalised(values: Floats) -> Floats:
    """Shift and scale to mean 0 and deviation 1, cut off at 3; what is unknown is 0.

    Examples
    --------
    >>> normalised(np.array([1.0, 3.0, np.nan])).tolist()
    [-1.0, 1.0, 0.0]
    """
    is_known = np.isfinite(values)
    known = values[is_known]
    scaled = np.zeros_like(values)
    deviation = float(known.std()) if len(known) else 0.0
    if deviation > 1e-9:  # noqa: PLR2004 - else they differ by rounding only
        scaled[is_known] = np.clip((known - known.mean()) / deviation, -CLIP, CLIP)
    return scaled
