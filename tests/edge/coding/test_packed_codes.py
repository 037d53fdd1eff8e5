"""What ``Packed`` leaves out, value by value or channel by channel: never a bit."""

from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flwr_smartsplit import Packed
from flwr_smartsplit.edge.coding import packed_codes
from flwr_smartsplit.edge.coding.crossing import Crossing
from flwr_smartsplit.edge.tensors import Coded, WireTensor
from flwr_smartsplit.errors import RefusedMessage
from flwr_smartsplit.types import codecs
from tests.edge.coding.test_crossing import crossed, drawn, same


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors as small as these take several blocks of rows."""
    monkeypatch.setattr(codecs, "BLOCK_VALUES", 2**7)
    monkeypatch.setattr(codecs, "LEAST_BLOCK_VALUES", 2**7)


def there_and_back(
    value: Tensor, gradient: Tensor, *, blocks: bool = False
) -> tuple[Tensor, Tensor, Any, Any]:
    """Send a tensor over a cut, and its gradient back; return what was sent, too."""
    near, far = Crossing(Packed()), Crossing(Packed())
    (up,) = near.encode((value,), blocks=(blocks,))
    (came,) = far.decode((up,))
    (down,) = far.encode_gradients((gradient,))
    (back,) = near.decode_gradients((down,))
    return came, back, up, down


# --- a bit for each value -------------------------------------------------------------


def test_packed_is_lossless_to_the_sign_of_zero() -> None:
    """-0.0 is a value; the bits of NaN stay; masks take a bit."""
    value = drawn(5, 33)
    value[0, :3] = torch.tensor([-0.0, torch.nan, -torch.inf])
    gradient = torch.randn(5, 33)
    came, back, _ = crossed(Packed(), value, gradient)
    assert same(came, value)
    is_value = value.view(torch.int32) != 0
    assert same(back, torch.where(is_value, gradient, torch.zeros(())))
    mask = drawn(5, 33) > 0
    assert same(crossed(Packed(), mask, mask)[0], mask)
    assert crossed(Packed(), mask, mask)[2][0] == 5 * 5


def test_packed_is_never_larger_than_raw() -> None:
    """Where nothing is zero, the plain bytes are sent, and all of the gradient."""
    dense = torch.randn(4, 40)
    assert crossed(Packed(), dense, dense)[2] == (dense.nbytes, dense.nbytes)
    near, far = Crossing(Packed()), Crossing(Packed())
    value = drawn(4, 40)
    far.decode(near.encode((value,), blocks=(False,)))  # Behind no ReLU
    (back,) = near.decode_gradients(far.encode_gradients((dense,)))
    assert same(back, dense)


def test_a_gradient_with_zeros_of_its_own_is_packed() -> None:
    """As behind a gate, whose closed channels get none; forged bytes are refused."""
    value, gradient = torch.randn(4, 8, 6), torch.randn(4, 8, 6)
    value[:, 1:], gradient[:, 1:] = 0.0, 0.0
    gradient[0, 0, 0] = -0.0
    near, far = Crossing(Packed()), Crossing(Packed())
    far.decode(near.encode((value,), blocks=(False,)))
    (sent,) = far.encode_gradients((gradient,))
    assert isinstance(sent, Coded)
    assert sent.data.size == 4 * 6 + 4 * 6 * 4
    near.encode((value,), blocks=(False,))
    for wrong in (sent.data[:-1], sent.data[:20], np.append(sent.data, np.uint8(1))):
        with pytest.raises(RefusedMessage, match="bytes came"):
            near.decode_gradients((replace(sent, data=wrong),))
        near.encode((value,), blocks=(False,))
    (back,) = near.decode_gradients((sent,))
    assert same(back, gradient)


# --- a bit for each channel -----------------------------------------------------------

SHAPES = {(5, 16): 1, (5, 6, 16): 2, (5, 16, 3, 7): 1, (5, 16, 2, 3, 4): 1}
"""Shapes with 16 channels, and where these are."""


def few_channels(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, num_open: int = 3
) -> Tensor:
    """Draw values of which all but some channels are +0."""
    chance = torch.Generator().manual_seed(7)
    values = torch.randn(shape, generator=chance)
    is_open = torch.arange(16) % 5 == 2
    is_open &= is_open.cumsum(0) <= num_open
    sizes = [1] * len(shape)
    sizes[SHAPES[shape]] = 16
    return torch.where(is_open.view(sizes), values, 0).to(dtype)


def as_halves(values: Tensor, exponent: int = 0) -> Tensor:
    """Round to what float16 has of each, times a power of two."""
    return torch.ldexp(values.half().float(), torch.tensor(exponent))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("exponent", [0, -40, 90])
def test_open_channels_cross_as_float16(shape: tuple[int, ...], exponent: int) -> None:
    """2 bytes for each value, one for each row, and a bit for each channel."""
    value = as_halves(few_channels(shape), exponent)
    came, back, up, down = there_and_back(value, value)
    assert same(came, value) and same(back, value)
    pixels = value[0].numel() // 16
    assert up.data.size == down.data.size == 5 * (3 * pixels * 2 + 1) + 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str
)
def test_what_float16_cannot_write_crosses_as_it_is(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Float32 with all its digits, and other dtypes; the closed channels stay here."""
    value = few_channels(shape).mul(1e3).to(dtype)
    came, back, up, _ = there_and_back(value, value)
    assert same(came, value) and same(back, value)
    pixels = value[0].numel() // 16
    assert up.data.size == 5 * 3 * pixels * value.element_size() + 2


