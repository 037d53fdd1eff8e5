"""What a codec at a cut costs: bytes on the wire, memory to the byte, and time.

The numbers are those of ``edge/coding/``, which codes a few rows at a time by torch
operators. ``coded_profile`` puts them into a profile, so that all planning counts them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from math import ceil

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.types import (
    NO_CODING,
    RAW,
    BFloat16,
    ChainProfile,
    Codec,
    Coding,
    Crossed,
    Float16,
    Integer,
    Packed,
    Raw,
    Route,
    TensorCost,
    TopK,
    UnitCost,
    back_codec,
    block_rows,
    place_bytes,
    value_row,
    wire_bytes,
)


@lru_cache(maxsize=256)
def coded_profile(profile: ChainProfile, codecs: tuple[Codec, ...]) -> ChainProfile:
    """Add to the costs of a chain those of a codec at each of its cuts.

    Raises ``InvalidTask`` where one would round float64.
    """
    if all(isinstance(codec, Raw) for codec in codecs):
        return profile
    units: list[UnitCost] = []
    before = NO_CODING
    for unit, codec in zip(profile.units, (*codecs, RAW), strict=True):
        coding = coding_of(codec, unit)
        units.append(_coded(unit, codec, coding, before))
        before = coding
    return replace(profile, units=tuple(units))


def codecs_at(num_units: int, cuts: Mapping[int, Codec]) -> tuple[Codec, ...]:
    """List the codec of each cut of a chain."""
    return tuple(cuts.get(cut, RAW) for cut in range(1, num_units))


def route_profile(
    profile: ChainProfile, route: Route, codecs: Sequence[Codec]
) -> ChainProfile:
    """Add to the costs of a chain those of a route's codecs, one for each cut or none.

    Its first cut may move: the cuts before have the first codec, too.
    """
    if not codecs:
        return profile
    stop = (*route.cuts, len(profile.units))[1]
    moved = dict.fromkeys(range(1, stop), codecs[0])
    cuts = {**moved, **dict(zip(route.cuts, codecs, strict=True))}
    return coded_profile(profile, codecs_at(len(profile.units), cuts))


def codecs_of(profile: ChainProfile, route: Route) -> tuple[Codec, ...]:
    """Return the codecs of a route's cuts in a coded profile; none if all are Raw."""
    found = tuple(profile.units[cut - 1].codec for cut in route.cuts)
    return found if any(codec != RAW for codec in found) else ()


def _coded(unit: UnitCost, codec: Codec, coding: Coding, before: Coding) -> UnitCost:
    sent = unit.static_bytes + unit.leaving_bytes + coding.send_bytes
    arrived = unit.static_bytes + unit.waiting_bytes + coding.kept_bytes
    return replace(
        unit,
        codec=codec,
        coding=coding,
        device_peak_bytes=max(
            unit.device_peak_bytes + coding.grown_back_bytes,
            sent if coding.send_bytes else 0,
            arrived + coding.receive_back_bytes if coding.receive_back_bytes else 0,
        ),
        waiting_bytes=unit.waiting_bytes + coding.kept_bytes,
        return_bytes=max(
            unit.return_bytes + before.kept_bytes + before.grown_bytes,
            before.receive_bytes,
            unit.left_bytes
            + before.grown_bytes
            + before.kept_bytes
            + before.send_back_bytes,
        ),
    )


def coding_of(codec: Codec, unit: UnitCost) -> Coding:
    """Say what a codec costs at the cut after a unit."""
    return tensors_coding(codec, unit.crossing, after=unit.name)


def tensors_coding(
    codec: Codec, tensors: Iterable[TensorCost], *, after: str
) -> Coding:
    """Say what a codec costs at a cut that some tensors cross, after a unit."""
    if isinstance(codec, Raw):
        return NO_CODING
    found = NO_CODING
    for tensor in tensors:
        is_exact = tensor.dtype != "float64" or tensor.is_context
        if not (is_exact or isinstance(codec, Packed)):
            raise InvalidTask(
                f"what crosses the cut after {after} is float64, which is for "
                f"tests of exactness, and {codec} would round it: use Packed(), or "
                "float32."
            )
        found = _joined(found, _coding(codec, tensor))
    return found if found.send_bytes or found.send_back_bytes else NO_CODING


