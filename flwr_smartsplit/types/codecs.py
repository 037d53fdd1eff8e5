"""Codecs: how the tensors at a cut of a route are written, and how many bytes it takes.

A row is what a tensor has under one index of its first dimension. Codecs write each row
for itself, so a batch in parts gives the same bits. What carries no gradient beside the
output of a unit, such as a mask, is never rounded. Nor is a tensor coded where its
plain bytes would be fewer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil
from typing import Any

from flwr_smartsplit.types.sizes import own_numbers

FLOATS: Mapping[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of a value, by torch's name of the dtype."""

LOSSY = frozenset(FLOATS) - {"float64"}
"""What may be rounded: float64 is for tests of exactness, which rounding defeats."""

_MOST_SHORT_PLACES = 2**16
_BITS = 8


class _Named:
    """Writes itself as ``codec_from_text`` reads it."""

    __slots__ = ()

    def __str__(self) -> str:
        return codec_text(self)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Raw(_Named):
    """Send every tensor as it is: today's bytes, and the default."""

    kind = "raw"


@dataclass(frozen=True, slots=True)
class Packed(_Named):
    """Send a bit for each value, and the values that are not +0: lossless.

    Behind a ReLU, ReLU6 or a max-pool of one, most values are +0, and the gradient
    comes back for the others only, since nothing passes there. Where most channels are
    +0, as behind a gate, a bit says for each channel whether its values are sent; then
    they are float16 if that keeps all their bits. What would not become smaller is sent
    as it is.
    """

    kind = "packed"


@dataclass(frozen=True, slots=True)
class Float16(_Named):
    """Send float16, each row times a power of two: about 3 digits, half the bytes."""

    kind = "float16"


@dataclass(frozen=True, slots=True)
class BFloat16(_Named):
    """Send bfloat16, rounded to nearest even: about 2 digits, half the bytes."""

    kind = "bfloat16"


@dataclass(frozen=True, slots=True)
class Integer(_Named):
    """Send whole numbers between the least and the largest value of each row.

    Parameters
    ----------
    bits : int
        8 or 4 for each value; a row takes 8 bytes more.
    back_bits : int, optional
        The same for the gradient, or 16 for ``Float16``; as many as ``bits`` if None.

    Raises
    ------
    ValueError
        If a number of bits is none of these.
    """

    kind = "integer"
    bits: int = 8
    back_bits: int | None = None

    def __post_init__(self) -> None:
        own_numbers(self)
        if self.bits not in (4, 8) or self.back_bits not in (None, 4, 8, 16):
            raise ValueError(
                f"Integer(bits={self.bits!r:.40}, back_bits={self.back_bits!r:.40}): "
                "give 8 or 4 bits, and 16, 8, 4 or None for the gradient."
            )


@dataclass(frozen=True, slots=True)
class TopK(_Named):
    """Send the largest values of each row; the gradient comes back for these only.

    Parameters
    ----------
    fraction : float
        Of each row's values, above 0 and at most 1; at least one value is sent. Of
        equal ones, the first count.
    random_share : float
        The share of places that training draws among the other values, from 0 to below
        1: RandTopk's alpha, 0.1 in its paper. Evaluation draws none.
    values : str
        "float32", or "float16" with a power of two for each row.

    Raises
    ------
    ValueError
        If something is out of range.

    References
    ----------
    Zheng et al., "Reducing Communication for Split Learning by Randomized Top-k
    Sparsification", IJCAI 2023.
    """

    kind = "topk"
    fraction: float = 0.1
    random_share: float = 0.0
    values: str = "float32"

    def __post_init__(self) -> None:
        own_numbers(self)
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"TopK(fraction={self.fraction!r:.40}): give a part above 0 and at "
                "most 1."
            )
        if not 0 <= self.random_share < 1:
            raise ValueError(
                f"TopK(random_share={self.random_share!r:.40}): give a part from 0 to "
                "below 1."
            )
        if self.values not in ("float32", "float16"):
            raise ValueError(
                f'TopK(values={self.values!r:.40}): give "float32" or "float16".'
            )

    def num_kept(self, num_values: int) -> int:
        """Count the values that are sent of a row."""
        return max(1, round(self.fraction * num_values))