@pytest.mark.parametrize(
    "odd", [-0.0, torch.nan, torch.inf, 1e-45, 2.0**127, -65504.0, 2.0**-24]
)
def test_odd_values_in_an_open_channel_keep_their_bits(odd: float) -> None:
    """Also where float16 would have lost them."""
    value = as_halves(few_channels((5, 16, 3, 7)))
    value[3, 2, 1, 1] = odd
    came, back, up, _ = there_and_back(value, value)
    assert up.has_channels
    assert same(came, value) and same(back, value)


def test_a_float16_that_loses_bits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: nobody looks whether float16 keeps what there is."""
    value = few_channels((5, 16, 3, 7))
    assert same(there_and_back(value, value)[0], value)
    monkeypatch.setattr(packed_codes, "_are_halves", lambda *args: True)
    assert not same(there_and_back(value, value)[0], value)


def test_one_value_in_the_last_row_opens_its_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All rows are looked at: what the first ones lack is not lost."""
    value = as_halves(few_channels((5, 16, 3, 7)))
    value[4, 9, 2, 6] = 1.0
    came, _, up, _ = there_and_back(value, value)
    assert up.has_channels and same(came, value)
    # Planted: the last row is not.
    found = packed_codes._open_channels

    def without_the_last(tensor: Tensor, cost: Any) -> Any:
        seen = tensor.clone()
        seen[-1] = 0
        return found(seen, cost)

    monkeypatch.setattr(packed_codes, "_open_channels", without_the_last)
    assert not same(there_and_back(value, value)[0], value)


def test_the_shorter_form_is_taken() -> None:
    """Zeros in many channels take a bit for each value, as do more than half."""
    scattered = drawn(5, 16, 3, 7)
    assert not there_and_back(scattered, scattered)[2].has_channels
    sparse = few_channels((5, 16, 3, 7))
    sparse[torch.rand(sparse.shape) < 0.95] = 0
    assert not there_and_back(sparse, sparse)[2].has_channels
    most = torch.randn(5, 16, 3, 7)
    most[:, 9:] = 0
    assert not there_and_back(most, most)[2].has_channels
    nothing = torch.zeros(5, 16, 3, 7)
    came, _, up, _ = there_and_back(nothing, nothing)
    assert same(came, nothing) and up.data.size == 2


