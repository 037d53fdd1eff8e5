"""The byte form: every message comes back the same, and nothing else comes back."""

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from typing_extensions import TypeAliasType

import flwr_smartsplit.edge
from flwr_smartsplit.edge import message_bytes
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.gate.gate import STRANGERS_BYTES
from flwr_smartsplit.edge.hosts.edge import BytesTransport, answered
from flwr_smartsplit.edge.message_bytes import MESSAGE_TYPES, decode, encode
from flwr_smartsplit.edge.tensors import Coded, WireTensor
from flwr_smartsplit.errors import (
    EdgeError,
    EdgeFull,
    MemoryCapExceeded,
    OutOfOrderStep,
    RefusedMessage,
    TailLost,
)
from flwr_smartsplit.types import (
    ChannelGroup,
    Cohort,
    Integer,
    TopK,
    Variant,
    width_of,
)

PREFIX = message_bytes._PREFIX
NAMES = sorted(MESSAGE_TYPES)
NUMBERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=True)
ARRAYS = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_, np.float16]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


def tensor(array: np.ndarray) -> WireTensor:
    """Pack an array, transposed, so that its strides say something."""
    return WireTensor.pack(torch.from_numpy(np.ascontiguousarray(array)).mT)


TENSORS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=3, min_side=0, max_side=3)
).map(tensor)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | FLOATS | st.text() | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | NUMBERS, inner, max_size=3)
    ),
    max_leaves=6,
)


CODED = st.builds(
    Coded,
    data=hnp.arrays(np.uint8, st.integers(0, 23)),
    dtype=st.sampled_from(["float32", "float64"]),
    shape=st.just((2, 3)),
    strides=st.sampled_from([(3, 1), (1, 2)]),
    offset=st.integers(0, 63),
    blocks=st.booleans(),
)
KEPT = st.sets(st.integers(0, 2**40), min_size=1, max_size=4).map(sorted).map(tuple)
OURS: Mapping[Any, st.SearchStrategy[Any]] = {
    Variant: st.builds(
        Variant,
        st.text(max_size=9),
        st.dictionaries(st.text(max_size=9), KEPT, max_size=3),
        st.booleans(),
    ),
    WireTensor: TENSORS,
    Coded: CODED,
    Cohort: st.just(
        Cohort(median_step_seconds=1.5, median_importance=0.5, low_importance=0.25)
    ),
    Integer: st.builds(
        Integer, st.sampled_from([4, 8]), st.sampled_from([None, 4, 8, 16])
    ),
    TopK: st.builds(
        TopK,
        st.floats(0, 1, exclude_min=True),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["float32", "float16"]),
    ),
}


def forward(**parts: Any) -> wire.Forward:
    """Make a request whose targets are as many as it says."""
    if isinstance(parts["targets"], WireTensor):
        parts["num_examples"] = parts["targets"].shape[0]
    return wire.Forward(**parts)


@cache  # A route of several edges has openings in openings.
def values(hint: Any) -> st.SearchStrategy[Any]:  # noqa: PLR0911 - a list of cases
    """Draw what an annotation allows."""
    origin, args = get_origin(hint), get_args(hint)
    simple = {int: NUMBERS, float: FLOATS, str: st.text(max_size=9)}
    if hint is Any:
        return PLAIN | ARRAYS | TENSORS
    if hint in OURS:
        return OURS[hint]
    if hint in simple:
        return simple[hint]
    if origin in (Union, UnionType):
        return st.one_of(*map(values, args))
    if origin is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin in (Mapping, dict):
        return st.dictionaries(*map(values, args), max_size=3)
    if scalar := message_bytes.scalar_type(hint):
        return ARRAYS if scalar is Any else ARRAYS.map(lambda a: a.astype(scalar))
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        parts = {
            f.name: st.deferred(lambda h=hints[f.name]: values(h)) for f in fields(hint)
        }
        return st.builds(forward if hint is wire.Forward else hint, **parts)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    return st.from_type(hint)


