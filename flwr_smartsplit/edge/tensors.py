"""Tensors and states as plain bytes with a shape, as they are sent.

Strides are sent too, because kernels choose their order of summation by them: with
contiguous copies, ConvNeXt's results differed at 24 of its 29 cuts.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flwr_smartsplit.split.layout import is_dense, num_spanned

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
ALIGNMENT = 64
"""Bytes. Kernels choose by it how they begin, and so their order of summation."""
# The most memory of a tensor with gaps, as a multiple of its values: the last token of
# a sequence has gaps as long as the sequence.
MAX_SPREAD = 2**14


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor's bytes, in the order they have in memory, and how to read them."""

    data: npt.NDArray[np.uint8]
    dtype: str  # Torch's name, such as ``float32``
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # In elements
    offset: int = 0  # In bytes, of its first value from an aligned address

    def __post_init__(self) -> None:
        shape, strides, data = self.shape, self.strides, self.data
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.dtype!r:.99} is none of {', '.join(DTYPES)}.")
        if not len(shape) == len(strides) <= MAX_DIMS or any(
            not 0 <= number < 2**62 for number in (*shape, *strides)
        ):
            raise ValueError(
                f"shape {shape} with strides {strides}: give as many numbers in both, "
                f"at most {MAX_DIMS}, from 0 to 2**62."
            )
        size = prod(shape)
        num_bytes = size * DTYPES[self.dtype].itemsize
        if data.dtype != np.uint8 or data.shape != (num_bytes,):
            raise ValueError(
                f"a tensor of shape {shape} and {self.dtype} has {num_bytes} bytes, "
                f"not {data.dtype} of shape {data.shape}."
            )
        if not 0 <= self.offset < ALIGNMENT:
            raise ValueError(f"offset {self.offset} is not in 0..{ALIGNMENT - 1}.")
        if num_spanned(shape, strides) > MAX_SPREAD * size:
            raise ValueError(
                f"strides {strides} lay {size} values over more than {MAX_SPREAD} "
                "times their memory: send a contiguous copy."
            )

    @classmethod
    def pack(cls, tensor: Tensor) -> Self:
        """Describe a tensor; it is copied only if its memory has gaps."""
        tensor = tensor.detach().cpu()
        has_no_gaps = is_dense(tuple(tensor.shape), tensor.stride())
        values = tensor if has_no_gaps else tensor.contiguous()
        flat = values.as_strided((values.numel(),), (1,))
        return cls(
            data=flat.view(torch.uint8).numpy(),
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            offset=tensor.data_ptr() % ALIGNMENT,
        )

    def unpack(self) -> Tensor:
        """Copy the bytes into a new tensor of the same layout and alignment."""
        dtype = DTYPES[self.dtype]
        num_elements = prod(self.shape)
        if is_dense(self.shape, self.strides):
            flat = _aligned(num_elements, dtype, self.offset)
            if num_elements:
                flat.view(torch.uint8).numpy()[:] = self.data
            return flat.as_strided(self.shape, self.strides)
        flat = torch.empty(num_elements, dtype=dtype)
        flat.view(torch.uint8).numpy()[:] = self.data
        spanned = num_spanned(self.shape, self.strides)
        target = _aligned(spanned, dtype, self.offset)
        return _spread(
            flat.view(self.shape), target.as_strided(self.shape, self.strides)
        )


def _aligned(num_elements: int, dtype: torch.dtype, offset: int) -> Tensor:
    """Make an empty tensor whose address lies ``offset`` bytes after an aligned one."""
    lead = offset // dtype.itemsize
    return torch.empty(lead + num_elements, dtype=dtype).as_strided(
        (num_elements,), (1,), lead
    )


def _spread(values: Tensor, result: Tensor) -> Tensor:
    """Copy values into the sender's layout, with gaps or repetitions."""
    target = result
    for dim, stride in enumerate(result.stride()):
        if stride == 0:  # All elements along it share memory; write one.
            target, values = target.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    target.copy_(values)
    return result


def state_digest(state: Mapping[str, npt.NDArray[Any]]) -> str:
    """Identify a state by SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.require(state[name], requirements=["C"])
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(array.data)
    return digest.hexdigest()
