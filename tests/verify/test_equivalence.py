"""The checker finds nothing where nothing is wrong, and every error that is planted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit.device import route_runner as runner
from flwr_smartsplit.edge import session_table as edge
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.split.segment import Unit
from flwr_smartsplit.task import Task
from flwr_smartsplit.train import rng as randomness
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify import equivalence as checking
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.models import (
    OPTIMIZERS,
    SMALL_CNN_UNITS,
    channels_last_cnn,
    small_cnn,
    task_of,
)

SPLIT = Route.split(7)
"""Dropout before it and after it, batch statistics on both sides."""


def small_task(model_fn: Callable[[], nn.Module] = small_cnn) -> Task:
    task = task_of(model_fn, optimizer=OPTIMIZERS["momentum"])
    return replace(task, example_targets=torch.arange(10))


def differences(task: Task, route: Route = SPLIT) -> list[str]:
    """Check one route of a task."""
    with RouteChecker(task, example_batches(task, batch_size=4)) as checker:
        return list(checker.check(route).differences)


def kinds(found: list[str]) -> set[str]:
    """Name what sorts of things differ."""
    return {text.split()[0] for text in found}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_differs_where_nothing_is_wrong(optimizer):
    """Whole and at every cut of a network with chance, statistics and in-place work."""
    task = replace(small_task(), optimizer_fn=OPTIMIZERS[optimizer])
    with RouteChecker(task, example_batches(task, batch_size=4)) as checker:
        cuts = range(1, len(SMALL_CNN_UNITS))
        for route in (Route.whole(), *map(Route.split, cuts)):
            found = checker.check(route)
            assert found.differences == ()
            assert found.measured_peak_bytes > 0


# --- planted errors -------------------------------------------------------------------


def spoil(monkeypatch: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Change everything that comes off the wire."""
    unpack = WireTensor.unpack

    def unpack_and_change(self: WireTensor, *device: Any) -> Tensor:
        return change(unpack(self, *device))

    monkeypatch.setattr(WireTensor, "unpack", unpack_and_change)


def bend(values: Tensor) -> Tensor:
    return values + 1e-4 if values.is_floating_point() else values


def test_a_bent_boundary_is_found(monkeypatch):
    """Values off by 1e-4 change gradients, state and losses."""
    spoil(monkeypatch, bend)
    assert kinds(differences(small_task())) == {
        "gradient",
        "state",
        "loss",
        "evaluation",
    }


def test_lost_strides_are_found(monkeypatch):
    """A boundary in another layout is summed in another order."""
    spoil(monkeypatch, Tensor.contiguous)
    assert differences(small_task(channels_last_cnn))
    assert differences(small_task()) == []  # It was row by row already.


def test_a_wrong_stream_is_found(monkeypatch):
    """Dropout that is drawn from another stream changes everything but evaluation."""
    derived = randomness.derived_seed
    monkeypatch.setattr(randomness, "derived_seed", lambda *parts: derived(*parts, "x"))
    found = differences(small_task())
    assert {"gradient", "loss"} <= kinds(found)
    assert "evaluation" not in kinds(found)


def test_a_step_that_is_left_out_is_found(monkeypatch):
    """A tail that is not updated ends with the state it began with."""
    finish = SegmentRunner.finish

    def without_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer, self.optimizer = self.optimizer, None
        result = finish(self, *args, **kwargs)
        self.optimizer = optimizer
        return result

    monkeypatch.setattr(SegmentRunner, "finish", without_update)
    found = differences(small_task())
    assert "state classify.weight" in found


def test_a_tail_that_is_sealed_wrong_is_found_by_name(monkeypatch):
    """The tail's digest differs, and the checker looks which tensor it is."""
    state_views = edge.state_views

    def spoilt(module: nn.Module) -> Any:
        state = state_views(module)
        state["classify.bias"][3] = np.nextafter(state["classify.bias"][3], 1)
        return state

    monkeypatch.setattr(edge, "state_views", spoilt)
    assert differences(small_task()) == ["state classify.bias"]


def test_a_front_that_is_returned_wrong_is_found_by_name(monkeypatch):
    """A changed last bit in the device's part is named."""
    state_views = runner.state_views

    def spoilt(module: nn.Module) -> Any:
        state = state_views(module)
        state["norm1.running_mean"][0] = np.nextafter(state["norm1.running_mean"][0], 1)
        return state

    monkeypatch.setattr(runner, "state_views", spoilt)
    assert differences(small_task()) == ["state norm1.running_mean"]


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))


