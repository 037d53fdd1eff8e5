"""What a codec at a cut costs: bytes on the wire, and memory, to the byte.

The numbers are those of ``edge/coding/``, which codes a few rows at a time by torch
operators. ``coded_profile`` puts them into a profile, so that all planning counts them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.types import (
    CODEC_TYPES,
    NO_CODING,
    RAW,
    BFloat16,
    ChainProfile,
    Codec,
    Coding,
    DeviceProfile,
    EdgeProfile,
    Float16,
    Integer,
    Link,
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

# --- choosing -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRequest:
    """What is known when the codec of one cut of a client is chosen.

    Parameters
    ----------
    device : DeviceProfile
        The client.
    link : Link or None
        The fastest of its links to the edges; None if none is known.
    route : Route
        A route that may be taken.
    crossing_index : int
        Which of the route's cuts, from 0.
    profile : ChainProfile
        Exact costs at the client's batch size.
    """

    device: DeviceProfile
    link: Link | None
    route: Route
    crossing_index: int
    profile: ChainProfile


ChooseCodec = Callable[[CodecRequest], Codec]
"""Chooses the codec of one cut."""

CodecChoice = Codec | ChooseCodec
"""One codec for all cuts, or a function that chooses."""


@dataclass(frozen=True, slots=True)
class CodecByRate:
    """The first codec whose rate a link reaches; see ``codec_by_rate``."""

    rates: tuple[tuple[float, Codec], ...]  # The highest first

    def __call__(self, request: CodecRequest) -> Codec:
        """Choose by the slower direction; the first for a link that is not known."""
        if request.link is None:
            return self.rates[0][1]
        slower = min(
            request.link.up_bytes_per_second, request.link.down_bytes_per_second
        )
        found = (codec for rate, codec in self.rates if slower >= rate)
        return next(found, self.rates[-1][1])


def codec_by_rate(codecs: Mapping[float, Codec]) -> ChooseCodec:
    """Choose codecs by the rates of links.

    Parameters
    ----------
    codecs : Mapping[float, Codec]
        For each rate in bytes per second the codec from there on. Slower links take
        that of the lowest rate; those of unknown rate that of the highest.

    Raises
    ------
    ValueError
        If there is none, or a rate is below 0.
    TypeError
        If something is no codec.

    Examples
    --------
    >>> from flwr_smartsplit import Integer, Packed, TopK
    >>> choose = codec_by_rate({1e6: Packed(), 1e5: Integer(), 0: TopK(fraction=0.1)})
    """
    if not codecs or not all(rate >= 0 for rate in codecs):
        raise ValueError(
            f"codec_by_rate has the rates {list(codecs)}: give at least one, in bytes "
            "per second, from 0 on."
        )
    for codec in codecs.values():
        check_codec(codec)
    return CodecByRate(tuple(sorted(codecs.items(), key=lambda each: -each[0])))


def check_codec(codec: object) -> None:
    """Raise ``TypeError`` for what is no codec."""
    if not isinstance(codec, tuple(CODEC_TYPES.values())):
        raise TypeError(
            f"{codec!r:.99} is no codec: give Raw(), Packed(), Float16(), BFloat16(), "
            "Integer() or TopK()."
        )


def check_choice(codec: object) -> None:
    """Raise ``TypeError`` for what is neither a codec nor a function."""
    if isinstance(codec, type) or not callable(codec):
        check_codec(codec)


def chosen_codecs(
    choose: CodecChoice,
    device: DeviceProfile,
    profile: ChainProfile,
    edges: Sequence[EdgeProfile],
    *,
    route: Route | None = None,
) -> tuple[Codec, ...]:
    """Choose the codec at each cut of a chain, for a split there, or of one route."""
    size = len(profile.units)
    if isinstance(choose, Codec):
        return (choose,) * (size - 1)
    found: list[Codec] = [RAW] * (size - 1)
    links = [device.traits.link_to(edge.name) for edge in edges]
    known = [link for link in links if link is not None]
    fastest = max(known, key=lambda link: link.up_bytes_per_second, default=None)
    routes = map(Route.split, range(1, size)) if route is None else [route]
    for each in routes:
        for index, cut in enumerate(each.cuts):
            codec = choose(
                CodecRequest(
                    device=device,
                    link=fastest,
                    route=each,
                    crossing_index=index,
                    profile=profile,
                )
            )
            check_codec(codec)
            found[cut - 1] = codec
    return tuple(found)


# --- what it costs --------------------------------------------------------------------


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
    if isinstance(codec, Raw):
        return NO_CODING
    found = NO_CODING
    for tensor in unit.crossing:
        is_exact = tensor.dtype != "float64" or tensor.is_context
        if not (is_exact or isinstance(codec, Packed)):
            raise InvalidTask(
                f"what crosses the cut after {unit.name} is float64, which is for "
                f"tests of exactness, and {codec} would round it: use Packed(), or "
                "float32."
            )
        found = _joined(found, _coding(codec, tensor))
    return found if found.send_bytes or found.send_back_bytes else NO_CODING


def _joined(one: Coding, other: Coding) -> Coding:
    """Add a tensor that is coded after others, whose results are still there."""
    return Coding(
        saved_bytes=one.saved_bytes + other.saved_bytes,
        saved_back_bytes=one.saved_back_bytes + other.saved_back_bytes,
        send_bytes=one.send_bytes + other.send_bytes,
        kept_bytes=one.kept_bytes + other.kept_bytes,
        receive_bytes=one.receive_bytes + other.receive_bytes,
        send_back_bytes=one.send_back_bytes + other.send_back_bytes,
        receive_back_bytes=one.receive_back_bytes + other.receive_back_bytes,
        grown_bytes=one.grown_bytes + other.grown_bytes,
        grown_back_bytes=one.grown_back_bytes + other.grown_back_bytes,
    )


def _coding(codec: Codec, tensor: TensorCost) -> Coding:
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
    """Bound ``Packed``: how many values are +0 is not known."""
    plain, is_back = tensor.num_bytes, tensor.has_gradient
    rows, width = _block(tensor)
    bits, values = ceil(width / 8), rows * width * tensor.item_bytes
    kept = tensor.num_rows * bits
    mask = 8 * rows * bits
    coded = values + rows * width + max(values, mask + rows * bits + 8)
    read = rows * bits + mask + 2 * values + 8
    return Coding(
        send_bytes=plain + max(coded, kept),
        kept_bytes=kept * is_back,
        receive_bytes=plain + kept + read,
        send_back_bytes=(plain + mask + 2 * values + 8) * is_back,
        receive_back_bytes=(plain + read) * is_back,
    )


def _block(tensor: TensorCost) -> tuple[int, int]:
    """Return how many rows are coded at a time, and their length."""
    width = tensor.row_values
    return min(tensor.num_rows, block_rows(width)), width


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
    written = 9 * rows * ceil(width / 8) + 8 if is_bits else 20 * rows * kept
    return max(found, mask + written, mask + 4 * rows * kept)


def _receive_rows(codec: Codec, tensor: TensorCost) -> int:
    rows, width = _block(tensor)
    if not isinstance(codec, TopK):
        return _read(codec, rows, width)
    kept, (place, is_bits) = codec.num_kept(width), place_bytes(codec, width)
    held = _values_read(codec, rows, kept) + rows * place
    bits, mask = ceil(width / 8), rows * width
    if is_bits:
        return held + 8 * rows * bits + max(8, 4 * mask)
    making = max(12 * rows * kept + mask, mask + 9 * rows * bits + 8)
    return held + max(making, mask + 4 * mask)


def _send_back_rows(codec: Codec, tensor: TensorCost) -> int:
    rows, width = _block(tensor)
    if not isinstance(codec, TopK):
        return 4 * rows * width + _write(back_codec(codec), rows, width)
    kept, bits = codec.num_kept(width), ceil(width / 8)
    picked = 4 * rows * width + 8 * rows * bits + max(8, 4 * rows * kept)
    return max(picked, 4 * rows * kept + _write(codec, rows, kept))


def _receive_back_rows(codec: Codec, tensor: TensorCost) -> int:
    rows, width = _block(tensor)
    if not isinstance(codec, TopK):
        return _read(back_codec(codec), rows, width)
    held = _values_read(codec, rows, codec.num_kept(width))
    return held + 8 * rows * ceil(width / 8) + max(8, 4 * rows * width)


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