@pytest.mark.parametrize("is_last", [False, True])
def test_layouts_stay(is_last: bool) -> None:
    """Channels may lie last in memory, and tensors be parts of others."""
    value = as_halves(few_channels((5, 16, 3, 7)))
    if is_last:
        value = value.to(memory_format=torch.channels_last)
    came, back, up, _ = there_and_back(value, value.contiguous())
    assert up.has_channels
    assert same(came, value) and same(back, value.contiguous())
    part = value[1:4]
    assert same(there_and_back(part, part)[0], part)


def test_behind_a_relu_the_gradient_comes_back_for_values() -> None:
    """Not for all of an open channel: where the value is +0, none passes."""
    value = as_halves(few_channels((5, 16, 3, 7))).relu()
    gradient = torch.randn(value.shape)
    _, back, up, down = there_and_back(value, gradient, blocks=True)
    assert up.has_channels
    assert same(back, torch.where(value > 0, gradient, torch.zeros(())))
    assert down.data.size == 4 * int((value > 0).sum())


def sent_channels() -> Coded:
    """Make a tensor with 3 open channels, as float16."""
    value = as_halves(few_channels((5, 16, 3, 7)))
    (sent,) = Crossing(Packed()).encode((value,), blocks=(False,))
    assert isinstance(sent, Coded)
    return sent


@pytest.mark.parametrize(
    "forge",
    [
        lambda s: replace(s, data=s.data[:-1]),
        lambda s: replace(s, data=s.data[:1]),
        lambda s: replace(s, data=np.append(s.data, np.uint8(1))),
        lambda s: replace(s, data=np.append(np.uint8(0xFF), s.data[1:])),
        lambda s: replace(s, shape=(525, 1), strides=(1, 1)),
        lambda s: replace(s, shape=(1680,), strides=(1,)),
        lambda s: replace(s, dtype="complex64"),
        lambda s: replace(s, dtype="float64"),
        lambda s: replace(s, has_channels=False),
    ],
)
def test_forged_channels_are_refused(forge: Any) -> None:
    """Whatever does not fit what is said of it."""
    assert Crossing(Packed()).decode((sent_channels(),))
    with pytest.raises(RefusedMessage, match="codec of this cut is packed"):
        Crossing(Packed()).decode((forge(sent_channels()),))


def test_bits_behind_the_last_channel_are_refused() -> None:
    """As those behind the end of a row."""
    value = torch.zeros(4, 9, 5, 5)
    value[:, 0] = 1.0
    (sent,) = Crossing(Packed()).encode((value,), blocks=(False,))
    assert isinstance(sent, Coded) and sent.has_channels
    data = sent.data.copy()
    data[1] = 0x80
    with pytest.raises(RefusedMessage, match="places came that no row has"):
        Crossing(Packed()).decode((replace(sent, data=data),))


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_forged_bytes_of_channels_are_refused_or_read(count: int) -> None:
    """Nothing else happens, and nothing is larger than it says."""
    rng, good = Random(3), sent_channels()

    def bent(data: Any) -> Any:
        data = data.copy()
        data[rng.randrange(data.size)] = rng.randrange(256)
        return data

    kinds = (
        lambda: replace(good, data=bent(good.data)),
        lambda: replace(good, data=good.data[: rng.randrange(good.data.size)]),
        lambda: replace(good, dtype=rng.choice(["float64", "bool", "complex64"])),
        lambda: replace(good, blocks=True, data=bent(good.data)),
        lambda: replace(good, shape=(16, 5, 3, 7)),
        lambda: replace(good, shape=(1680,), strides=(1,)),
    )
    for _ in range(count):
        far = Crossing(Packed())
        try:
            (came,) = far.decode((rng.choice(kinds)(),))
            (back,) = far.encode_gradients((torch.ones_like(came),))
        except (RefusedMessage, ValueError):
            continue
        assert came.numel() == 1680
        assert isinstance(back, Coded | WireTensor)
