"""Widths: devices that cannot hold the model train a share of its channels.

References
----------
.. [1] Diao, Ding, Tarokh, "HeteroFL: Computation and Communication Efficient Federated
   Learning for Heterogeneous Clients", ICLR 2021, arXiv:2010.01264.
.. [2] Alam, Liu, Yan, Zhang, "FedRolex: Model-Heterogeneous Federated Learning with
   Rolling Sub-Model Extraction", NeurIPS 2022, arXiv:2212.01548.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from flwr_smartsplit.plan.variants.variants import VariantRequest
from flwr_smartsplit.types import ChannelGroup, Variant, width_of
from flwr_smartsplit.types.sizes import plain


@dataclass(frozen=True, slots=True)
class Widths:
    """Offer the model at several widths, the widest first.

    Parameters
    ----------
    rates : tuple[float, ...]
        Shares of the channels of each layer, falling, in ``(0, 1]``. Without 1.0,
        nobody trains the whole model.
    roll : bool
        Whether the channels that are kept move on by one in each round, as in FedRolex
        [2]_, so that all are trained; else they are the first ones, as in HeteroFL
        [1]_.
    scale : bool
        Whether narrow clients scale their layers' outputs up in training, where no
        normalisation follows: HeteroFL's scaler.

    Raises
    ------
    ValueError
        If the rates do not fall, or one is not in ``(0, 1]``.

    Notes
    -----
    A layer keeps the least number of channels that is at least its share; those that a
    GroupNorm normalises together stay together, and roll together. Rates that keep the
    same channels are offered once, under the name of the largest.

    Examples
    --------
    >>> Widths((1.0, 0.5, 0.25)).rates
    (1.0, 0.5, 0.25)
    """

    rates: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    roll: bool = False
    scale: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", checked_rates(self.rates))

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Return the widths, the widest first."""
        shift = request.round_number - 1 if self.roll else 0
        widths = slices(request.groups, self.rates, shift, self.scale)
        return tuple(dict.fromkeys(widths))


@lru_cache(maxsize=64)
def slices(
    groups: tuple[ChannelGroup, ...],
    rates: tuple[float, ...],
    shift: int,
    is_scaled: bool,
) -> tuple[Variant, ...]:
    """Make the variant of each rate, which all devices of a round share.

    Rates that keep the same channels have one, under the name of the largest.
    """
    found: dict[tuple[tuple[str, tuple[int, ...]], ...], Variant] = {}
    every: list[Variant] = []
    for rate in rates:
        variant = width_of(groups, rate, shift=shift, is_scaled=is_scaled)
        every.append(found.setdefault(tuple(variant.kept.items()), variant))
    return tuple(every)


def checked_rates(given: Sequence[float]) -> tuple[float, ...]:
    """Return rates as floats; ``ValueError`` if they do not fall in ``(0, 1]``."""
    rates = tuple(_number(rate) for rate in given)
    are_falling = all(one > other for one, other in pairwise(rates))
    if not rates or not are_falling or not all(0 < rate <= 1 for rate in rates):
        raise ValueError(
            f"rates is {given!r:.80}: give falling shares of the channels in "
            "(0, 1], such as (1.0, 0.5, 0.25)."
        )
    return rates


def _number(rate: object) -> float:
    value = plain(rate)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a rate is {rate!r:.40}: give a number in (0, 1].")
    return float(value)
