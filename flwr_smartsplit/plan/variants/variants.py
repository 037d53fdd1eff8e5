"""Variants: what a device is offered to train in a round, the most wanted first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr_smartsplit.types import WHOLE, ChannelGroup, DeviceProfile, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRequest:
    """What a rule may know when it offers variants to one device.

    Parameters
    ----------
    device : DeviceProfile
        The device, with its budget and what it tells of itself.
    round_number : int
        The round, counted from 1.
    groups : tuple[ChannelGroup, ...]
        The channels of the model that may be left out, in the model's order.
    """

    device: DeviceProfile
    round_number: int
    groups: tuple[ChannelGroup, ...]


class Variants(Protocol):
    """Offers each device variants of the global model in each round."""

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Return at least one variant, the most wanted first.

        A device trains the first of them under which any route fits it.
        """


@dataclass(frozen=True, slots=True)
class Whole:
    """Everybody trains the whole model."""

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Return the whole model."""
        del request
        return (WHOLE,)
