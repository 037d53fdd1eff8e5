"""Tensors without their zeros, a few rows at a time: the codec ``Packed``.

Either a bit says for each value whether it is sent, or, where at most half of the
channels hold more than +0, for each channel: then all values of these are sent, as
float16 if that changes none of them. The shorter form is taken.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flwr_smartsplit.edge.coding import row_codes
from flwr_smartsplit.edge.coding.coded_rows import (
    INTS,
    Bytes,
    Places,
    Sent,
    check_bits,
    check_headers,
    coded_in,
    coded_result,
    cost_of,
    data_sections,
    put_rows,
    rows_of,
    sections,
    spans_of,
    staged,
    wrong,
)
from flwr_smartsplit.edge.tensors import Coded, WireTensor, empty_like
from flwr_smartsplit.split.layout import is_dense
from flwr_smartsplit.types import Float16, Packed, RowBytes, TensorCost, value_row

_HALVES = Float16()


@dataclass(frozen=True, slots=True)
class _Channels:
    """The open channels of a tensor: those that hold more than +0."""

    indices: Tensor
    dim: int
    row: RowBytes  # What of each of its rows is sent
    is_open: Tensor  # For each channel
    num_rows: int

    @property
    def bit_bytes(self) -> int:
        """Size of a bit for each channel."""
        return -(-len(self.is_open) // 8)

    @property
    def num_bytes(self) -> int:
        """Size of the bits, and of all that is sent."""
        return self.bit_bytes + self.num_rows * self.row.total

    def picked(self, part: Tensor) -> Tensor:
        """Copy the open channels of some rows, each flat."""
        return part.index_select(self.dim, self.indices).view(len(part), -1)

    def laid_out(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Lay the open channels of some rows out, and +0 elsewhere."""
        sizes = list(shape)
        sizes[self.dim] = len(self.indices)
        rows = values.new_zeros(shape)
        return rows.index_copy_(self.dim, self.indices, values.view(sizes))


def packed(tensor: Tensor, blocks: bool) -> tuple[Sent, Places | None]:
    """Pack a tensor if that makes it smaller."""
    cost = cost_of(tensor)
    is_dense_here = is_dense(cost.shape, tensor.stride())
    if not (cost.num_rows and cost.row_values and is_dense_here) or tensor.is_complex():
        return WireTensor.pack(tensor), None
    count = _count(tensor, cost)
    num_bytes, channels = _num_bytes(cost, count), _open_channels(tensor, cost)
    if channels is not None and channels.num_bytes < min(num_bytes, cost.num_bytes):
        places = _places(tensor, cost, count) if blocks else None
        return _packed_channels(tensor, cost, channels, blocks=blocks), places
    if num_bytes >= cost.num_bytes:
        return WireTensor.pack(tensor), None
    return _packed_values(tensor, cost, count, blocks=blocks)


def unpacked(
    coded: Coded, cost: TensorCost, device: torch.device
) -> tuple[Tensor, Places | None]:
    """Read what ``packed`` wrote, and where its values are."""
    if coded.dtype.startswith("complex"):
        raise wrong(Packed(), f"{coded.dtype} came coded")
    if coded.has_channels:
        return _unpacked_channels(coded, cost, device)
    data, num_bit_bytes = coded.data, cost.num_rows * _bit_bytes(cost)
    if data.size < num_bit_bytes:
        raise wrong(Packed(), f"{data.size} bytes came for {cost.num_rows} rows")
    (bits,) = data_sections(data, cost.num_rows, _bit_bytes(cost))
    count = int(np.bitwise_count(bits).sum(dtype=np.int64))
    coded_in(coded, Packed(), _num_bytes(cost, count))
    check_bits(Packed(), bits, cost.row_values)
    kept = None
    if coded.blocks:
        kept = Places(staged(bits, device), cost.row_values, count)
    result = _scattered(coded, cost, data[num_bit_bytes:], bits, device=device)
    return result, kept


def _value_bytes(cost: TensorCost) -> int:
    """Size of a value that is not +0: none where its bit says all."""
    return 0 if cost.dtype == "bool" else cost.item_bytes


