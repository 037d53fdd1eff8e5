"""Surrogate: a Gaussian process that learns what choosing a device and a cut brings.

Of SmartSplit's Bayesian optimisation nothing is public but that there is one. Kernel,
features, target and acquisition are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel

from flwr_smartsplit.plan.selection.history import Observation

Floats = npt.NDArray[np.float64]

LENGTH_SCALE = 2.0
NOISE = 1.0
CLIP = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """How the process is used.

    Parameters
    ----------
    kappa_first, kappa_last : float
        Weight of the uncertainty in the upper confidence bound, in the first rounds
        and in the long run.
    decay_rounds : float
        After so many rounds, about a third of the difference is left.
    """

    kappa_first: float = 2.0
    kappa_last: float = 0.5
    decay_rounds: float = 10.0

    def kappa(self, round_number: int) -> float:
        """Return the weight of the uncertainty in a round.

        Examples
        --------
        >>> Surrogate().kappa(0)
        2.0
        """
        share = float(np.exp(-round_number / self.decay_rounds))
        return self.kappa_last + (self.kappa_first - self.kappa_last) * share

    def bonus(
        self, window: Sequence[Observation], features: Floats, round_number: int
    ) -> Floats:
        """Return the upper confidence bound of what each choice brings.

        Parameters
        ----------
        window : Sequence[Observation]
            What was seen, with the features of then.
        features : ndarray
            Of the choices, shape (choices, features).
        round_number : int
            The round that is planned.

        Returns
        -------
        ndarray
            Shape (choices,), in standard deviations of what was seen.
        """
        process = GaussianProcessRegressor(
            # Fixed: to fit them again in every round takes longer and gained nothing.
            Matern(length_scale=LENGTH_SCALE, nu=2.5) + WhiteKernel(NOISE),
            optimizer=None,
        )
        seen = np.array([each.features for each in window], np.float64)
        process.fit(seen, rewards(window))
        mean, deviation = process.predict(features, return_std=True)
        bound: Floats = mean + self.kappa(round_number) * deviation
        return bound


def rewards(window: Sequence[Observation]) -> Floats:
    """Score what was seen: examples times the fall of the loss, per second.

    Around the median, in robust standard deviations, cut off at three of them.

    Examples
    --------
    >>> seen = [Observation(client_key="a", round_number=1, num_examples=n,
    ...                     loss_rms=1.0, loss_drop=1.0) for n in (1, 2, 3)]
    >>> rewards(seen).round(2).tolist()
    [-0.67, 0.0, 0.67]
    """
    gained = np.array(
        [each.num_examples * each.loss_drop / (each.seconds or 1.0) for each in window],
        np.float64,
    )
    around = gained - np.median(gained)
    scale = 1.4826 * np.median(np.abs(around))
    scaled: Floats = np.clip(around / (scale or 1.0), -CLIP, CLIP)
    return scaled
