"""Tensors and states as plain bytes with a shape, as they are sent.

Strides are sent too, because kernels choose their order of summation by them: with
contiguous copies, ConvNeXt's results differed at 24 of its 29 cuts.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from flwr_smartsplit.split.layout import ALIGNMENT, is_dense, num_spanned
from flwr_smartsplit.train.torch_device import CPU

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16),
        *(torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}
"""The dtypes of tensors that may be sent, by name."""

MAX_DIMS = 32
# The most memory of a tensor with gaps, as a multiple of its values: the last token of
# a sequence has gaps as long as the sequence.
MAX_SPREAD = 2**14


@lru_cache(maxsize=1024)
def check_layout(
    dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    """Raise ``ValueError`` unless a tensor may lie in memory like this."""
    if dtype not in DTYPES:
        raise ValueError(f"{dtype!r:.99} is none of {', '.join(DTYPES)}.")
    if not len(shape) == len(strides) <= MAX_DIMS or any(
        not 0 <= number < 2**62 for number in (*shape, *strides)
    ):
        raise ValueError(
            f"shape {shape} with strides {strides}: give as many numbers in both, "
            f"at most {MAX_DIMS}, from 0 to 2**62."
        )
    if not 0 <= offset < ALIGNMENT:
        raise ValueError(f"offset {offset} is not in 0..{ALIGNMENT - 1}.")
    if num_spanned(shape, strides) > MAX_SPREAD * prod(shape):
        raise ValueError(
            f"strides {strides} lay {prod(shape)} values over more than {MAX_SPREAD} "
            "times their memory: send a contiguous copy."
        )


@dataclass(frozen=True, slots=True)
class Coded:
    """What a codec other than ``Raw`` made of a tensor, and where the tensor lies.

    The bytes are as the codec of the cut writes them; both ends know it from the plan.
    """

    data: npt.NDArray[np.uint8]
    dtype: str  # Of the tensor, as torch calls it
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # In elements; without gaps
    offset: int = 0  # In bytes, of its first value from an aligned address
    blocks: bool = False  # Whether no gradient passes where it is +0
    has_channels: bool = False  # Whether whole channels are left out, not values

    def __post_init__(self) -> None:
        check_layout(self.dtype, self.shape, self.strides, self.offset)
        size = prod(self.shape) * DTYPES[self.dtype].itemsize
        is_dense_here = is_dense(self.shape, self.strides)
        if not is_dense_here or not self.shape or 0 in self.shape:
            raise ValueError(
                f"a coded tensor of shape {self.shape} with strides {self.strides}: "
                "what is coded has rows, and no gaps between its values."
            )
        data = self.data
        if data.dtype != np.uint8 or data.ndim != 1 or data.size >= size:
            raise ValueError(
                f"{data.dtype} of shape {data.shape} codes {size} bytes: what would "
                "not become smaller is sent as it is."
            )


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor's bytes, in the order they have in memory, and how to read them."""

    data: npt.NDArray[np.uint8]
    dtype: str  # Torch's name, such as ``float32``
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # In elements
    offset: int = 0  # In bytes, of its first value from an aligned address

    def __post_init__(self) -> None:
        check_layout(self.dtype, self.shape, self.strides, self.offset)
        num_bytes = prod(self.shape) * DTYPES[self.dtype].itemsize
        data = self.data
        if data.dtype != np.uint8 or data.shape != (num_bytes,):
            raise ValueError(
                f"a tensor of shape {self.shape} and {self.dtype} has {num_bytes} "
                f"bytes, not {data.dtype} of shape {data.shape}."
            )

    @classmethod
    def pack(cls, tensor: Tensor) -> Self:
        """Describe a tensor; on the CPU it is copied only if its memory has gaps.

        From an accelerator, the copy goes through pinned memory where there is any.
        """
        tensor = tensor.detach()
        has_no_gaps = is_dense(tuple(tensor.shape), tensor.stride())
        values = tensor if has_no_gaps else tensor.contiguous()
        flat = values.as_strided((values.numel(),), (1,))
        return cls(
            data=on_cpu(flat).view(torch.uint8).numpy(),
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            offset=tensor.data_ptr() % ALIGNMENT,
        )

    def unpack(self, device: torch.device = CPU) -> Tensor:
        """Copy the bytes into a new tensor on a device, with layout and alignment."""
        dtype, is_pinned = DTYPES[self.dtype], device.type == "cuda"
        room, result = empty_like(self, device)
        num_elements, has_no_gaps = prod(self.shape), is_dense(self.shape, self.strides)
        is_direct = has_no_gaps and device.type == "cpu"
        flat = room
        if not is_direct:
            flat = torch.empty(num_elements, dtype=dtype, pin_memory=is_pinned)
        if num_elements:
            flat.view(torch.uint8).numpy()[:] = self.data
        # Torch reuses pinned memory only after the copy; strides are laid out there.
        if not has_no_gaps:
            values = flat.to(device, non_blocking=is_pinned)
            _spread(values.view(self.shape), result)
        elif not is_direct:
            room.copy_(flat, non_blocking=is_pinned)
        return result


