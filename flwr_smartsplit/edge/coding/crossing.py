"""Crossing: one end of a cut, where boundaries and gradients are coded and decoded.

``Raw`` sends them as they are. Other codecs take a few rows at a time, so that little
memory is needed beside the result. What came is checked before a byte is copied.
"""

from collections.abc import Sequence
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from flwr_smartsplit.edge.coding.coded_rows import (
    Places,
    Sent,
    coded_in,
    cost_of,
    wrong,
)
from flwr_smartsplit.edge.coding.packed_codes import (
    packed,
    packed_back,
    unpacked,
    unpacked_back,
)
from flwr_smartsplit.edge.coding.tensor_codes import (
    read,
    top,
    top_back,
    untop,
    untop_back,
    written,
)
from flwr_smartsplit.edge.protocol import Forward, OpenSession
from flwr_smartsplit.edge.tensors import Coded, WireTensor
from flwr_smartsplit.errors import RefusedMessage
from flwr_smartsplit.split.segment import Boundary
from flwr_smartsplit.train.rng import derived_seed
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.torch_device import CPU
from flwr_smartsplit.types import (
    RAW,
    Codec,
    Packed,
    Raw,
    TensorCost,
    TopK,
    back_codec,
    back_row_bytes,
    codec_at,
    sent_row_bytes,
)

KeptT = TypeVar("KeptT")