Codec = Raw | Packed | Float16 | BFloat16 | Integer | TopK
"""How the boundary at one cut, and its gradient, are written."""

RAW = Raw()
CODEC_TYPES: Mapping[str, type[Codec]] = {
    each.kind: each for each in (Raw, Packed, Float16, BFloat16, Integer, TopK)
}


def codec_at(codecs: tuple[Codec, ...], index: int) -> Codec:
    """Return the codec of a route's ``index``-th cut; ``RAW`` if none is named."""
    return codecs[index] if codecs else RAW


def codec_values(codec: Codec) -> dict[str, Any]:
    """Write a codec as plain values: its kind, and what is not the default."""
    given = ((field, getattr(codec, field.name)) for field in fields(codec))
    return {"kind": codec.kind} | {
        field.name: value for field, value in given if value != field.default
    }


def codec_from(values: Mapping[str, Any]) -> Codec:
    """Read what ``codec_values`` wrote, or raise ``ValueError``."""
    given = dict(values)
    kind = str(given.pop("kind", ""))
    try:
        return CODEC_TYPES[kind](**given)
    except (KeyError, TypeError):
        raise ValueError(
            f"codec {dict(values)!r:.200} is none of {', '.join(CODEC_TYPES)} of this "
            "release: use one release of flwr_smartsplit everywhere."
        ) from None


def codec_text(codec: Codec) -> str:
    """Write a codec for a person, as ``codec_from_text`` reads it."""
    given = [getattr(codec, field.name) for field in fields(codec)]
    while given and given[-1] == fields(codec)[len(given) - 1].default:
        given.pop()
    if isinstance(codec, Integer | TopK) and not given:
        given = [getattr(codec, fields(codec)[0].name)]
    return ":".join([codec.kind, *map(str, given)])


def codec_from_text(text: str) -> Codec:
    """Read a codec such as ``packed``, ``integer:8`` or ``topk:0.1:0.05:float16``.

    Raises
    ------
    ValueError
        If it is none.
    """
    kind, *given = text.strip().lower().split(":")
    cls = CODEC_TYPES.get(kind)
    names = () if cls is None else tuple(field.name for field in fields(cls))
    if cls is None or len(given) > len(names):
        raise ValueError(
            f"{text!r:.99} is no codec: write one of {', '.join(CODEC_TYPES)}; integer "
            "takes its bits, as in integer:8 or integer:4:16, and topk its fraction, "
            "as in topk:0.1."
        )
    return cls(**dict(zip(names, map(_value, given), strict=False)))


def _value(text: str) -> Any:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return None if text == "none" else text


# --- bytes on the wire ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowBytes:
    """What one row takes on the wire: numbers that describe it, then its values."""

    header: int
    codes: int

    @property
    def total(self) -> int:
        """Size of both."""
        return self.header + self.codes


def value_row(codec: Codec, num_values: int) -> RowBytes:
    """Say what values of one row take that are rounded, or sent as float32."""
    match codec:
        case Float16() | TopK(values="float16"):
            return RowBytes(1, 2 * num_values)
        case BFloat16():
            return RowBytes(0, 2 * num_values)
        case Integer(bits=bits):
            return RowBytes(8, ceil(bits * num_values / _BITS))
    return RowBytes(0, 4 * num_values)


def place_bytes(codec: TopK, num_values: int) -> tuple[int, bool]:
    """Return the size of one row's places, and whether they are bits, not indices."""
    index = 2 if num_values <= _MOST_SHORT_PLACES else 4
    bits, indices = ceil(num_values / _BITS), index * codec.num_kept(num_values)
    return (bits, True) if bits <= indices else (indices, False)