def coded_peak_bytes(
    peak_bytes: int, crossings: Sequence[Crossed], codecs: Sequence[Codec]
) -> int:
    """Add what codecs take to the peak of a place that predicts; none are ``Raw``."""
    peaks = [peak_bytes]
    for crossed, codec in zip(crossings, codecs, strict=bool(codecs)):
        coding = tensors_coding(codec, crossed.tensors, after=crossed.after)
        sent = coding.send_bytes * crossed.is_sent
        peaks.append(crossed.live_bytes + sent)
        peaks.append(crossed.live_bytes + coding.receive_bytes * crossed.is_received)
    return max(peaks)


def _joined(one: Coding, other: Coding) -> Coding:
    """Add a tensor that is coded after others, whose results are still there."""
    names = [field.name for field in fields(Coding)]
    return Coding(**{name: getattr(one, name) + getattr(other, name) for name in names})


def _coding(codec: Codec, tensor: TensorCost) -> Coding:
    """Say what coding one tensor takes, in memory and in time."""
    found = _coding_bytes(codec, tensor)
    if isinstance(codec, Packed) and not (tensor.blocks or tensor.dtype == "bool"):
        counted = _COUNT_FLOPS * tensor.num_values
        back = counted * tensor.has_gradient
        return replace(found, send_flops=counted, send_back_flops=back)
    there = tensor.num_values * (found.send_bytes > 0)
    back = tensor.num_values * (found.send_back_bytes > 0)
    flops, back_flops = _flops_per_value(codec), _flops_per_value(back_codec(codec))
    return replace(
        found,
        send_flops=there * flops[0],
        receive_flops=there * flops[1],
        send_back_flops=back * back_flops[2],
        receive_back_flops=back * back_flops[3],
    )


_COUNT_FLOPS = 40  # Of ``Packed``, for a value of what it then sends as it is


def _flops_per_value(codec: Codec) -> tuple[int, int, int, int]:
    """Count the FLOPs of training that take as long as coding one value.

    Of the boundary where it is made and where it arrives, then of its gradient. They
    are what ``simulations/benchmarks/wires/codec_time.py`` measured on one core of an
    AMD EPYC. How fast other processors code, compared with how fast they train, may be
    otherwise.
    """
    match codec:
        case Integer():
            return _FLOPS[f"integer:{codec.bits}"]
        case TopK(random_share=share) if share:
            return _FLOPS["topk at random"]
    return _FLOPS[codec.kind]


_FLOPS: Mapping[str, tuple[int, int, int, int]] = {
    "packed": (790, 580, 680, 520),
    "float16": (340, 200, 280, 180),
    "bfloat16": (100, 100, 100, 100),
    "integer:8": (370, 170, 360, 160),
    "integer:4": (500, 300, 550, 300),
    "topk": (1600, 380, 380, 310),
    "topk at random": (3600, 390, 360, 340),
}


def _coding_bytes(codec: Codec, tensor: TensorCost) -> Coding:
    sent, back = wire_bytes(codec, tensor)
    plain = tensor.num_bytes
    spans = tensor.spanned_bytes
    is_back = tensor.has_gradient
    if isinstance(codec, Packed):
        return _packed(tensor) if spans is None else _as_it_is(tensor)
    is_sent, is_sent_back = sent < plain, is_back and back < plain
    spans_back = tensor.spanned_gradient_bytes
    kept = _kept(codec, tensor) if is_sent else 0
    return Coding(
        saved_bytes=plain - sent,
        saved_back_bytes=plain * is_back - back,
        send_bytes=sent + kept + _send_rows(codec, tensor) if is_sent else 0,
        kept_bytes=kept * is_back,
        receive_bytes=plain + kept + _receive_rows(codec, tensor) if is_sent else plain,
        send_back_bytes=back + _send_back_rows(codec, tensor) if is_sent_back else 0,
        receive_back_bytes=(
            plain + _receive_back_rows(codec, tensor)
            if is_sent_back
            else plain * is_back
        ),
        grown_bytes=0 if spans is None or not is_sent else max(0, plain - spans),
        grown_back_bytes=(
            0 if spans_back is None or not is_sent_back else max(0, plain - spans_back)
        ),
    )


def _as_it_is(tensor: TensorCost) -> Coding:
    plain = tensor.num_bytes
    return Coding(receive_bytes=plain, receive_back_bytes=plain * tensor.has_gradient)