def _bit_bytes(cost: TensorCost) -> int:
    return -(-cost.row_values // 8)


def _num_bytes(cost: TensorCost, count: int) -> int:
    """Size of a bit for each value, and of those that are not +0."""
    return cost.num_rows * _bit_bytes(cost) + count * _value_bytes(cost)


def _count(tensor: Tensor, cost: TensorCost) -> int:
    """Count the values that are not +0."""
    ints = INTS[cost.item_bytes]
    return sum(
        int(torch.count_nonzero(rows_of(tensor, span, ints))) for span in spans_of(cost)
    )


# --- a bit for each value -------------------------------------------------------------


def _packed_values(
    tensor: Tensor, cost: TensorCost, count: int, *, blocks: bool
) -> tuple[Coded, Places | None]:
    ints, size = INTS[cost.item_bytes], _value_bytes(cost)
    out = torch.empty(_num_bytes(cost, count), dtype=torch.uint8, device=tensor.device)
    end = cost.num_rows * _bit_bytes(cost)
    (bits,) = sections(out[:end], cost.num_rows, _bit_bytes(cost))
    for span in spans_of(cost):
        rows = rows_of(tensor, span, ints)
        mask = rows != 0
        bits[span] = row_codes.bits_of(mask)
        if size:
            values = rows.masked_select(mask).view(torch.uint8)
            out[end : end + len(values)] = values
            end += len(values)
            del values
        del rows, mask
    places = Places(bits.clone(), cost.row_values, count) if blocks else None
    return coded_result(tensor, out, blocks=blocks), places


def _scattered(
    coded: Coded,
    cost: TensorCost,
    values: Bytes,
    bits: Bytes | Tensor,
    *,
    device: torch.device,
) -> Tensor:
    """Lay values out where the bits say, and +0 elsewhere."""
    ints = INTS[cost.item_bytes]
    _, result = empty_like(coded, device)
    target = result.view(ints)
    start = 0
    for span in spans_of(cost):
        part = bits[span]
        at = part if isinstance(part, Tensor) else staged(part, device)
        mask = row_codes.mask_of(at, cost.row_values)
        rows = torch.zeros(mask.shape, dtype=ints, device=device)
        if coded.dtype == "bool":
            rows.copy_(mask)
        else:
            end = start + int(torch.count_nonzero(mask)) * cost.item_bytes
            found = staged(values[start:end], device).view(ints)
            rows.masked_scatter_(mask, found)
            start = end
            del found
        put_rows(target, span, rows)
        del part, at, mask, rows
    return result


def packed_back(gradient: Tensor, cost: TensorCost, at: Places) -> Sent:
    """Pack the gradient of values that are not +0."""
    num_bytes = at.count * cost.item_bytes
    if num_bytes >= cost.num_bytes or not is_dense(cost.shape, gradient.stride()):
        return WireTensor.pack(gradient)
    ints, end = INTS[cost.item_bytes], 0
    out = torch.empty(num_bytes, dtype=torch.uint8, device=gradient.device)
    for span in spans_of(cost):
        rows = rows_of(gradient, span, ints)
        mask = row_codes.mask_of(at.bits[span], at.width)
        values = rows.masked_select(mask).view(torch.uint8)
        out[end : end + len(values)] = values
        end += len(values)
        del rows, mask, values
    return coded_result(gradient, out)


def unpacked_back(sent: Sent, cost: TensorCost, at: Places) -> Tensor:
    """Read what ``packed_back`` wrote."""
    coded = coded_in(sent, Packed(), at.count * cost.item_bytes)
    return _scattered(coded, cost, coded.data, at.bits, device=at.bits.device)


# --- a bit for each channel -----------------------------------------------------------


def _channel_dim(num_dims: int) -> int:
    """Return where channels are: dimension 1 of images, the last one of all else."""
    return 1 if num_dims > 3 else num_dims - 1  # noqa: PLR2004


def _open_channels(tensor: Tensor, cost: TensorCost) -> _Channels | None:
    """Find the channels that hold more than +0; None if they are more than half."""
    num_dims = tensor.dim()
    if num_dims < 2 or cost.dtype == "bool":  # noqa: PLR2004
        return None
    ints, dim = INTS[cost.item_bytes], _channel_dim(num_dims)
    others = [each for each in range(num_dims) if each != dim]
    count = tensor.shape[dim]
    is_open = torch.zeros(count, dtype=torch.bool, device=tensor.device)
    for span in spans_of(cost):
        shape = tensor[span].shape
        is_open |= (rows_of(tensor, span, ints).view(shape) != 0).any(dim=others)
        if 2 * int(torch.count_nonzero(is_open)) > count:
            return None
    plain = _channels(is_open, cost, dim)
    if cost.dtype == "float32" and plain.row.codes and _are_halves(tensor, cost, plain):
        return replace(
            plain, row=value_row(_HALVES, plain.row.codes // cost.item_bytes)
        )
    return plain


def _channels(is_open: Tensor, cost: TensorCost, dim: int) -> _Channels:
    """Describe the open channels, with their values sent as they are."""
    indices = is_open.nonzero().view(-1)
    width = cost.row_values // len(is_open) * len(indices)
    row = RowBytes(0, cost.item_bytes * width)
    return _Channels(indices, dim, row, is_open, cost.num_rows)


def _are_halves(tensor: Tensor, cost: TensorCost, channels: _Channels) -> bool:
    """Say whether float16 keeps every bit of what is open."""
    for span in spans_of(cost):
        values = channels.picked(tensor[span])
        headers, codes = _halves(values.clone())
        read = row_codes.read_values(_HALVES, headers, codes, values.shape[1])
        if not torch.equal(read.view(torch.int32), values.view(torch.int32)):
            return False
    return True


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Write rows, which are used up, as float16 times a power of two."""
    row = value_row(_HALVES, rows.shape[1])
    headers = rows.new_empty(len(rows), row.header, dtype=torch.uint8)
    codes = rows.new_empty(len(rows), row.codes, dtype=torch.uint8)
    row_codes.write_values(_HALVES, rows, headers, codes)
    return headers, codes


def _packed_channels(
    tensor: Tensor, cost: TensorCost, channels: _Channels, *, blocks: bool
) -> Coded:
    row, start = channels.row, channels.bit_bytes
    out = torch.empty(channels.num_bytes, dtype=torch.uint8, device=tensor.device)
    out[:start] = row_codes.bits_of(channels.is_open.view(1, -1)).view(-1)
    headers, codes = sections(out[start:], cost.num_rows, row.header, row.codes)
    for span in spans_of(cost):
        values = channels.picked(tensor[span])
        if row.header:
            row_codes.write_values(_HALVES, values, headers[span], codes[span])
        else:
            codes[span] = values.view(torch.uint8)
        del values
    return coded_result(tensor, out, blocks=blocks, has_channels=True)


def _unpacked_channels(
    coded: Coded, cost: TensorCost, device: torch.device
) -> tuple[Tensor, Places | None]:
    """Read what ``_packed_channels`` wrote: its size says whether it is float16."""
    channels = _channels_in(coded, cost, device)
    row = channels.row
    data = coded.data[channels.bit_bytes :]
    headers, codes = data_sections(data, cost.num_rows, row.header, row.codes)
    check_headers(_HALVES, headers)
    _, result = empty_like(coded, device)
    for span in spans_of(cost):
        given = staged(headers[span], device), staged(codes[span], device)
        if row.header:
            values = row_codes.read_values(_HALVES, *given, row.codes // 2)
        else:
            values = given[1].view(-1).view(result.dtype)
        rows = channels.laid_out(values, result[span].shape)
        put_rows(result, span, rows)
        del given, values, rows
    places = _places(result, cost, _count(result, cost)) if coded.blocks else None
    return result, places


def _channels_in(coded: Coded, cost: TensorCost, device: torch.device) -> _Channels:
    """Read which channels are open, and require as many bytes as they take."""
    num_dims, data = len(cost.shape), coded.data
    dim = _channel_dim(num_dims)
    count = cost.shape[dim]
    start = -(-count // 8)
    if num_dims < 2 or coded.dtype == "bool" or data.size < start:  # noqa: PLR2004
        raise wrong(Packed(), f"{data.size} bytes came for {count} channels")
    bits = data[:start].reshape(1, -1)
    check_bits(Packed(), bits, count)
    is_open = row_codes.mask_of(staged(bits, device), count).view(-1)
    channels = _channels(is_open, cost, dim)
    if coded.dtype == "float32":
        halves = value_row(_HALVES, channels.row.codes // cost.item_bytes)
        if data.size == start + cost.num_rows * halves.total:
            channels = replace(channels, row=halves)
    coded_in(coded, Packed(), channels.num_bytes)
    return channels


def _places(tensor: Tensor, cost: TensorCost, count: int) -> Places:
    """Write down which values of a tensor are not +0."""
    size = cost.num_rows, _bit_bytes(cost)
    bits = torch.empty(size, dtype=torch.uint8, device=tensor.device)
    for span in spans_of(cost):
        rows = rows_of(tensor, span, INTS[cost.item_bytes])
        bits[span] = row_codes.bits_of(rows != 0)
        del rows
    return Places(bits, cost.row_values, count)
