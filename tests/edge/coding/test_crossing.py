"""What a crossing does to tensors: their bytes, their rows, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flwr_smartsplit import BFloat16, Float16, Integer, Packed, Raw, TopK
from flwr_smartsplit.edge.coding import crossing, row_codes, tensor_codes
from flwr_smartsplit.edge.coding.coded_rows import cost_of
from flwr_smartsplit.edge.coding.crossing import Crossing
from flwr_smartsplit.edge.message_bytes import decode, encode
from flwr_smartsplit.edge.protocol import Stepped
from flwr_smartsplit.edge.tensors import Coded, WireTensor
from flwr_smartsplit.errors import RefusedMessage
from flwr_smartsplit.types import Codec, codecs, wire_bytes

LOSSY: list[Codec] = [
    Float16(),
    BFloat16(),
    Integer(),
    Integer(bits=4),
    Integer(bits=8, back_bits=16),
    TopK(fraction=0.1),
    TopK(fraction=0.01),
    TopK(fraction=0.2, values="float16"),
    TopK(fraction=0.1, random_share=0.1),
]
ALL: list[Codec] = [Raw(), Packed(), *LOSSY]


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors as small as these take several blocks of rows."""
    monkeypatch.setattr(codecs, "BLOCK_VALUES", 2**12)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a ReLU's output."""
    chance = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=chance).relu().to(dtype)