def back_codec(codec: Codec) -> Codec:
    """Return what writes the gradient's values."""
    if isinstance(codec, Integer) and codec.back_bits is not None:
        return Float16() if codec.back_bits == 16 else Integer(codec.back_bits)  # noqa: PLR2004
    return codec


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCost:
    """One tensor that crosses a cut, as far as its bytes and memory depend on it."""

    shape: tuple[int, ...]
    dtype: str  # Torch's name
    item_bytes: int = 4
    is_context: bool = False  # Whether it goes along as it is, and is never rounded
    has_gradient: bool = True  # Whether its gradient comes back
    blocks: bool = False  # Whether none passes where it is +0, as behind a ReLU
    # What it and its gradient span in memory, if that has gaps or repetitions
    spanned_bytes: int | None = None
    spanned_gradient_bytes: int | None = None

    @property
    def num_rows(self) -> int:
        """The length of its first dimension; 0 for a single value."""
        return self.shape[0] if self.shape else 0

    @property
    def row_values(self) -> int:
        """Values of a row."""
        count = 1
        for size in self.shape[1:]:
            count *= size
        return count

    @property
    def num_values(self) -> int:
        """How many values it has."""
        return self.num_rows * self.row_values if self.shape else 1

    @property
    def num_bytes(self) -> int:
        """Size of its plain bytes."""
        return self.num_values * self.item_bytes


def is_lossless(codec: Codec) -> bool:
    """Say whether what a codec sends arrives with all bits."""
    return isinstance(codec, Raw | Packed)


def sent_row_bytes(codec: Codec, tensor: TensorCost) -> int | None:
    """Return the bytes of one coded row on its way forward; None if sent as it is.

    ``Packed`` is None, too: how small it becomes is seen when it is done.
    """
    width = tensor.row_values
    if is_lossless(codec) or tensor.dtype not in LOSSY:
        return None
    if tensor.is_context or not tensor.num_rows * width:
        return None
    coded = value_row(codec, width).total
    if isinstance(codec, TopK):
        kept = codec.num_kept(width)
        coded = value_row(codec, kept).total + place_bytes(codec, width)[0]
    return coded if coded < width * tensor.item_bytes else None


def back_row_bytes(codec: Codec, tensor: TensorCost) -> int | None:
    """Return the bytes of one coded row of the gradient; None if sent as it is."""
    if isinstance(codec, TopK):
        if sent_row_bytes(codec, tensor) is None:
            return None
        return value_row(codec, codec.num_kept(tensor.row_values)).total
    return sent_row_bytes(back_codec(codec), tensor)


def wire_bytes(codec: Codec, tensor: TensorCost) -> tuple[int, int]:
    """Return the bytes of a tensor and of its gradient on the wire.

    Those of ``Packed`` are the most that it takes: as many as ``Raw``.
    """
    sent, back = sent_row_bytes(codec, tensor), back_row_bytes(codec, tensor)
    plain, rows = tensor.num_bytes, tensor.num_rows
    return (
        plain if sent is None else rows * sent,
        (plain if back is None else rows * back) * tensor.has_gradient,
    )


BLOCK_VALUES, LEAST_BLOCK_VALUES = 2**15, 2**12
_BLOCKS = 8


def block_rows(tensor: TensorCost) -> int:
    """Return how many rows are coded at a time.

    An eighth of the tensor's, so that coding takes little memory beside it; but blocks
    of a few values are slow, and large ones no faster.
    """
    values = max(tensor.num_values // _BLOCKS, LEAST_BLOCK_VALUES)
    return max(1, min(values, BLOCK_VALUES) // max(tensor.row_values, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """What a codec saves at one cut, and the memory that it takes at both ends.

    All sizes are of one micro-batch. The memory is beside what there is anyhow, and
    includes what is sent; what arrives includes the tensors that are read.
    """

    saved_bytes: int = 0  # Of the boundary's plain bytes
    saved_back_bytes: int = 0  # Of its gradient's
    send_bytes: int = 0  # The most while the boundary is coded
    kept_bytes: int = 0  # What is kept from then on for the gradient, at each end
    receive_bytes: int = 0  # The most while the boundary is read
    send_back_bytes: int = 0
    receive_back_bytes: int = 0
    # By which what arrives is larger in memory than where it was made
    grown_bytes: int = 0
    grown_back_bytes: int = 0
    # What is saved besides if as many values are +0 as usual
    likely_saved_bytes: int = 0
    likely_saved_back_bytes: int = 0
    # FLOPs of training that take as long as coding: the boundary where it is made and
    # where it arrives, and its gradient
    send_flops: int = 0
    receive_flops: int = 0
    send_back_flops: int = 0
    receive_back_flops: int = 0


NO_CODING = Coding()