def assert_same(one: Any, other: Any) -> None:
    """Compare types and every bit."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_same(list(one.values()), list(other.values()))
    elif is_dataclass(one):
        for part in fields(one):
            assert_same(getattr(one, part.name), getattr(other, part.name))
    elif isinstance(one, Exception):
        assert str(one) == str(other)
        assert_same(vars(one), vars(other))
    else:
        assert repr(one) == repr(other)


def joined(message: Any) -> bytes:
    """Write a message in one piece."""
    return b"".join(encode(message))


# --- there and back -------------------------------------------------------------------


@pytest.mark.every(4)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(data=st.data())
def test_every_message_comes_back_the_same(name: str, data: st.DataObject) -> None:
    """In one piece or several, and its bytes are always the same."""
    message = data.draw(values(MESSAGE_TYPES[name]))
    sent = joined(message)
    assert_same(decode(sent), message)
    assert_same(decode(*encode(message)), message)
    assert joined(decode(sent)) == sent


@given(
    message=st.none() | PLAIN | st.lists(values(MESSAGE_TYPES["Receipt"])).map(tuple)
)
def test_replies_without_a_type_of_their_own_come_back(message: Any) -> None:
    """As the receipts of a seal, and nothing for a release."""
    assert_same(decode(joined(message)), message)


ERRORS = [
    OutOfOrderStep("a", step=3, num_steps=2),
    TailLost("b", sessions=("1/c0/edge",)),
    EdgeFull(
        "c", needed_bytes=3, free_bytes=2, budget_bytes=9, retry_after_seconds=None
    ),
    MemoryCapExceeded(
        "d",
        client="c0",
        operator="mm",
        phase="forward",
        live_bytes=3,
        budget_bytes=2,
        bytes_by_kind={"weights": 3},
    ),
    RuntimeError("e"),
    TypeError("f"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_comes_back_with_its_numbers(error: Exception) -> None:
    """As a reply, with its own type."""
    assert_same(decode(joined(error)), error)


def test_an_error_that_the_other_end_does_not_know_is_its_nearest_base() -> None:
    """Its name is in the text."""

    class Odd(OSError):
        pass

    class Lost(TailLost):
        pass

    class Strange(Exception):
        pass

    found = decode(joined(Odd("disk")))
    assert (type(found), str(found)) == (OSError, "Odd: disk")
    found = decode(joined(Lost("gone", sessions=("a",), by=print)))
    assert type(found) is TailLost
    assert (found.sessions, found.by) == (("a",), repr(print))
    half = [np.ones(3), print]
    found = decode(joined(Lost("gone", sessions=("a",), by=half)))
    assert found.by == repr(half)
    found = decode(joined(Strange("why")))
    assert (type(found), str(found)) == (EdgeError, "Strange: why")


def test_arrays_are_views_of_what_came() -> None:
    """No byte of them is copied until somebody unpacks them, there or here."""
    array = np.arange(1000, dtype=np.float32)
    request = wire.HoldState("d", {"w": array})
    pieces = encode(request)
    assert any(np.shares_memory(array, np.frombuffer(p, np.uint8)) for p in pieces)
    data = joined(request)
    found = decode(data).state["w"]
    assert np.shares_memory(found, np.frombuffer(data, np.uint8))


def test_the_bytes_are_these() -> None:
    """Whoever writes another host, in another language, finds them here."""
    head = b'{"HoldState":{"access":"","digest":"ab","state":{"map":[["w",'
    head += b'{"array":["<f4",[2]]}]]},"rest":"","variant":{"Variant":{'
    head += b'"name":"whole","kept":{"map":[]},"is_scaled":false}}}}'
    head += b" " * (-(16 + len(head)) % 16)
    start = b"SmSp" + b"".join(
        number.to_bytes(4, "little") for number in (1, len(head), crc32(head))
    )
    body = np.array([1, 2], "<f4").tobytes() + bytes(8)
    state = {"w": np.array([1, 2], np.float32)}
    assert joined(wire.HoldState("ab", state)) == start + head + body


# --- what is refused ------------------------------------------------------------------

STEP = joined(
    (wire.HoldState("ab", {"w": np.ones(3, np.float32)}), tensor(np.ones((2, 3))))
)
HEAD_END = PREFIX.size + PREFIX.unpack_from(STEP)[2]


def framed(tree: Any, body: bytes = b"") -> bytes:
    """Put a right prefix before any head."""
    head = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    head += b" " * (-(PREFIX.size + len(head)) % 16)
    return PREFIX.pack(b"SmSp", 1, len(head), crc32(head)) + head + body


def test_whatever_is_cut_short_is_refused() -> None:
    """At every byte."""
    for end in range(len(STEP)):
        with pytest.raises(RefusedMessage):
            decode(STEP[:end])


def accepted_flips() -> Iterator[int]:
    """Flip every bit of prefix and head, and say which flips were not refused."""
    for bit in range(8 * HEAD_END):
        bent = bytearray(STEP)
        bent[bit // 8] ^= 1 << bit % 8
        try:
            decode(bytes(bent))
            yield bit
        except RefusedMessage as error:
            assert str(error)


def test_whatever_changed_on_the_way_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every bit of prefix and head counts; without its checksum, some would not."""
    assert list(accepted_flips()) == []
    monkeypatch.setattr(message_bytes, "crc32", lambda _: PREFIX.unpack_from(STEP)[3])
    assert list(accepted_flips()) != []


