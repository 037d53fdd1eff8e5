"""Codecs: how tensors are encoded to cross a cut, and decoded behind it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import EdgeError
from flwr_smartsplit.train.torch_device import CPU
from flwr_smartsplit.types import RAW, codec_at


class Codec(Protocol):
    """Encodes tensors before they cross a cut, and decodes them behind it; stateless.

    Boundaries and gradients go through it, also in evaluation; targets do not.
    """

    @property
    def name(self) -> str:
        """Its name in plans and sessions."""

    def encode(self, tensor: Tensor) -> WireTensor:
        """Encode a tensor of any device."""

    def decode(self, tensor: WireTensor, device: torch.device) -> Tensor:
        """Decode into a new tensor on a device."""


class Raw:
    """Sends every tensor unchanged."""

    name = RAW

    def encode(self, tensor: Tensor) -> WireTensor:
        """Describe the tensor; see ``WireTensor.pack``."""
        return WireTensor.pack(tensor)

    def decode(self, tensor: WireTensor, device: torch.device) -> Tensor:
        """Copy the bytes."""
        return tensor.unpack(device)


CODECS: dict[str, Codec] = {RAW: Raw()}
"""Every codec by name; both ends of a crossing must know it."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """One end of a cut: a codec, and the torch device of this place."""

    codec: Codec
    device: torch.device = CPU

    @classmethod
    def at(
        cls, codecs: tuple[str, ...], index: int, device: torch.device = CPU
    ) -> Self:
        """Find the codec of one of several crossings, or raise ``EdgeError``."""
        name = codec_at(codecs, index)
        if name not in CODECS:
            raise EdgeError(
                f"codec {name!r} is not one of {', '.join(CODECS)}: add it to CODECS "
                "on every device and edge, or use one release everywhere."
            )
        return cls(CODECS[name], device)

    def encode(self, tensors: Iterable[Tensor]) -> tuple[WireTensor, ...]:
        """Encode what crosses."""
        return tuple(self.codec.encode(tensor) for tensor in tensors)

    def decode(self, tensors: Iterable[WireTensor]) -> tuple[Tensor, ...]:
        """Decode what crossed."""
        return tuple(self.codec.decode(tensor, self.device) for tensor in tensors)
