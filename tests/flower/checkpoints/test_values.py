"""Values and objects come back as they were; what cannot be kept is named."""

import json
from collections import Counter, OrderedDict
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common import Parameters

from flwr_smartsplit.flower.checkpoints.values import (
    NotKept,
    from_tree,
    object_tree,
    set_object,
    to_tree,
)
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.plan.selection.history import NO_HISTORY, Observation
from flwr_smartsplit.types import Failure, Status, StepReport, Work

VALUES: list[Any] = [
    *(None, True, 3, 2**70, 0.1, float("inf"), -0.0, "ü\0", b"\0\xff", b""),
    *([], [1, (2, "x")], {1: "a", (2, 3): {"b": None}}, {4, 5}, frozenset({"x"})),
    *(OrderedDict(b=1, a=2), Counter("aab"), {"array": 1}, {"a.b": 1, "a": {"b": 2}}),
    *(np.float64(0.1), np.float32(0.1), np.int8(-3), np.bool_(True)),
    *(MetricRecord({"x": 1.5, "n": [1, 2]}), ConfigRecord({"b": b"x", "s": "y"})),
    NO_HISTORY.after(
        [
            Observation(
                client_key="c",
                round_number=1,
                num_examples=9,
                loss_rms=0.1,
                step_seconds=2.0,
                work=Work(device_flops=3, boundary_bytes=8),
            )
        ]
    ),
    Failure(
        client_key="c",
        kind="lost",
        cause="x",
        report=StepReport(status=Status.NOT_HELD, metrics={"a": float("-inf")}),
    ),
    Parameters([b"ab", b""], "numpy.ndarray"),
]
DTYPES = "?bhiqBHIQefdFDgG"


def there_and_back(value: Any) -> Any:
    """Write it as JSON, and read it."""
    arrays: dict[str, Any] = {}
    tree = json.loads(json.dumps(to_tree(value, arrays, "x")))
    assert len(set(arrays)) == len(arrays)
    for array in arrays.values():
        array.flags.writeable = False  # As an array of a file may be
    return from_tree(tree, arrays)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_values_come_back(value: Any) -> None:
    """With their types."""
    found = there_and_back(value)
    assert type(found) is type(value)
    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 4)])
def test_arrays_come_back(dtype: str, shape: tuple[int, ...]) -> None:
    """Of every dtype, shape and layout."""
    array = np.asfortranarray(np.ones(shape, dtype))
    both = [array, array.astype(array.dtype.newbyteorder(">"))]
    record = there_and_back({"plain": both, "record": to_array_record({"x": array})})
    for found, wanted in zip(record["plain"], both, strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes()
        assert found.flags.writeable
    assert isinstance(record["record"], ArrayRecord)
    assert record["record"]["x"].numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_tensors_come_back(dtype: torch.dtype) -> None:
    """Those that NumPy has no dtype for, too."""
    tensor = torch.arange(6).reshape(2, 3).t().to(dtype)
    for value in (tensor, tensor[0, 0], tensor[:0]):
        found = there_and_back(value)
        assert found.dtype is dtype
        assert torch.equal(found, value)


class Step:
    """A server step with all kinds of state, and things that are none."""

    def __init__(self) -> None:
        self.python = Random(1)
        self.numpy = np.random.default_rng(2)
        self.torch = torch.Generator().manual_seed(3)
        self.weight = torch.zeros(2, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weight])
        self.seen: dict[str, Any] = {}
        self.helper = partial(print, 1)
        self.kind = int
        self.lock = object()
        self.meter = Meter()

    def move(self) -> list[Any]:
        """Change everything, and say to what."""
        self.weight.grad = torch.ones(2) * self.python.random()
        self.optimizer.step()
        self.seen["x"] = self.numpy.normal(size=2)
        drawn = torch.rand(2, generator=self.torch).tolist()
        return [drawn, *self.seen["x"], self.optimizer.state_dict()]


class Meter:
    """A function with a state that nobody can see."""

    count = 0

    def __init__(self) -> None:
        self.hidden = {}.keys()

    def __call__(self) -> None:
        """Do nothing."""


def test_objects_go_on_where_they_were() -> None:
    """Generators, optimizers, plain attributes; what is left out is named."""
    one, other = Step(), Step()
    one.move()
    arrays: dict[str, Any] = {}
    tree, left_out = object_tree(one, arrays, "step")
    assert left_out == ["step.lock (object)", "step.meter (Meter)"]
    set_object(other, json.loads(json.dumps(tree)), arrays)
    assert repr(other.seen) == repr(one.seen)
    assert repr(one.move()) == repr(other.move())
    bound, _ = object_tree(one.move, {}, "step")
    assert bound["attributes"].keys() == tree["attributes"].keys()


def test_an_object_may_say_itself_what_it_holds() -> None:
    """As torch's do."""

    class Counting:
        def __init__(self) -> None:
            self.hidden = object()
            self.count = 0

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    one, other = Counting(), Counting()
    one.count = 4
    tree, left_out = object_tree(one, {}, "step")
    set_object(other, tree, {})
    assert (other.count, left_out) == (4, [])


@pytest.mark.parametrize("value", [object(), [object()], np.array([None])])
def test_what_cannot_be_kept_is_named(value: Any) -> None:
    """With its path."""
    with pytest.raises(NotKept, match=r"^x.* a checkpoint cannot hold"):
        to_tree(value, {}, "x")