@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    """Noise is no message, and no exception of another kind."""
    with pytest.raises(RefusedMessage):
        decode(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["map", "tuple", "array", "bytes", "float", "error", *NAMES]
            ),
            inner,
            max_size=2,
        )
    ),
    max_leaves=5,
)


@given(data=st.data(), name=st.sampled_from(NAMES))
def test_a_forged_head_gives_a_message_or_is_refused(
    data: st.DataObject, name: str
) -> None:
    """Replace any part of a real head; the decoder never fails in another way."""
    sent = joined(data.draw(values(MESSAGE_TYPES[name])))
    size = PREFIX.unpack_from(sent)[2]
    tree = json.loads(sent[PREFIX.size :][:size])
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(tree)
    node, key = data.draw(st.sampled_from(spots))
    node[key] = data.draw(JSON)
    try:
        decode(framed(tree, sent[PREFIX.size + size :]))
    except RefusedMessage as error:
        assert str(error)


def variant_with(runs: Any) -> dict[str, Any]:
    """Write a variant as a stranger may."""
    return {"name": "v", "kept": {"map": [["a", runs]]}, "is_scaled": False}


HELD = {"incarnation": "a", "is_held": True}
FORGED: dict[str, tuple[bytes, str]] = {
    "another magic word": (b"PK\3\4" + STEP[4:], "begins with b'SmSp'"),
    "another version": (
        STEP[:4] + (7).to_bytes(4, "little") + STEP[8:],
        "has version 7, this side reads 1: use one release",
    ),
    "a head larger than all": (
        PREFIX.pack(b"SmSp", 1, 2**31, 0),
        "a head of 2147483648 bytes; 16777216 are allowed",
    ),
    "no JSON": (framed(b"{"), "not JSON"),
    "JSON's NaN": (framed(b"NaN"), "not JSON"),
    "letters that are not ASCII": (framed("ä".encode()), "not JSON"),
    "brackets without an end": (framed(b"[" * 100_000), "too deep"),
    "digits without an end": (framed(b"9" * 10_000), "not JSON"),
    "a large integer": (framed(2**64), "more than 64 bits"),
    "deep lists": (framed(b"[" * 5000 + b"]" * 5000), "too deep"),
    "two keys": (framed({"Held": HELD, "tuple": []}), "one key, not 2"),
    "a name that is none": (framed({"Popen": {}}), "'Popen' with a dict"),
    "an unknown field": (
        framed({"Held": {**HELD, "x": 1}}),
        r"unknown: \['x'\], missing: \[\]",
    ),
    "a missing field": (
        framed({"Held": {"incarnation": "a"}}),
        r"missing: \['is_held'\]",
    ),
    "a number for a truth value": (
        framed({"Held": {**HELD, "is_held": 1}}),
        "Held.is_held is a int, and not <class 'bool'>",
    ),
    "a message in the place of another": (
        framed({"Onward": {"address": "a", "opening": {"Held": HELD}}}),
        "Onward.opening is a Held",
    ),
    "an array of objects": (framed({"array": ["|O", [1]]}, bytes(16)), r"not of '\|O'"),
    "a negative size": (framed({"array": ["<f4", [-1]]}), r"\[-1\] is no shape"),
    "more values than there are bytes": (
        framed({"array": ["<f4", [2**40]]}, bytes(16)),
        "4398046511104 bytes should follow, and 16 do",
    ),
    "more dimensions than arrays have": (
        framed({"array": ["<f4", [1] * 33]}, bytes(16)),
        "is no shape",
    ),
    "an empty array of endless shape": (
        framed({"array": ["<f4", [0, 2**40, 2**40]]}),
        "is no shape",
    ),
    "bytes after the end": (framed(None, bytes(16)), "16 bytes follow the end"),
    "bytes between arrays": (
        framed({"array": ["<f4", [1]]}, bytes(8) + b"\1" * 8),
        "not 0",
    ),
    "a key twice": (framed({"map": [["a", 1], ["a", 2]]}), "'a' is no key, or comes"),
    "a key that is a list": (framed({"map": [[[], 1]]}), "no key"),
    "an error that may not travel": (
        framed({"error": ["SystemExit", "x", {}]}),
        "'SystemExit' is no error",
    ),
    "an error without its numbers": (
        framed({"error": ["TailLost", "x", {}]}),
        "TailLost.sessions is a NoneType",
    ),
    "runs that overlap": (
        framed({"Variant": variant_with([0, 4, 2, 6])}),
        "Variant: the runs of 'a'",
    ),
    "runs without an end": (
        framed({"Variant": variant_with([0, 2**62])}),
        "Variant: 4611686018427387904 channels, of 1048576 allowed",
    ),
    "channels by themselves": (
        framed({"Variant": variant_with({"tuple": [0, 1, 2]})}),
        "Variant: the runs of 'a'",
    ),
    "a variant without runs": (
        framed({"Variant": {"name": "v"}}),
        "Variant: .* not a variant's values",
    ),
    "numbers that mean nothing": (
        framed(
            {
                "Cohort": {
                    "median_step_seconds": -1.0,
                    "median_importance": 1.0,
                    "low_importance": 0.5,
                }
            }
        ),
        "Cohort: median_step_seconds is -1.0",
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_what_is_refused_is_said(kind: str) -> None:
    """What it is, and against what."""
    data, text = FORGED[kind]
    with pytest.raises(RefusedMessage, match=text):
        decode(data)


Scalar = TypeVar("Scalar", bound=np.generic)
OLD_ALIAS = np.ndarray[Any, np.dtype[Scalar]]
NEW_ALIAS = TypeAliasType("NDArray", OLD_ALIAS, type_params=(Scalar,))


@pytest.mark.parametrize("alias", [OLD_ALIAS, NEW_ALIAS])
def test_arrays_are_those_of_any_numpy(
    monkeypatch: pytest.MonkeyPatch, alias: Any
) -> None:
    """NumPy 2.5 made NDArray an alias that is not np.ndarray to typing."""
    monkeypatch.setattr(message_bytes.npt, "NDArray", alias)
    array = np.zeros(2)
    assert message_bytes.fitted(array, alias[Any], "x") is array
    assert message_bytes.fitted(array, alias[np.float64], "x") is array
    with pytest.raises(RefusedMessage, match="x is a ndarray, and not"):
        message_bytes.fitted(array, alias[np.uint8], "x")
    with pytest.raises(RefusedMessage, match="x is a ndarray, and not"):
        message_bytes.fitted(array, list[float], "x")


def test_the_number_of_values_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a head of some megabytes would be many more in Python."""
    monkeypatch.setattr(message_bytes, "MAX_VALUES", 9)
    assert decode(framed([1] * 9)) == [1] * 9
    with pytest.raises(RefusedMessage, match="more than 9 values"):
        decode(framed([1] * 10))
    monkeypatch.setattr(message_bytes, "MAX_HEAD_BYTES", 99)
    with pytest.raises(RefusedMessage, match=r"head of a list takes .* 99 allowed"):
        encode(["x" * 99])


def wire_tensor(*shape: int, strides: tuple[int, ...], size: int) -> dict[str, Any]:
    """Write the head of a tensor that says anything."""
    return {
        "WireTensor": {
            "data": {"array": ["|u1", [size]]},
            "dtype": "float32",
            "shape": {"tuple": list(shape)},
            "strides": {"tuple": list(strides)},
        }
    }


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (wire_tensor(60_000, 9, strides=(9, 1), size=16), "has 2160000 bytes, not"),
        (wire_tensor(4, strides=(1, 1), size=16), "give as many numbers in both"),
        (wire_tensor(4, strides=(-1,), size=16), "from 0 to"),
        (wire_tensor(4, strides=(2**30,), size=16), "over more than 16384 times"),
    ],
)
def test_a_tensor_is_as_large_as_its_bytes(head: dict[str, Any], text: str) -> None:
    """Two bytes that say 60,000 examples stay two bytes."""
    with pytest.raises(RefusedMessage, match=f"WireTensor: .*{text}"):
        decode(framed(head, bytes(16)))
    assert decode(framed(wire_tensor(2, 2, strides=(1, 2), size=16), bytes(16)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({1, 2}, "a set cannot be sent"),
        (np.array([object()]), "an array of object cannot be sent"),
        (torch.ones(2), "a Tensor cannot be sent"),
    ],
)
def test_a_value_without_a_byte_form_is_refused_before_it_is_sent(
    value: Any, text: str
) -> None:
    """And so is a container in itself."""
    with pytest.raises(RefusedMessage, match=text):
        encode({"a": [value]})
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(RefusedMessage, match="too deep"):
        encode(endless)


# --- no code on the wire --------------------------------------------------------------


class Bomb:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Leave a mark."""
        return exec, ("import builtins; builtins.exploded = True",)


def test_nothing_is_unpickled() -> None:
    """What would run code is neither sent nor read; no file of the edge can."""
    with pytest.raises(RefusedMessage, match="a Bomb cannot be sent"):
        encode({"config": Bomb()})
    with pytest.raises(RefusedMessage):
        decode(pickle.dumps(Bomb()))
    folder = Path(flwr_smartsplit.edge.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    assert len(sources) > 9
    assert not any(re.search(r"\bpickle\.|import pickle", text) for text in sources)


def test_a_reply_of_another_type_is_refused() -> None:
    """An edge is not trusted, either."""

    def send(reply: Any) -> Any:
        transport = BytesTransport(lambda sent: answered(lambda _: reply, *sent))
        return transport.send(wire.IsHeld("a"))

    assert send(wire.Held("a", True)) == wire.Held("a", True)
    with pytest.raises(RefusedMessage, match="the reply to IsHeld is a Opened"):
        send(wire.Opened("a"))


def test_an_edge_answers_what_it_cannot_read(caplog: pytest.LogCaptureFixture) -> None:
    """With an error of its own, as any that its service raises."""

    def service(request: Any) -> Any:
        raise RuntimeError(f"no {request}")

    reply = decode(*answered(service, b"noise"))
    assert isinstance(reply, RefusedMessage)
    assert caplog.text == ""
    reply = decode(*answered(service, *encode(wire.IsHeld("a"))))
    assert isinstance(reply, RuntimeError)
    assert "in service" in caplog.text


def test_an_opening_of_a_large_narrow_model_is_small() -> None:
    """As many channels as EfficientNetV2-L has, in as many groups, at half width.

    An edge reads 256 KiB of a stranger; each channel by its number would take more.
    """
    groups = [
        ChannelGroup(name=f"features.{index}.weight", size=912, axes=())
        for index in range(137)
    ]
    variant = width_of(groups, 0.5, shift=500)
    opened = wire.OpenSession(
        session="s",
        place="edge",
        round_number=1,
        client_key="c",
        start=1,
        stop=2,
        state_digest="d",
        seed=0,
        num_threads=1,
        variant=variant,
    )
    assert len(joined(opened)) < STRANGERS_BYTES // 16
    assert len(json.dumps(list(variant.kept.values()))) > STRANGERS_BYTES
    assert decode(joined(opened)) == opened