def empty_like(tensor: Coded | WireTensor, device: torch.device) -> tuple[Tensor, ...]:
    """Make an empty tensor with the layout of one that was sent.

    Returns the memory that it spans, and the tensor.
    """
    num_spanning = num_spanned(tensor.shape, tensor.strides)
    room = _aligned(num_spanning, DTYPES[tensor.dtype], tensor.offset, device)
    return room, room.as_strided(tensor.shape, tensor.strides, room.storage_offset())


def _aligned(
    num_elements: int, dtype: torch.dtype, offset: int, device: torch.device
) -> Tensor:
    """Make an empty tensor whose address lies ``offset`` bytes after an aligned one."""
    lead = offset // dtype.itemsize
    room = torch.empty(lead + num_elements, dtype=dtype, device=device)
    return room[lead:] if lead else room


def _spread(values: Tensor, result: Tensor) -> None:
    """Copy values into the sender's layout, with gaps or repetitions."""
    target = result
    for dim, stride in enumerate(result.stride()):
        if stride == 0:  # All elements along it share memory; write one.
            target, values = target.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    target.copy_(values)


def on_cpu(flat: Tensor) -> Tensor:
    """Copy values to the CPU; they are there when this returns."""
    if not flat.is_cuda:
        return flat.cpu()
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    host.copy_(flat, non_blocking=True)
    torch.cuda.current_stream(flat.device).synchronize()
    return host


def pack_targets(targets: Any) -> WireTensor | tuple[WireTensor, ...]:
    """Describe a tensor, or the tensors of nested targets in their order."""
    if isinstance(targets, Tensor):
        return WireTensor.pack(targets)
    leaves = tree_leaves(targets)
    return tuple(WireTensor.pack(leaf) for leaf in leaves if isinstance(leaf, Tensor))


def unpack_targets(packed: WireTensor | tuple[WireTensor, ...], *, like: Any) -> Any:
    """Copy targets, nested as a task's example targets are."""
    if isinstance(packed, WireTensor):
        return packed.unpack()
    leaves, spec = tree_flatten(like)
    count = sum(isinstance(leaf, Tensor) for leaf in leaves)
    if count != len(packed):
        raise ValueError(
            f"{len(packed)} tensors came as targets, and the task's example targets "
            f"have {count}: use one task everywhere."
        )
    came = iter(packed)
    whole = [next(came).unpack() if isinstance(x, Tensor) else x for x in leaves]
    return tree_unflatten(whole, spec)


def array_digests(state: Mapping[str, npt.NDArray[Any]]) -> dict[str, str]:
    """Identify each array by SHA-256 over its name, dtype, shape and values."""
    digests = {}
    for name in sorted(state):
        array = np.require(state[name], requirements=["C"])
        digest = hashlib.sha256(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(array.data)
        digests[name] = digest.hexdigest()
    return digests


def digest_of(digests: Mapping[str, str]) -> str:
    """Identify a state by the digests of its arrays."""
    text = " ".join(digests[name] for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()


def state_digest(state: Mapping[str, npt.NDArray[Any]]) -> str:
    """Identify a state by names, dtypes, shapes and values."""
    return digest_of(array_digests(state))


def joined_digest(rest: str, own: str) -> str:
    """Identify a state by the digests of its frozen rest, if any, and of the others."""
    return hashlib.sha256(f"{rest} {own}".encode()).hexdigest() if rest else own
