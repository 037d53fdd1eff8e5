"""Codecs: how the tensors that cross a cut are written and read again."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import EdgeError
from flwr_smartsplit.train.segment_runner import CPU
from flwr_smartsplit.types import RAW, codec_at


class Codec(Protocol):
    """Writes a tensor before it crosses a cut, and reads it on the other side.

    It is used for boundaries and for their gradients, in training and in evaluation,
    never for targets. It keeps nothing from one tensor to the next.
    """

    @property
    def name(self) -> str:
        """What plans and sessions call it."""

    def encode(self, tensor: Tensor) -> WireTensor:
        """Write a tensor of any device."""

    def decode(self, tensor: WireTensor, device: torch.device) -> Tensor:
        """Read it into a tensor of one's own, on a device."""


class Raw:
    """Writes every tensor as it is."""

    name = RAW

    def encode(self, tensor: Tensor) -> WireTensor:
        """Share the tensor's memory, where it is on the CPU and has no gaps."""
        return WireTensor.pack(tensor)

    def decode(self, tensor: WireTensor, device: torch.device) -> Tensor:
        """Copy the bytes."""
        return tensor.unpack().to(device)


CODECS: dict[str, Codec] = {RAW: Raw()}
"""Every codec by its name; both ends of a crossing need it."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """One end of a cut: a codec, and the device on which the place computes."""

    codec: Codec
    device: torch.device = CPU

    @classmethod
    def at(
        cls, codecs: tuple[str, ...], index: int, device: torch.device = CPU
    ) -> Self:
        """Find the codec of one of several crossings.

        Raises
        ------
        EdgeError
            If this place does not know it.
        """
        name = codec_at(codecs, index)
        if name not in CODECS:
            raise EdgeError(
                f"codec {name!r} is not one of {', '.join(CODECS)}: add it to CODECS "
                "at every place, or use one version everywhere."
            )
        return cls(CODECS[name], device)

    def encode(self, tensors: Iterable[Tensor]) -> tuple[WireTensor, ...]:
        """Write what crosses."""
        return tuple(self.codec.encode(tensor) for tensor in tensors)

    def decode(self, tensors: Iterable[WireTensor]) -> tuple[Tensor, ...]:
        """Read what crossed."""
        return tuple(self.codec.decode(tensor, self.device) for tensor in tensors)