def _packed(tensor: TensorCost) -> Coding:
    """Bound ``Packed``: how many values are +0 is not known; likely, half."""
    plain, is_back = tensor.num_bytes, tensor.has_gradient
    rows, width = _block(tensor)
    bits, values = ceil(width / 8), rows * width * tensor.item_bytes
    kept = tensor.num_rows * bits
    mask = 8 * rows * bits
    coded = values + rows * width + max(values, mask + rows * bits)
    read = rows * bits + mask + 2 * values + 8
    half = plain // 2 * tensor.blocks
    return Coding(
        likely_saved_bytes=max(0, half - kept),
        likely_saved_back_bytes=half * is_back,
        send_bytes=plain + max(coded, kept),
        kept_bytes=kept * is_back,
        receive_bytes=plain + kept + read,
        send_back_bytes=(plain + max(coded, mask + 2 * values + 8)) * is_back,
        receive_back_bytes=(plain + read) * is_back,
    )


def _block(tensor: TensorCost) -> tuple[int, int]:
    """Return how many rows are coded at a time, and their length."""
    return min(tensor.num_rows, block_rows(tensor)), tensor.row_values


def _kept(codec: Codec, tensor: TensorCost) -> int:
    if not isinstance(codec, TopK):
        return 0
    return tensor.num_rows * ceil(tensor.row_values / 8)


def _send_rows(codec: Codec, tensor: TensorCost) -> int:
    """Size of what coding one block of rows takes beside the result."""
    rows, width = _block(tensor)
    values = 4 * rows * width
    if not isinstance(codec, TopK):
        return values + _write(codec, rows, width)
    return values + _mask(codec, rows, width)


def _mask(codec: TopK, rows: int, width: int) -> int:
    """Size of what it takes to find the largest values of some rows."""
    kept, mask = codec.num_kept(width), rows * width
    found = max(
        4 * mask + 12 * rows * kept,
        4 * mask + 4 * rows * kept + 4 * rows,
        7 * mask + 8 * rows,
    )
    if codec.random_share and width > kept:
        found = 5 * mask + max(found, 4 * mask)
    _, is_bits = place_bytes(codec, width)
    written = 9 * rows * ceil(width / 8) if is_bits else 20 * rows * kept
    return max(found, mask + written, mask + 4 * rows * kept)


def _receive_rows(codec: Codec, tensor: TensorCost) -> int:
    rows, width = _block(tensor)
    if not isinstance(codec, TopK):
        return _read(codec, rows, width)
    kept, (place, is_bits) = codec.num_kept(width), place_bytes(codec, width)
    held = _values_read(codec, rows, kept) + rows * place
    bits, mask = ceil(width / 8), rows * width
    if is_bits:
        return held + 8 * rows * bits + 4 * mask
    making = max(12 * rows * kept + mask, mask + 9 * rows * bits)
    return held + max(making, mask + 4 * mask)


def _send_back_rows(codec: Codec, tensor: TensorCost) -> int:
    rows, width = _block(tensor)
    if not isinstance(codec, TopK):
        return 4 * rows * width + _write(back_codec(codec), rows, width)
    kept, bits = codec.num_kept(width), ceil(width / 8)
    picked = 4 * rows * width + 8 * rows * bits + 4 * rows * kept
    return max(picked, 4 * rows * kept + _write(codec, rows, kept))


def _receive_back_rows(codec: Codec, tensor: TensorCost) -> int:
    rows, width = _block(tensor)
    if not isinstance(codec, TopK):
        return _read(back_codec(codec), rows, width)
    held = _values_read(codec, rows, codec.num_kept(width))
    return held + 8 * rows * ceil(width / 8) + 4 * rows * width


def _write(codec: Codec, rows: int, width: int) -> int:
    """Size of what ``row_codes.write_values`` takes."""
    match codec:
        case Float16() | TopK(values="float16"):
            return max(12 * rows, 4 * rows + 2 * rows * width)
        case BFloat16():
            return 2 * rows * width
        case Integer(bits=4):
            return max(16 * rows, 9 * rows + 2 * rows * ceil(width / 2))
        case Integer():
            return 16 * rows
    return 0


def _read(codec: Codec, rows: int, width: int) -> int:
    """Size of what ``row_codes.read_values`` takes, with the bytes that came."""
    came, values = rows * value_row(codec, width).total, 4 * rows * width
    match codec:
        case Float16() | TopK(values="float16"):
            return came + values + 4 * rows
        case Integer(bits=4):
            return came + values + 2 * rows * ceil(width / 2)
        case BFloat16() | Integer():
            return came + values
    return came


def _values_read(codec: TopK, rows: int, kept: int) -> int:
    """Size of what reading values leaves while they are laid out."""
    came = rows * value_row(codec, kept).total
    return came if codec.values == "float32" else came + 4 * rows * kept
