"""The wire: a tensor arrives with its values, dtype, shape and strides, on its own."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flwr_smartsplit.edge.message_bytes import checksum
from flwr_smartsplit.edge.tensors import WireTensor, state_digest

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def bits(tensor: Tensor) -> bytes:
    """Read a tensor's values as bytes, in index order."""
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype)
    plain.view(tensor.shape).copy_(tensor)
    return plain.view(torch.uint8).numpy().tobytes()


def assert_same(copy: Tensor, tensor: Tensor) -> None:
    """Compare in every respect that a kernel could see."""
    assert copy.dtype == tensor.dtype
    assert copy.shape == tensor.shape
    assert copy.stride() == tensor.stride()
    assert bits(copy) == bits(tensor)


BASE = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
LAYOUTS = {
    "contiguous": BASE,
    "transposed": BASE.transpose(1, 3),
    "channels last": BASE.contiguous(memory_format=torch.channels_last),
    "gapped slice": BASE[:, :, ::2],
    "narrowed": BASE[1:, 1:2, :, 2:4],
    "expanded": BASE[:, :1].expand(2, 7, 4, 5),
    "expanded scalar": torch.tensor(3.0).expand(4, 2),
    "all dimensions expanded but one": BASE[0, 0, 0].expand(3, 4, 5),
    "overlapping windows": torch.arange(9.0).unfold(0, 4, 2),
    "diagonal": BASE[0, 0].diagonal(),
    "zero-dimensional": torch.tensor(1.5),
    "zero-dimensional with an offset": BASE[1, 2, 3, 4],
    "empty": torch.empty(0),
    "empty in the middle": torch.empty(3, 0, 2),
    "empty slice": BASE[:, 3:],
    "empty and expanded": torch.ones(1, 2).expand(0, 2),
    "one element": torch.ones(1, 1, 1),
    "odd stride of a single row": BASE.as_strided((1, 5), (77, 1)),
    "needs a gradient": torch.ones(2, 2, requires_grad=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_arrives_as_it_was(layout: str) -> None:
    """Values and strides survive, gaps and repetitions too."""
    tensor = LAYOUTS[layout]
    packed = WireTensor.pack(tensor)
    copy = packed.unpack()
    assert_same(copy, tensor.detach())
    assert not copy.requires_grad
    assert packed.data.nbytes == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)], ids=str)
def test_every_dtype_arrives_as_it_was(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Also those numpy does not know."""
    tensor = (torch.rand(shape) * 9).to(dtype)
    assert_same(WireTensor.pack(tensor).unpack(), tensor)
    if tensor.dim() == 2:
        assert_same(WireTensor.pack(tensor.t()).unpack(), tensor.t())


def test_special_values_keep_their_bits() -> None:
    """NaN payloads, infinities, negative zero and subnormals are not touched."""
    numbers = np.array([0x7FC12345, 0xFFC00001, 0x80000000, 1, 0x7F800000], np.uint32)
    tensor = torch.from_numpy(numbers.view(np.float32))
    assert_same(WireTensor.pack(tensor).unpack(), tensor)


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """Draw a view: any order of dimensions, steps, offsets and expansions."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    tensor = torch.arange(int(np.prod(sizes, dtype=np.int64))).reshape(sizes)
    tensor = tensor.to(draw(st.sampled_from(DTYPES)))
    tensor = tensor.permute(draw(st.permutations(range(len(sizes)))))
    for dim in range(tensor.dim()):
        start = draw(st.integers(0, tensor.shape[dim]))
        step = draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * dim + (slice(start, None, step),)]
    if draw(st.booleans()):
        position = draw(st.integers(0, tensor.dim()))
        tensor = tensor.unsqueeze(position)
        sizes = list(tensor.shape)
        sizes[position] = draw(st.integers(0, 3))
        tensor = tensor.expand(sizes)
    return tensor


@given(tensor=views())
def test_any_view_arrives_as_it_was(tensor: Tensor) -> None:
    """Whatever indexing made of it."""
    assert_same(WireTensor.pack(tensor).unpack(), tensor)


