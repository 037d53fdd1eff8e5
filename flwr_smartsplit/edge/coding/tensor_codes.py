"""Tensors rounded, or with their largest values only, a few rows at a time."""

import numpy as np
import torch
from torch import Tensor

from flwr_smartsplit.edge.coding import row_codes
from flwr_smartsplit.edge.coding.coded_rows import (
    Bytes,
    Places,
    Sent,
    check_bits,
    check_headers,
    coded_in,
    coded_result,
    data_sections,
    put_rows,
    rows_of,
    sections,
    spans_of,
    staged,
    wrong,
)
from flwr_smartsplit.edge.tensors import Coded, empty_like
from flwr_smartsplit.types import (
    Codec,
    TensorCost,
    TopK,
    place_bytes,
    value_row,
)

# --- rounded values -------------------------------------------------------------------


def written(codec: Codec, tensor: Tensor, cost: TensorCost) -> Coded:
    """Round a tensor, and write it."""
    row, count = value_row(codec, cost.row_values), cost.num_rows
    out = torch.empty(count * row.total, dtype=torch.uint8, device=tensor.device)
    headers, codes = sections(out, count, row.header, row.codes)
    for span in spans_of(cost):
        rows = rows_of(tensor, span, torch.float32)
        row_codes.write_values(codec, rows, headers[span], codes[span])
        del rows
    return coded_result(tensor, out)


def read(codec: Codec, coded: Coded, cost: TensorCost, device: torch.device) -> Tensor:
    """Read what ``written`` wrote."""
    width = cost.row_values
    row = value_row(codec, width)
    headers, codes = data_sections(coded.data, cost.num_rows, row.header, row.codes)
    check_headers(codec, headers)
    _, result = empty_like(coded, device)
    for span in spans_of(cost):
        given = staged(headers[span], device), staged(codes[span], device)
        put_rows(result, span, row_codes.read_values(codec, *given, width))
        del given
    return result


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
    headers, codes, places = sections(out, count, row.header, row.codes, place)
    for span in spans_of(cost):
        rows = rows_of(tensor, span, torch.float32)
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
    return coded_result(tensor, out), Places(bits, width, count * kept)


def untop(
    codec: TopK, coded: Coded, cost: TensorCost, device: torch.device
) -> tuple[Tensor, Places]:
    """Read what ``top`` wrote, and where its values are."""
    width, count = cost.row_values, cost.num_rows
    kept = codec.num_kept(width)
    row, (place, is_bits) = value_row(codec, kept), place_bytes(codec, width)
    widths = row.header, row.codes, place
    headers, codes, places = data_sections(coded.data, count, *widths)
    check_headers(codec, headers)
    if is_bits:
        check_bits(codec, places, width, kept)
    else:
        _check_indices(codec, places, width, kept)
    bits = torch.empty(count, -(-width // 8), dtype=torch.uint8, device=device)
    _, result = empty_like(coded, device)
    for span in spans_of(cost):
        given = staged(headers[span], device), staged(codes[span], device)
        values = row_codes.read_values(codec, *given, kept)
        at = staged(places[span], device)
        if is_bits:
            bits[span] = at
            mask = row_codes.mask_of(at, width)
        else:
            mask = row_codes.mask_at(at, kept, place // kept, width)
            bits[span] = row_codes.bits_of(mask)
        rows = torch.zeros(mask.shape, device=device).masked_scatter_(mask, values)
        put_rows(result, span, rows)
        del given, values, at, mask, rows
    return result, Places(bits, width, count * kept)


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
    headers, codes = sections(out, count, row.header, row.codes)
    for span in spans_of(cost):
        rows = rows_of(gradient, span, torch.float32)
        mask = row_codes.mask_of(at.bits[span], at.width)
        rows = rows.masked_select(mask).view(-1, kept)
        del mask
        row_codes.write_values(codec, rows, headers[span], codes[span])
        del rows
    return coded_result(gradient, out)


def untop_back(codec: TopK, sent: Sent, cost: TensorCost, at: Places) -> Tensor:
    """Read what ``top_back`` wrote."""
    kept, device = codec.num_kept(at.width), at.bits.device
    row = value_row(codec, kept)
    coded = coded_in(sent, codec, cost.num_rows * row.total)
    headers, codes = data_sections(coded.data, cost.num_rows, row.header, row.codes)
    check_headers(codec, headers)
    _, result = empty_like(coded, device)
    for span in spans_of(cost):
        given = staged(headers[span], device), staged(codes[span], device)
        values = row_codes.read_values(codec, *given, kept)
        mask = row_codes.mask_of(at.bits[span], at.width)
        rows = torch.zeros(mask.shape, device=device).masked_scatter_(mask, values)
        put_rows(result, span, rows)
        del given, values, mask, rows
    return result
