"""Deadline widths: each device trains the widest model that it ends in time."""

from collections.abc import Sequence
from dataclasses import dataclass

from flwr_smartsplit.plan.variants.variants import VariantRequest
from flwr_smartsplit.plan.variants.widths import checked_rates, slices
from flwr_smartsplit.types import Variant


@dataclass(frozen=True, slots=True)
class DeadlineWidths:
    """Offer each device the widest model with which its round ends in time.

    Parameters
    ----------
    seconds : float
        How long a client's part of a round may take.
    rates : tuple[float, ...]
        Shares of the channels of each layer, falling, in ``(0, 1]``.
    scaler : bool
        HeteroFL's scaler, as ``scale`` of ``Widths``.

    Raises
    ------
    ValueError
        If the seconds are not above 0, or the rates do not fall in ``(0, 1]``.

    Notes
    -----
    Times are those of the whole width on the device, from the speeds and links that it
    tells or that were learned. A device that misses the deadline at every width is
    offered the narrowest; one of unknown speed takes what its memory allows.

    Examples
    --------
    >>> DeadlineWidths(30.0).rates
    (1.0, 0.5, 0.25, 0.125)
    """

    seconds: float
    rates: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    scaler: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", checked_rates(self.rates))
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds!r:.40}: give more than 0.")

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Return the widths that end in time, the widest first; at least one."""
        widths = [*dict.fromkeys(slices(request.groups, self.rates, 0, self.scaler))]
        seconds = map(request.seconds_of, widths)
        times = zip(widths, seconds, strict=True)
        in_time = [w for w, each in times if each is None or each <= self.seconds]
        return in_time or widths[-1:]