class Crossing:
    """One end of one cut: its codec, and the torch device of this place.

    Between a boundary and its gradient it keeps where values were sent, if the codec
    leaves any out; nothing stays longer.
    """

    def __init__(
        self,
        codec: Codec = RAW,
        device: torch.device = CPU,
        *,
        seed: tuple[int | str, ...] = (),  # Of what a codec draws in training
        is_trained: bool = True,
    ) -> None:
        self.codec = codec
        self.device = device
        self._seed = seed
        self.is_trained = is_trained
        self._places: list[Places | None] = []
        self.saved_sending = 0  # Bytes by which plain tensors would be larger
        self.saved_receiving = 0

    @classmethod
    def at(cls, opening: OpenSession, index: int, device: torch.device = CPU) -> Self:
        """Make an end of one of the cuts from a session on."""
        num_left = len(opening.codecs) if index == 0 else 1
        root = opening.seed, opening.round_number, opening.client_key
        return cls(
            codec_at(opening.codecs, index),
            device,
            seed=(*root, "codec", num_left),
            is_trained=opening.is_trained,
        )

    def encode_for(
        self, runner: SegmentRunner, boundary: Boundary, request: Forward
    ) -> tuple[Sent, ...]:
        """Encode the boundary that a runner made in a step."""
        return self.encode(
            boundary,
            gradients=runner.leaving,
            blocks=runner.blocks,
            step=request.part.in_step(request.step),
        )

    def encode(
        self,
        boundary: Sequence[Tensor],
        *,
        gradients: Sequence[bool] = (True,),  # Which of them get one, as the chain says
        blocks: Sequence[bool] = (),  # Where none passes at +0
        step: int | str = 0,
    ) -> tuple[Sent, ...]:
        """Encode a boundary that leaves."""
        if isinstance(self.codec, Raw):
            return tuple(map(WireTensor.pack, boundary))
        flags, blocks = _flags(gradients, boundary), _flags(blocks, boundary)
        pairs = [
            self._encoded(
                tensor.detach(),
                cost_of(tensor, is_context=_is_context(flags, index)),
                blocks[index],
                (step, index),
            )
            for index, tensor in enumerate(boundary)
        ]
        sent = self._kept_of(flags, pairs)
        self.saved_sending += _saved(sent)
        return sent

    def decode(
        self, boundary: Sequence[Sent], *, gradients: Sequence[bool] = (True,)
    ) -> tuple[Tensor, ...]:
        """Decode a boundary that came."""
        if isinstance(self.codec, Raw):
            return tuple(map(self._plain, boundary))
        flags = _flags(gradients, boundary)
        pairs = [
            self._decoded(sent, cost_of(sent, is_context=_is_context(flags, index)))
            for index, sent in enumerate(boundary)
        ]
        self.saved_receiving += _saved(boundary)
        return self._kept_of(flags, pairs)

    def encode_gradients(self, gradients: Sequence[Tensor]) -> tuple[Sent, ...]:
        """Encode the gradients of the boundary that was decoded last."""
        if isinstance(self.codec, Raw):
            return tuple(map(WireTensor.pack, gradients))
        sent = tuple(map(self._encoded_back, gradients, self._taken(gradients)))
        self.saved_sending += _saved(sent)
        return sent

    def decode_gradients(self, gradients: Sequence[Sent]) -> tuple[Tensor, ...]:
        """Decode the gradients of the boundary that was encoded last."""
        if isinstance(self.codec, Raw):
            return tuple(map(self._plain, gradients))
        self.saved_receiving += _saved(gradients)
        return tuple(map(self._decoded_back, gradients, self._taken(gradients)))

    def _kept_of(
        self, flags: Sequence[bool], pairs: Sequence[tuple[KeptT, Places | None]]
    ) -> tuple[KeptT, ...]:
        """Keep the places of what gets a gradient, in order."""
        places = [kept for flag, (_, kept) in zip(flags, pairs, strict=True) if flag]
        self._places = places if self.is_trained else []
        return tuple(one for one, _ in pairs)

    def _taken(self, gradients: Sequence[object]) -> list[Places | None]:
        """Take the places; there are as many as gradients."""
        places, self._places = self._places, []
        if len(gradients) != len(places):
            raise RefusedMessage(
                f"{len(gradients)} gradients came back for {len(places)} tensors: use "
                "one task and one release everywhere."
            )
        return places

    def _plain(self, sent: Sent) -> Tensor:
        if isinstance(sent, WireTensor):
            return sent.unpack(self.device)
        raise RefusedMessage(
            f"a coded tensor came over a cut whose codec is {self.codec}, which sends "
            "this one as it is: use one release of flwr_smartsplit everywhere."
        )

    # --- forward ------------------------------------------------------------------

    def _encoded(
        self, tensor: Tensor, cost: TensorCost, blocks: bool, at: tuple[int | str, int]
    ) -> tuple[Sent, Places | None]:
        codec = self.codec
        if isinstance(codec, Packed):
            return packed(tensor, blocks)
        if sent_row_bytes(codec, cost) is None:
            return WireTensor.pack(tensor), None
        if not isinstance(codec, TopK):
            return written(codec, tensor, cost), None
        chance = None
        if self.is_trained and codec.random_share:
            chance = np.random.default_rng(derived_seed(*self._seed, *at))
        return top(codec, tensor, cost, chance)

    def _decoded(self, sent: Sent, cost: TensorCost) -> tuple[Tensor, Places | None]:
        codec = self.codec
        if isinstance(codec, Packed):
            if isinstance(sent, WireTensor):
                return sent.unpack(self.device), None
            return unpacked(sent, cost, self.device)
        row_bytes = sent_row_bytes(codec, cost)
        if row_bytes is None:
            return self._plain(sent), None
        coded = coded_in(sent, codec, cost.num_rows * row_bytes)
        if isinstance(codec, TopK):
            return untop(codec, coded, cost, self.device)
        return read(codec, coded, cost, self.device), None

    # --- back ---------------------------------------------------------------------

    def _encoded_back(self, gradient: Tensor, places: Places | None) -> Sent:
        gradient, codec = gradient.detach(), self.codec
        cost = cost_of(gradient)
        if isinstance(codec, Packed) and places is None:
            return packed(gradient, False)[0]  # Behind a gate, it has zeros of its own.
        if isinstance(codec, Packed | TopK):
            if places is None or not cost.num_bytes:
                return WireTensor.pack(gradient)
            if isinstance(codec, TopK):
                return top_back(codec, gradient, cost, places)
            return packed_back(gradient, cost, places)
        if back_row_bytes(codec, cost) is None:
            return WireTensor.pack(gradient)
        return written(back_codec(codec), gradient, cost)

    def _decoded_back(self, sent: Sent, places: Places | None) -> Tensor:
        codec, cost = self.codec, cost_of(sent)
        if not cost.num_bytes:  # It stands for none.
            return self._plain(sent)
        if isinstance(codec, Packed | TopK):
            return self._decoded_at(sent, cost, places)
        row_bytes = back_row_bytes(codec, cost)
        if row_bytes is None:
            return self._plain(sent)
        back = back_codec(codec)
        coded = coded_in(sent, back, cost.num_rows * row_bytes)
        return read(back, coded, cost, self.device)

    def _decoded_at(
        self, sent: Sent, cost: TensorCost, places: Places | None
    ) -> Tensor:
        """Decode a gradient of which only some values came, or all as they are."""
        codec = self.codec
        if isinstance(codec, Packed) and isinstance(sent, Coded) and places is None:
            return unpacked(sent, cost, self.device)[0]
        is_plain = isinstance(codec, Packed) and isinstance(sent, WireTensor)
        if places is None or is_plain:
            return self._plain(sent)
        if (len(places.bits), places.width) != (cost.num_rows, cost.row_values):
            raise wrong(codec, f"a gradient of shape {cost.shape} came back")
        if isinstance(codec, TopK):
            return untop_back(codec, sent, cost, places)
        return unpacked_back(sent, cost, places)


def _flags(gradients: Sequence[bool], boundary: Sequence[object]) -> tuple[bool, ...]:
    """Say it for each tensor; False for those of which nothing is said."""
    return (*gradients, *(False,) * len(boundary))[: len(boundary)]


def _is_context(flags: Sequence[bool], index: int) -> bool:
    """Say whether a tensor only goes along: then it is not rounded."""
    return not flags[index] and (index > 0 or any(flags))


def _saved(sent: Sequence[Sent]) -> int:
    """Count the bytes by which plain tensors would be larger."""
    return sum(cost_of(each).num_bytes - each.data.size for each in sent)