def forgetful_units(model: nn.Module) -> list[Unit]:
    """List units, but leave an activation in that the model does not have."""
    del model
    return [
        Unit("first", lambda root, x: getattr(root, "0")(x).relu(), ("0",)),
        Unit("last", lambda root, x: getattr(root, "1")(x), ("1",)),
    ]


def test_a_wrong_list_of_units_is_found():
    """The dry run cannot see it; the comparison with the stock model does."""
    task = Task(
        model_fn=two_layers,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=OPTIMIZERS["sgd"],
        example_inputs=torch.zeros(1, 4),
        example_targets=torch.arange(3),
        units_fn=forgetful_units,
    )
    right = replace(task, units_fn=None)
    assert differences(right, Route.split(1)) == []
    for route in (Route.split(1), Route.whole()):
        assert {"gradient", "loss", "state", "evaluation"} <= kinds(
            differences(task, route)
        )


def shifted_units(model: nn.Module) -> list[Unit]:
    """List units that shift all scores in evaluation, which no cross-entropy sees."""
    del model

    def shifted(root: Any, x: Tensor) -> Tensor:
        return root.get_submodule("1")(x) + 7.0

    return [
        Unit("first", lambda root, x: getattr(root, "0")(x), ("0",)),
        Unit("last", lambda root, x: getattr(root, "1")(x), ("1",), shifted),
    ]


def test_outputs_that_the_loss_does_not_tell_apart_are_found():
    """Evaluation compares outputs, not only losses."""
    task = replace(task_of(two_layers, shape=(4,)), units_fn=shifted_units)
    task = replace(task, example_targets=torch.arange(3))
    assert "evaluation outputs" in differences(task, Route.split(1))


class Scaled(nn.Module):
    """A parameter that is a number, sparse gradients, and work on the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, sparse=True)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.last = nn.Linear(4, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.add_(1).remainder_(9)
        return self.last(self.table(tokens) * self.scale)


def test_numbers_sparse_gradients_and_written_inputs_raise_no_false_alarm():
    """What the checker looks at may have any form."""
    task = Task(
        model_fn=Scaled,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=OPTIMIZERS["sgd"],
        example_inputs=torch.arange(9),
        example_targets=torch.arange(9),
    )
    with RouteChecker(task, example_batches(task, batch_size=4)) as checker:
        assert len(checker.chain) > 1
        for route in (Route.whole(), Route.split(1)):
            assert checker.check(route).differences == ()


class Untraced(nn.Module):
    """A buffer that counts calls, which the traced model does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            self.calls += 1
        return self.layer(x)


def test_state_that_only_the_stock_model_changes_is_found():
    """What no unit uses must be left alone by the stock model, too."""
    task = replace(task_of(Untraced, shape=(4,)), example_targets=torch.arange(3))
    assert differences(task, Route.whole()) == ["state calls"]


def test_an_error_in_training_is_a_finding_not_a_crash(monkeypatch):
    """The checker goes on to the next route."""
    task = small_task()
    with RouteChecker(task, example_batches(task, batch_size=4)) as checker:
        with monkeypatch.context() as patch:
            patch.setattr(checking, "train_locally", lambda *_: 1 / 0)
            found = checker.check(Route.split(2))
        assert found.differences == ("ZeroDivisionError: division by zero",)
        assert checker.check(Route.split(2)).differences == ()


# --- batches --------------------------------------------------------------------------


def test_batches_are_like_the_examples():
    """Two of one size and a smaller one; whole numbers come from the examples."""
    task = Task(
        model_fn=two_layers,
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=OPTIMIZERS["sgd"],
        example_inputs={"ids": torch.tensor([[3, 5]]), "x": torch.zeros(1, 2)},
        example_targets=torch.tensor([1, 7]),
    )
    batches = example_batches(task, batch_size=3)
    assert [len(targets) for _, targets in batches] == [3, 3, 2]
    for inputs, targets in batches:
        assert isinstance(inputs, dict)
        assert set(inputs["ids"].flatten().tolist()) <= {3, 5}
        assert inputs["x"].shape == (len(targets), 2)
        assert inputs["x"].std() > 0
        assert set(targets.tolist()) <= {1, 7}
    again = example_batches(task, batch_size=3)
    assert all(
        torch.equal(one[0]["x"], other[0]["x"])
        for one, other in zip(batches, again, strict=True)
    )
    other = example_batches(task, batch_size=3, seed=1)
    assert not torch.equal(batches[0][0]["x"], other[0][0]["x"])
