"""Tensors as bytes and back, under each codec, a few rows at a time.

What came is checked before a byte is copied: ``RefusedMessage`` says what is wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flwr_smartsplit.edge.coding import row_codes
from flwr_smartsplit.edge.tensors import DTYPES, Coded, WireTensor, empty_like, on_cpu
from flwr_smartsplit.errors import RefusedMessage
from flwr_smartsplit.split.layout import ALIGNMENT, is_dense
from flwr_smartsplit.types import (
    Codec,
    Integer,
    Packed,
    TensorCost,
    TopK,
    block_rows,
    place_bytes,
    value_row,
)

Bytes = npt.NDArray[np.uint8]
Sent = WireTensor | Coded
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Places:
    """Where a tensor's values were sent: a bit for each, in rows."""

    bits: Tensor
    width: int  # Values of a row
    count: int  # Of all that were sent


# --- what goes where ------------------------------------------------------------------


def cost_of(tensor: Tensor | Sent, *, is_context: bool = False) -> TensorCost:
    """Describe a tensor, sent or not."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorCost(
        shape=tuple(tensor.shape),
        dtype=dtype,
        item_bytes=DTYPES[dtype].itemsize,
        is_context=is_context,
    )


def _spans(cost: TensorCost) -> Iterator[slice]:
    """Divide the rows into blocks that are coded at a time."""
    size = block_rows(cost)
    for start in range(0, cost.num_rows, size):
        yield slice(start, min(start + size, cost.num_rows))


def _sections(out: Tensor, num_rows: int, *widths: int) -> list[Tensor]:
    """Divide bytes into sections with rows of some bytes each."""
    parts = out.split([num_rows * width for width in widths])
    return [
        part.view(num_rows, width) for part, width in zip(parts, widths, strict=True)
    ]


def _data_sections(data: Bytes, num_rows: int, *widths: int) -> list[Bytes]:
    ends = np.cumsum([num_rows * width for width in widths])
    parts = np.split(data[: ends[-1]], ends[:-1])
    return [
        part.reshape(num_rows, width) for part, width in zip(parts, widths, strict=True)
    ]


def _staged(rows: Bytes, device: torch.device) -> Tensor:
    """Copy bytes that came into a tensor of their own."""
    stage = torch.empty(rows.shape, dtype=torch.uint8)
    if rows.size:
        stage.numpy()[:] = rows
    return stage.to(device)


def _rows_of(tensor: Tensor, span: slice, dtype: torch.dtype) -> Tensor:
    """Copy some rows, each flat; whole numbers take the values' bits."""
    part = tensor[span]
    if not dtype.is_floating_point:
        part = part.view(dtype)
    rows = torch.empty(part.shape, dtype=dtype, device=tensor.device)
    return rows.copy_(part).view(len(part), -1)


def _put(result: Tensor, span: slice, rows: Tensor) -> None:
    part = result[span]
    part.copy_(rows.view(part.shape))


def _result(tensor: Tensor, out: Tensor, *, blocks: bool = False) -> Coded:
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


# --- rounded values -------------------------------------------------------------------


def written(codec: Codec, tensor: Tensor, cost: TensorCost) -> Coded:
    """Round a tensor, and write it."""
    row, count = value_row(codec, cost.row_values), cost.num_rows
    out = torch.empty(count * row.total, dtype=torch.uint8, device=tensor.device)
    headers, codes = _sections(out, count, row.header, row.codes)
    for span in _spans(cost):
        rows = _rows_of(tensor, span, torch.float32)
        row_codes.write_values(codec, rows, headers[span], codes[span])
        del rows
    return _result(tensor, out)


def read(codec: Codec, coded: Coded, cost: TensorCost, device: torch.device) -> Tensor:
    """Read what ``written`` wrote."""
    width = cost.row_values
    row = value_row(codec, width)
    headers, codes = _data_sections(coded.data, cost.num_rows, row.header, row.codes)
    _check_headers(codec, headers)
    _, result = empty_like(coded, device)
    for span in _spans(cost):
        given = _staged(headers[span], device), _staged(codes[span], device)
        _put(result, span, row_codes.read_values(codec, *given, width))
        del given
    return result


def _check_headers(codec: Codec, headers: Bytes) -> None:
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


# --- the largest values ---------------------------------------------------------------