def crossed(
    codec: Codec, value: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Send a boundary over one cut as a message, and its gradient back."""
    near, far = Crossing(codec, seed=(1,)), Crossing(codec)

    def delivered(sent: Any) -> Any:
        pieces = encode(Stepped(boundary=sent))
        return decode(b"".join(map(bytes, pieces))).boundary

    up = near.encode((value,), blocks=(True,))
    (came,) = far.decode(delivered(up))
    down = far.encode_gradients((gradient,))
    (back,) = near.decode_gradients(delivered(down))
    return came, back, (up[0].data.size, down[0].data.size)


def same(one: Tensor, other: Tensor) -> bool:
    """Compare bits, and how both lie in memory."""
    bits = [each.contiguous().view(torch.uint8) for each in (one, other)]
    return one.stride() == other.stride() and torch.equal(*bits)


@pytest.mark.parametrize("codec", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_and_layout(codec: Codec, dtype: torch.dtype) -> None:
    """The bytes are those of the formula; a tensor lies where it arrives as before."""
    value = drawn(6, 8, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    gradient = torch.randn_like(value)
    came, back, sizes = crossed(codec, value, gradient)
    expected = wire_bytes(codec, cost_of(value))
    if isinstance(codec, Packed):
        assert max(sizes) < expected[0]
    else:
        assert sizes == expected
    for one, other in ((came, value), (back, gradient)):
        assert (one.dtype, one.shape, one.stride()) == (
            other.dtype,
            other.shape,
            other.stride(),
        )


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 1001])
def test_bits_are_the_mask_in_eights(width: int) -> None:
    """The lowest bit first, as NumPy packs them; and back."""
    mask = drawn(5, width) > 0
    bits = row_codes.bits_of(mask)
    expected = np.packbits(mask.numpy(), axis=1, bitorder="little")
    assert np.array_equal(bits.numpy(), expected)
    assert torch.equal(row_codes.mask_of(bits, width), mask)


@pytest.mark.parametrize("codec", LOSSY[:-1], ids=str)
def test_parts_of_a_batch_give_the_same_bits(codec: Codec) -> None:
    """Each row for itself, also where a tensor has more than one block of rows."""
    value, gradient = drawn(40, 600), torch.randn(40, 600)
    whole = crossed(codec, value, gradient)[:2]
    parts = [
        crossed(codec, value[i : i + 7], gradient[i : i + 7])[:2]
        for i in range(0, 40, 7)
    ]
    for index in (0, 1):
        joined = torch.cat([part[index] for part in parts])
        assert same(joined, whole[index])


def test_one_scale_for_all_rows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: then the rows of a part would depend on the others."""
    write = row_codes._write_levels

    def at_once(rows: Tensor, headers: Tensor, codes: Tensor, bits: int) -> None:
        rows[:, 0] = rows.max()
        write(rows, headers, codes, bits)

    monkeypatch.setattr(row_codes, "_write_levels", at_once)
    with pytest.raises(AssertionError):
        test_parts_of_a_batch_give_the_same_bits(Integer())


def test_how_close_values_stay() -> None:
    """By the codec's digits, also of gradients far too small for plain float16."""
    value, tiny = drawn(4, 1000), torch.randn(4, 1000) * 1e-9
    limits = {Float16(): 5e-4, BFloat16(): 4e-3, Integer(): 2e-3, Integer(bits=4): 4e-2}
    for codec, limit in limits.items():
        came, back, _ = crossed(codec, value, tiny)
        assert (came - value).abs().max() <= limit * value.max()
        assert (back - tiny).abs().max() <= 2 * limit * tiny.abs().max()


@pytest.mark.parametrize("extreme", [3.4e38, 1e-45, 0.0])
def test_extreme_rows_stay_finite(extreme: float) -> None:
    """The largest, the smallest and no value at all."""
    row = torch.tensor([extreme, 0.0, extreme / 2, 0.0, 0.0, 0.0, 0.0, 0.0] * 4)
    for codec in (Float16(), Integer(), TopK(fraction=0.5, values="float16")):
        came, _, _ = crossed(codec, row[None], row[None])
        assert came.isfinite().all()
        assert (came - row).abs().max() <= extreme * 4e-3 + 1e-37


@pytest.mark.parametrize("codec", ALL, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_is_not_hidden(
    codec: Codec, bad: float
) -> None:
    """One row of the batch is lost, as the user will see."""
    value = drawn(3, 64)
    clean = crossed(codec, value, value)[0]
    value[1, 5] = bad
    came, _, _ = crossed(codec, value, value)
    if not (isinstance(codec, TopK) and codec.random_share):
        assert not came[1].isfinite().all()
    assert same(came[::2].contiguous(), clean[::2].contiguous())


def test_of_equal_values_the_first_count() -> None:
    """So that every machine sends the same ones."""
    row = torch.tensor([[1.0, -2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0]])
    came, back, _ = crossed(TopK(fraction=0.2), row, torch.ones(1, 10))
    assert came.nonzero()[:, 1].tolist() == [1, 2]
    assert back.nonzero()[:, 1].tolist() == [1, 2]


def test_later_ones_of_equal_values_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: ties by the higher index."""
    largest = row_codes.largest
    monkeypatch.setattr(
        row_codes, "largest", lambda x, count: largest(x.flip(1), count).flip(1)
    )
    with pytest.raises(AssertionError):
        test_of_equal_values_the_first_count()


def test_the_gradient_comes_back_for_what_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the places of the boundary; planted: at the gradient's own largest."""

    def check() -> None:
        value, gradient = drawn(4, 100), torch.randn(4, 100)
        came, back, _ = crossed(TopK(), value, gradient)
        assert same(back, torch.where(came != 0, gradient, torch.zeros(())))

    check()

    def own(codec: TopK, gradient: Tensor, cost: Any, at: Any) -> Coded:
        mask = row_codes.largest(gradient, codec.num_kept(at.width))
        bits = row_codes.bits_of(mask)
        return tensor_codes.top_back(codec, gradient, cost, replace(at, bits=bits))

    monkeypatch.setattr(crossing, "top_back", own)
    with pytest.raises(AssertionError):
        check()


def test_drawn_places_depend_on_the_step_and_are_as_many() -> None:
    """Derived, so every repetition draws the same; evaluation draws none."""
    codec, value = TopK(fraction=0.2, random_share=0.5), drawn(30, 200)

    def sent(step: int, **how: Any) -> Tensor:
        near, far = Crossing(codec, seed=(1,), **how), Crossing(codec)
        return far.decode(near.encode((value + 1,), step=step))[0]

    assert same(sent(0), sent(0))
    assert not same(sent(0), sent(1))
    assert (sent(0) != 0).sum(1).tolist() == [40] * 30
    plain = Crossing(TopK(fraction=0.2))
    top = plain.decode(plain.encode((value + 1,)))[0]
    assert same(sent(1, is_trained=False), top)
    share = 1 - float(((sent(0) != 0) & (top != 0)).sum() / 1200)
    assert 0.4 < share < 0.7  # Places are not drawn twice, so a little above a half


def test_what_goes_along_is_not_rounded() -> None:
    """A mask of -inf beside the output stays as it is; the output is rounded."""
    value, mask = drawn(4, 64), torch.full((4, 64), -torch.inf)
    near, far = Crossing(Integer()), Crossing(Integer())
    flags = (True, False)
    sent = near.encode((value, mask), gradients=flags)
    came = far.decode(sent, gradients=flags)
    assert not same(came[0], value)
    assert same(came[1], mask)
    assert len(near.decode_gradients(far.encode_gradients((value,)))) == 1


# --- what is refused ------------------------------------------------------------------


def sent_by(codec: Codec) -> Coded:
    """Make a coded tensor."""
    (sent,) = Crossing(codec).encode((drawn(4, 60),), blocks=(True,))
    assert isinstance(sent, Coded)
    return sent


def poked(sent: Coded, index: int, *values: int) -> Coded:
    """Change some bytes in a row."""
    data = sent.data.copy()
    for place, value in enumerate(values, start=index):
        data[place] = value
    return replace(sent, data=data)


FORGED: dict[str, tuple[Codec, Callable[[Coded], Any]]] = {
    "a byte too few": (Integer(), lambda s: replace(s, data=s.data[:-1])),
    "another codec's": (Integer(), lambda s: sent_by(Float16())),
    "plain bytes": (Integer(), lambda s: WireTensor.pack(drawn(4, 60))),
    "more rows than came": (
        Integer(),
        lambda s: replace(s, shape=(2**30, 60), strides=(60, 1)),
    ),
    "a scale of inf": (Integer(), lambda s: poked(s, 0, 0, 0, 0x80, 0x7F)),
    "a scale below 0": (Integer(), lambda s: poked(s, 0, 0, 0, 0x80, 0xBF)),
    "an exponent of -128": (Float16(), lambda s: poked(s, 0, 0x80)),
    "a place too many": (TopK(), lambda s: poked(s, -1, 0x0F)),
    "places that fall": (TopK(fraction=0.02), lambda s: poked(s, -1, 0xFF)),
    "more values than bits": (Packed(), lambda s: poked(s, 0, 0)),
    "bits behind the end": (Packed(), lambda s: poked(s, 7, 0xFF)),
    "fewer bits than rows": (Packed(), lambda s: replace(s, data=s.data[:3])),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_no_codec_writes_is_refused(name: str) -> None:
    """It says what came, and what the codec of the cut is."""
    codec, forge = FORGED[name]
    with pytest.raises(RefusedMessage, match=f"codec of this cut is {codec}"):
        Crossing(codec).decode((forge(sent_by(codec)),))


def test_a_coded_tensor_says_no_more_than_its_bytes() -> None:
    """Shapes, gaps and sizes that no codec makes are no message."""
    coded = sent_by(Integer())
    for wrong in (
        {"shape": (4, 61)},
        {"strides": (61, 1)},
        {"shape": (0, 60)},
        {"shape": (), "strides": ()},
        {"data": np.zeros(960, np.uint8)},
        {"data": coded.data.astype(np.int8)},
        {"dtype": "text"},
        {"offset": 64},
    ):
        with pytest.raises(ValueError, match=r"coded|codes|gaps|none of|not in"):
            replace(coded, **wrong)  # type: ignore[arg-type]
    with pytest.raises(RefusedMessage, match="sends this one as it is"):
        Crossing().decode((coded,))


def test_gradients_that_do_not_fit_are_refused() -> None:
    """Another number of them, or another shape."""
    near = Crossing(TopK())
    near.encode((drawn(4, 60),))
    with pytest.raises(RefusedMessage, match="0 gradients came back for 1"):
        near.decode_gradients(())
    near.encode((drawn(4, 60),))
    (other,) = Crossing(Float16()).encode((drawn(5, 60),))
    with pytest.raises(RefusedMessage, match=r"shape \(5, 60\) came back"):
        near.decode_gradients((other,))


@pytest.mark.parametrize("codec", [Packed(), *LOSSY], ids=str)
@pytest.mark.parametrize(
    "count", [100, pytest.param(10_000, marks=pytest.mark.slow)], ids=str
)
def test_forged_bytes_are_refused_or_read(codec: Codec, count: int) -> None:
    """Nothing else happens: no other exception, and nothing larger than it says."""
    rng, good = Random(str(codec)), sent_by(codec)
    kinds = (
        lambda s: poked(s, rng.randrange(s.data.size), rng.randrange(256)),
        lambda s: replace(s, data=s.data[: rng.randrange(s.data.size)]),
        lambda s: replace(s, data=np.frombuffer(rng.randbytes(s.data.size), np.uint8)),
        lambda s: replace(s, dtype=rng.choice(["float64", "bool", "int8", "float16"])),
        lambda s: replace(s, shape=(60, 4), strides=(4, 1)),
        lambda s: replace(s, shape=(2, 2, 60), strides=(120, 60, 1)),
    )
    for _ in range(count):
        far = Crossing(codec)
        try:
            (came,) = far.decode((rng.choice(kinds)(good),))
            far.encode_gradients((torch.ones_like(came),))
        except (RefusedMessage, ValueError):
            continue
        assert came.numel() == 240