@given(tensor=views())
def test_what_arrives_is_nobody_elses_memory(tensor: Tensor) -> None:
    """Writing to the copy changes neither the packed bytes nor the original."""
    packed = WireTensor.pack(tensor)
    before, sent = packed.data.tobytes(), bits(tensor)
    copy = packed.unpack()
    if copy.numel():
        assert copy.untyped_storage().data_ptr() != packed.data.ctypes.data
        copy.flatten()[:1].fill_(1)
        copy.as_strided((1,), (1,)).fill_(0)
        copy.as_strided((1,), (1,)).fill_(1)
    assert packed.data.tobytes() == before
    assert bits(tensor) == sent


def test_bytes_that_may_only_be_read_can_be_unpacked() -> None:
    """Ray hands out read-only arrays; the tensor made of them can be written."""
    packed = WireTensor.pack(BASE)
    data = packed.data.copy()
    data.flags.writeable = False
    copy = WireTensor(data, packed.dtype, packed.shape, packed.strides).unpack()
    copy += 1
    assert_same(copy - 1, BASE)


def test_a_dense_tensor_is_packed_without_a_copy() -> None:
    """The bytes are the tensor's own, whatever the order of its dimensions."""
    for name in ("contiguous", "transposed", "channels last"):
        tensor = LAYOUTS[name]
        assert WireTensor.pack(tensor).data.ctypes.data == tensor.data_ptr()


def test_the_checksum_sees_values_dtype_shape_and_strides() -> None:
    """Two tensors that a kernel could tell apart have different checksums."""
    zeros = torch.zeros(2, 2)
    bent = zeros.clone()
    bent[1, 1] = 1e-45
    different = [
        zeros,
        bent,
        zeros.t(),
        torch.zeros(4),
        torch.zeros(4, 1),
        torch.zeros(2, 2, dtype=torch.int32),
    ]
    sums = [checksum(WireTensor.pack(tensor)) for tensor in different]
    assert len(set(sums)) == len(different)
    assert checksum(WireTensor.pack(zeros.clone())) == sums[0]


def test_a_contiguous_copy_would_be_seen() -> None:
    """The comparison of these tests does not overlook lost strides."""
    with pytest.raises(AssertionError):
        assert_same(BASE.transpose(1, 3).contiguous(), BASE.transpose(1, 3))
    with pytest.raises(AssertionError):
        assert_same(torch.tensor([-0.0]), torch.tensor([0.0]))


# --- states ---------------------------------------------------------------------------

STATE: dict[str, Any] = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "n": np.array(3, np.int64),
}


def test_a_digest_sees_everything_but_the_order_of_names() -> None:
    """Names, dtypes, shapes and every bit count; layout in memory does not."""
    digest = state_digest(STATE)
    assert state_digest(dict(reversed(STATE.items()))) == digest
    fortran = {**STATE, "w": np.asfortranarray(STATE["w"])}
    assert state_digest(fortran) == digest
    bent = STATE["w"].copy()
    bent[1, 2] = np.nextafter(bent[1, 2], np.float32(9))
    others = [
        {**STATE, "w": bent},
        {**STATE, "w": STATE["w"].reshape(3, 2)},
        {**STATE, "w": STATE["w"].view(np.int32)},
        {**STATE, "n": np.array([3], np.int64)},
        {**STATE, "m": STATE["n"]},
        {"w": STATE["w"]},
        {"v": STATE["w"], "n": STATE["n"]},
    ]
    assert len({digest, *map(state_digest, others)}) == len(others) + 1


@pytest.mark.parametrize(
    "view", [lambda x: x[1:], lambda x: x[:, 1:], lambda x: x[:, -1], lambda x: x]
)
def test_a_tensor_arrives_with_the_alignment_that_kernels_look_at(view):
    sent = view(torch.randn(5, 7, 3))
    arrived = WireTensor.pack(sent).unpack()
    assert arrived.data_ptr() % 64 == sent.data_ptr() % 64
    assert arrived.stride() == sent.stride()
    assert bits(arrived) == bits(sent)