def top(
    codec: TopK, tensor: Tensor, cost: TensorCost, chance: np.random.Generator | None
) -> tuple[Coded, Places]:
    """Write the largest values and their places."""
    width, count = cost.row_values, cost.num_rows
    kept = codec.num_kept(width)
    row, (place, is_bits) = value_row(codec, kept), place_bytes(codec, width)
    bits = torch.empty(count, -(-width // 8), dtype=torch.uint8, device=tensor.device)
    out = bits.new_empty(count * (row.total + place))
    headers, codes, places = _sections(out, count, row.header, row.codes, place)
    for span in _spans(cost):
        rows = _rows_of(tensor, span, torch.float32)
        mask = row_codes.largest(rows, kept)
        if chance is not None:
            mask = row_codes.drawn(mask, kept, codec.random_share, chance)
        bits[span] = row_codes.bits_of(mask)
        if is_bits:
            places[span] = bits[span]
        else:
            places[span] = row_codes.index_bytes(mask, kept, place // kept)
        rows = rows.masked_select(mask).view(-1, kept)
        row_codes.write_values(codec, rows, headers[span], codes[span])
        del rows, mask
    return _result(tensor, out), Places(bits, width, count * kept)


def untop(
    codec: TopK, coded: Coded, cost: TensorCost, device: torch.device
) -> tuple[Tensor, Places]:
    """Read what ``top`` wrote, and where its values are."""
    width, count = cost.row_values, cost.num_rows
    kept = codec.num_kept(width)
    row, (place, is_bits) = value_row(codec, kept), place_bytes(codec, width)
    widths = row.header, row.codes, place
    headers, codes, places = _data_sections(coded.data, count, *widths)
    _check_headers(codec, headers)
    if is_bits:
        _check_bits(codec, places, width, kept)
    else:
        _check_indices(codec, places, width, kept)
    bits = torch.empty(count, -(-width // 8), dtype=torch.uint8, device=device)
    _, result = empty_like(coded, device)
    for span in _spans(cost):
        given = _staged(headers[span], device), _staged(codes[span], device)
        values = row_codes.read_values(codec, *given, kept)
        at = _staged(places[span], device)
        if is_bits:
            bits[span] = at
            mask = row_codes.mask_of(at, width)
        else:
            mask = row_codes.mask_at(at, kept, place // kept, width)
            bits[span] = row_codes.bits_of(mask)
        rows = torch.zeros(mask.shape, device=device).masked_scatter_(mask, values)
        _put(result, span, rows)
        del given, values, at, mask, rows
    return result, Places(bits, width, count * kept)


def _check_bits(codec: Codec, bits: Bytes, width: int, kept: int | None = None) -> None:
    """Refuse bits behind the end of a row, and rows with another number of values."""
    is_fine = not (width % 8 and bool((bits[:, -1] >> width % 8).any()))
    if is_fine and kept is not None:
        found = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
        is_fine = bool((found == kept).all())
    if not is_fine:
        raise wrong(codec, "places came that no row has")


def _check_indices(codec: TopK, places: Bytes, width: int, kept: int) -> None:
    """Refuse places that do not rise, or lie behind the end of a row."""
    kind = np.dtype(f"<u{places.shape[1] // kept}")
    found = np.ascontiguousarray(places).view(kind)
    is_rising = bool((found[:, 1:] > found[:, :-1]).all())
    if not (is_rising and bool((found[:, -1] < width).all())):
        raise wrong(codec, "places came that no row has")


def top_back(codec: TopK, gradient: Tensor, cost: TensorCost, at: Places) -> Coded:
    """Write the gradient of the largest values."""
    kept, count = codec.num_kept(at.width), cost.num_rows
    row = value_row(codec, kept)
    out = torch.empty(count * row.total, dtype=torch.uint8, device=gradient.device)
    headers, codes = _sections(out, count, row.header, row.codes)
    for span in _spans(cost):
        rows = _rows_of(gradient, span, torch.float32)
        mask = row_codes.mask_of(at.bits[span], at.width)
        rows = rows.masked_select(mask).view(-1, kept)
        del mask
        row_codes.write_values(codec, rows, headers[span], codes[span])
        del rows
    return _result(gradient, out)


def untop_back(codec: TopK, sent: Sent, cost: TensorCost, at: Places) -> Tensor:
    """Read what ``top_back`` wrote."""
    kept, device = codec.num_kept(at.width), at.bits.device
    row = value_row(codec, kept)
    coded = coded_in(sent, codec, cost.num_rows * row.total)
    headers, codes = _data_sections(coded.data, cost.num_rows, row.header, row.codes)
    _check_headers(codec, headers)
    _, result = empty_like(coded, device)
    for span in _spans(cost):
        given = _staged(headers[span], device), _staged(codes[span], device)
        values = row_codes.read_values(codec, *given, kept)
        mask = row_codes.mask_of(at.bits[span], at.width)
        rows = torch.zeros(mask.shape, device=device).masked_scatter_(mask, values)
        _put(result, span, rows)
        del given, values, mask, rows
    return result


# --- all values but +0 ----------------------------------------------------------------


def packed(tensor: Tensor, blocks: bool) -> tuple[Sent, Places | None]:
    """Pack a tensor if that makes it smaller."""
    cost = cost_of(tensor)
    is_dense_here = is_dense(cost.shape, tensor.stride())
    if not (cost.num_rows and cost.row_values and is_dense_here) or tensor.is_complex():
        return WireTensor.pack(tensor), None
    ints, num_bit_bytes = _INTS[cost.item_bytes], cost.num_rows * _bit_bytes(cost)
    size = 0 if tensor.dtype is torch.bool else cost.item_bytes
    count = sum(
        int(torch.count_nonzero(_rows_of(tensor, span, ints))) for span in _spans(cost)
    )
    num_bytes = num_bit_bytes + count * size
    if num_bytes >= cost.num_bytes:
        return WireTensor.pack(tensor), None
    out = torch.empty(num_bytes, dtype=torch.uint8, device=tensor.device)
    (bits,) = _sections(out[:num_bit_bytes], cost.num_rows, _bit_bytes(cost))
    end = num_bit_bytes
    for span in _spans(cost):
        rows = _rows_of(tensor, span, ints)
        mask = rows != 0
        bits[span] = row_codes.bits_of(mask)
        if size:
            values = rows.masked_select(mask).view(torch.uint8)
            out[end : end + len(values)] = values
            end += len(values)
            del values
        del rows, mask
    places = Places(bits.clone(), cost.row_values, count) if blocks else None
    return _result(tensor, out, blocks=blocks), places


def _bit_bytes(cost: TensorCost) -> int:
    return -(-cost.row_values // 8)


def unpacked(
    coded: Coded, cost: TensorCost, device: torch.device
) -> tuple[Tensor, Places | None]:
    """Read what ``packed`` wrote, and where its values are."""
    width, data = cost.row_values, coded.data
    num_bit_bytes = cost.num_rows * _bit_bytes(cost)
    if data.size < num_bit_bytes:
        raise wrong(Packed(), f"{data.size} bytes came for {cost.num_rows} rows")
    (bits,) = _data_sections(data, cost.num_rows, _bit_bytes(cost))
    count = int(np.bitwise_count(bits).sum(dtype=np.int64))
    size = 0 if coded.dtype == "bool" else cost.item_bytes
    coded_in(coded, Packed(), num_bit_bytes + count * size)
    _check_bits(Packed(), bits, width)
    kept = None
    if coded.blocks:
        kept = Places(_staged(bits, device), width, count)
    result = _scattered(coded, cost, data[num_bit_bytes:], bits, device=device)
    return result, kept


def _scattered(
    coded: Coded,
    cost: TensorCost,
    values: Bytes,
    bits: Bytes | Tensor,
    *,
    device: torch.device,
) -> Tensor:
    """Lay values out where the bits say, and +0 elsewhere."""
    ints = _INTS[cost.item_bytes]
    _, result = empty_like(coded, device)
    target = result.view(ints)
    start = 0
    for span in _spans(cost):
        part = bits[span]
        at = part if isinstance(part, Tensor) else _staged(part, device)
        mask = row_codes.mask_of(at, cost.row_values)
        rows = torch.zeros(mask.shape, dtype=ints, device=device)
        if coded.dtype == "bool":
            rows.copy_(mask)
        else:
            end = start + int(torch.count_nonzero(mask)) * cost.item_bytes
            found = _staged(values[start:end], device).view(ints)
            rows.masked_scatter_(mask, found)
            start = end
            del found
        _put(target, span, rows)
        del part, at, mask, rows
    return result


def packed_back(gradient: Tensor, cost: TensorCost, at: Places) -> Sent:
    """Pack the gradient of values that are not +0."""
    num_bytes = at.count * cost.item_bytes
    if num_bytes >= cost.num_bytes or not is_dense(cost.shape, gradient.stride()):
        return WireTensor.pack(gradient)
    ints, end = _INTS[cost.item_bytes], 0
    out = torch.empty(num_bytes, dtype=torch.uint8, device=gradient.device)
    for span in _spans(cost):
        rows = _rows_of(gradient, span, ints)
        mask = row_codes.mask_of(at.bits[span], at.width)
        values = rows.masked_select(mask).view(torch.uint8)
        out[end : end + len(values)] = values
        end += len(values)
        del rows, mask, values
    return _result(gradient, out)


def unpacked_back(sent: Sent, cost: TensorCost, at: Places) -> Tensor:
    """Read what ``packed_back`` wrote."""
    coded = coded_in(sent, Packed(), at.count * cost.item_bytes)
    return _scattered(coded, cost, coded.data, at.bits, device=at.bits.device)
