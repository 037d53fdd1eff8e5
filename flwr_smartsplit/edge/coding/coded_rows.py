"""What all codecs share: blocks of rows, sections of bytes, and what is refused.

What came is checked before a byte is copied: ``RefusedMessage`` says what is wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flwr_smartsplit.edge.coding import row_codes
from flwr_smartsplit.edge.tensors import DTYPES, Coded, WireTensor, on_cpu
from flwr_smartsplit.errors import RefusedMessage
from flwr_smartsplit.split.layout import ALIGNMENT, is_dense
from flwr_smartsplit.types import Codec, Integer, TensorCost, block_rows

Bytes = npt.NDArray[np.uint8]
Sent = WireTensor | Coded
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Places:
    """Where a tensor's values were sent: a bit for each, in rows."""

    bits: Tensor
    width: int  # Values of a row
    count: int  # Of all that were sent


def cost_of(tensor: Tensor | Sent, *, is_context: bool = False) -> TensorCost:
    """Describe a tensor, sent or not."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorCost(
        shape=tuple(tensor.shape),
        dtype=dtype,
        item_bytes=DTYPES[dtype].itemsize,
        is_context=is_context,
    )


def spans_of(cost: TensorCost) -> Iterator[slice]:
    """Divide the rows into blocks that are coded at a time."""
    size = block_rows(cost)
    for start in range(0, cost.num_rows, size):
        yield slice(start, min(start + size, cost.num_rows))


def sections(out: Tensor, num_rows: int, *widths: int) -> list[Tensor]:
    """Divide bytes into sections with rows of some bytes each."""
    parts = out.split([num_rows * width for width in widths])
    return [
        part.view(num_rows, width) for part, width in zip(parts, widths, strict=True)
    ]


def data_sections(data: Bytes, num_rows: int, *widths: int) -> list[Bytes]:
    """Divide bytes that came into such sections."""
    ends = np.cumsum([num_rows * width for width in widths])
    parts = np.split(data[: ends[-1]], ends[:-1])
    return [
        part.reshape(num_rows, width) for part, width in zip(parts, widths, strict=True)
    ]


def staged(rows: Bytes, device: torch.device) -> Tensor:
    """Copy bytes that came into a tensor of their own."""
    stage = torch.empty(rows.shape, dtype=torch.uint8)
    if rows.size:
        stage.numpy()[:] = rows
    return stage.to(device)


def rows_of(tensor: Tensor, span: slice, dtype: torch.dtype) -> Tensor:
    """Copy some rows, each flat; whole numbers take the values' bits."""
    part = tensor[span]
    if not dtype.is_floating_point:
        part = part.view(dtype)
    rows = torch.empty(part.shape, dtype=dtype, device=tensor.device)
    return rows.copy_(part).view(len(part), -1)


def put_rows(result: Tensor, span: slice, rows: Tensor) -> None:
    """Copy rows, each flat, to where they belong."""
    part = result[span]
    part.copy_(rows.view(part.shape))


def coded_result(
    tensor: Tensor, out: Tensor, *, blocks: bool = False, has_channels: bool = False
) -> Coded:
    """Say with the bytes how the tensor lies in memory, or will where it arrives."""
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    offset = tensor.data_ptr() % ALIGNMENT
    if not is_dense(shape, strides):  # Its rows may share memory, and differ now.
        strides, offset = torch.empty(shape, device="meta").stride(), 0
    return Coded(
        data=on_cpu(out).numpy(),
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=shape,
        strides=strides,
        offset=offset,
        blocks=blocks,
        has_channels=has_channels,
    )


def wrong(codec: Codec, text: str) -> RefusedMessage:
    """Say that something does not fit the codec of a cut."""
    return RefusedMessage(
        f"{text}, and the codec of this cut is {codec}: use one release of "
        "flwr_smartsplit everywhere."
    )


def coded_in(sent: Sent, codec: Codec, num_bytes: int) -> Coded:
    """Require a coded tensor of so many bytes."""
    if isinstance(sent, Coded) and sent.data.size == num_bytes:
        return sent
    kind = "coded" if isinstance(sent, Coded) else "plain"
    raise wrong(codec, f"{sent.data.size} {kind} bytes came, and not {num_bytes}")


def check_bits(codec: Codec, bits: Bytes, width: int, kept: int | None = None) -> None:
    """Refuse bits behind the end of a row, and rows with another number of values."""
    is_fine = not (width % 8 and bool((bits[:, -1] >> width % 8).any()))
    if is_fine and kept is not None:
        found = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
        is_fine = bool((found == kept).all())
    if not is_fine:
        raise wrong(codec, "places came that no row has")


def check_headers(codec: Codec, headers: Bytes) -> None:
    """Refuse scales that no row has."""
    is_fine = True
    if isinstance(codec, Integer):
        scale, least = headers.copy().view("<f4").T
        is_row = np.isfinite(scale) & (scale >= 0) & np.isfinite(least)
        is_fine = bool((np.isnan(scale) | is_row).all())
    elif headers.size:
        is_fine = bool((headers.view(np.int8) >= row_codes.LEAST_EXPONENT).all())
    if not is_fine:
        raise wrong(codec, "a scale came that no row has")
