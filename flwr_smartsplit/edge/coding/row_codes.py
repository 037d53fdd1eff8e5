"""Rows of numbers as bytes: what codecs do to a few rows at a time.

All of it is torch operators, so a device's meter sees what it takes, and each row's
bytes depend on that row only. ``plan/coding.py`` says what it takes, to the byte.
"""

import numpy as np
import torch
from torch import Tensor

from flwr_smartsplit.types import BFloat16, Codec, Float16, Integer, TopK

LEAST_EXPONENT, MOST_EXPONENT = -112, 127  # Of a row's power of two
_PLAIN_EXPONENT = 14  # Of a row that is not finite: it is not scaled
_BIAS, _MANTISSA_BITS = 127, 23
_LEVELS = {8: 255, 4: 15}
# For eight bytes of 0 or 1 as one whole number, the first one lowest. Times the first
# constant, their bits are the highest byte. A byte times the second is in each of
# eight, and the third leaves one bit of each. All wraps around, as int64 does.
_GATHER = 0x0102040810204080
_REPEAT = 0x0101010101010101
_ONE_EACH = 0x8040201008040201 - 2**64


def write_values(codec: Codec, rows: Tensor, headers: Tensor, codes: Tensor) -> None:
    """Write float32 rows, which are used up, into bytes of ``value_row``'s sizes."""
    match codec:
        case Float16() | TopK(values="float16"):
            exponents = _exponents(rows)
            rows.mul_(_powers(_PLAIN_EXPONENT - exponents))
            headers.copy_(exponents.to(torch.int8).view(torch.uint8))
            codes.copy_(rows.to(torch.float16).view(torch.uint8))
        case BFloat16():
            codes.copy_(rows.to(torch.bfloat16).view(torch.uint8))
        case Integer(bits=bits):
            _write_levels(rows, headers, codes, bits)
        case _:
            codes.copy_(rows.view(torch.uint8))


def read_values(codec: Codec, headers: Tensor, codes: Tensor, width: int) -> Tensor:
    """Read what ``write_values`` wrote, from contiguous bytes, as float32 rows."""
    match codec:
        case Float16() | TopK(values="float16"):
            rows = codes.view(torch.float16).float()
            exponents = headers.view(torch.int8).to(torch.int32)
            return rows.mul_(_powers(exponents.sub_(_PLAIN_EXPONENT)))
        case BFloat16():
            return codes.view(torch.bfloat16).float()
        case Integer(bits=bits):
            scale, least = headers.view(torch.float32).split(1, dim=1)
            levels = codes if bits == 8 else _nibbles(codes)[:, :width]  # noqa: PLR2004
            return levels.float().mul_(scale).add_(least)
    return codes.view(torch.float32)


def _exponents(rows: Tensor) -> Tensor:
    """Return e per row where the largest magnitude is in [2**(e-1), 2**e)."""
    largest = torch.maximum(
        rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_()
    ).abs_()
    found = largest.view(torch.int32) >> _MANTISSA_BITS
    found.sub_(_BIAS - 1)
    not_finite = found > _BIAS + 1
    return found.clamp_(LEAST_EXPONENT, MOST_EXPONENT).masked_fill_(
        not_finite, _PLAIN_EXPONENT
    )


def _powers(exponents: Tensor) -> Tensor:
    """Return two to whole numbers, exactly; the numbers are used up."""
    shifted = exponents.add_(_BIAS).bitwise_left_shift_(_MANTISSA_BITS)
    return shifted.view(torch.float32)


def _write_levels(rows: Tensor, headers: Tensor, codes: Tensor, bits: int) -> None:
    least, most = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = most.sub_(least).div_(_LEVELS[bits])
    scale.masked_fill_(~scale.isfinite(), torch.nan)  # Then all of the row is NaN.
    headers.copy_(torch.cat((scale, least), dim=1).view(torch.uint8))
    is_flat = ~(scale > 0)
    rows.sub_(least).div_(scale.masked_fill_(is_flat, 1)).masked_fill_(is_flat, 0)
    rows.round_().clamp_(0, _LEVELS[bits])
    if bits == 8:  # noqa: PLR2004
        codes.copy_(rows)
        return
    pairs = torch.zeros(
        len(rows), codes.shape[1], 2, dtype=torch.uint8, device=rows.device
    )
    pairs.flatten(1)[:, : rows.shape[1]].copy_(rows)
    pairs[..., 1].bitwise_left_shift_(4)
    torch.bitwise_or(pairs[..., 0], pairs[..., 1], out=codes)


def _nibbles(codes: Tensor) -> Tensor:
    pairs = codes.new_empty(*codes.shape, 2)
    torch.bitwise_and(codes, 15, out=pairs[..., 0])
    torch.bitwise_right_shift(codes, 4, out=pairs[..., 1])
    return pairs.flatten(1)


# --- places -----------------------------------------------------------------------


def bits_of(mask: Tensor) -> Tensor:
    """Write a mask with rows as bits, the lowest first."""
    rows, width = mask.shape
    if width % 8:
        padded = mask.new_zeros(rows, -(-width // 8) * 8)
        padded[:, :width].copy_(mask)
        eights = padded.view(torch.int64).mul_(_GATHER)
    else:
        eights = mask.view(torch.int64).mul(_GATHER)
    return eights.bitwise_right_shift_(56).to(torch.uint8)


def mask_of(bits: Tensor, width: int) -> Tensor:
    """Read what ``bits_of`` wrote."""
    eights = bits.to(torch.int64).mul_(_REPEAT).bitwise_and_(_ONE_EACH)
    return eights.view(torch.uint8).clamp_(max=1).view(torch.bool)[:, :width]


def largest(rows: Tensor, count: int) -> Tensor:
    """Mark the values of largest magnitude in each row; of equal ones, the first."""
    sizes = rows.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    least = sizes.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = sizes > least, sizes == least
    del sizes
    wanted = above.sum(1, keepdim=True, dtype=torch.int32).neg_().add_(count)
    is_first = equal.cumsum(1, dtype=torch.int32) <= wanted
    return is_first.logical_and_(equal).logical_or_(above)


def drawn(top: Tensor, count: int, share: float, chance: np.random.Generator) -> Tensor:
    """Draw places without replacement, a share of them beside the largest ones.

    A place of the largest has weight (1-share)/count, each other one share/(rest).
    """
    width = top.shape[1]
    if width == count:
        return top
    # The first to arrive, where each place waits for an exponential time.
    waited = chance.standard_exponential(tuple(top.shape), dtype=np.float32)
    times = torch.from_numpy(waited).to(top.device)
    weights = (1 - share) / count, share / (width - count)
    times.div_(torch.where(top, *weights))
    return largest(times.reciprocal_(), count)


def index_bytes(mask: Tensor, count: int, size: int) -> Tensor:
    """Write the places of a mask with ``count`` in each row, the lowest byte first."""
    places = mask.nonzero()[:, 1].to(torch.int32)
    return places.view(torch.uint8).view(len(mask), count, 4)[..., :size].flatten(1)


def mask_at(codes: Tensor, count: int, size: int, width: int) -> Tensor:
    """Read what ``index_bytes`` wrote."""
    rows = len(codes)
    places = codes.new_zeros(rows, count, 4)
    places[..., :size].copy_(codes.view(rows, count, size))
    found = places.view(torch.int32).view(rows, count).long()
    mask = codes.new_zeros(rows, width, dtype=torch.bool)
    return mask.scatter_(1, found, True)
