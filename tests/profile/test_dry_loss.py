"""A dry run with a user's tensors and values: counted once, changed never."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit import Route, Task, predicted_peak_bytes, profile_chain
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.profile import fake_step
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.fake_tensors import DryRun, StandIns, fake_targets
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.tasks import NUM_CLASSES, TASK

TABLE = torch.arange(12.0).view(4, 3)


def seen_bytes(*tensors: Tensor) -> int:
    """Count what stand-ins of tensors take."""
    mode, meter = DryRun(), MemoryMeter()
    stand_ins = StandIns(mode)
    with mode:
        fake = torch.ones(3)
    with mode, meter, stand_ins:
        for tensor in tensors:
            fake * tensor
    return meter.live_bytes - fake.nbytes


def test_a_stand_in_takes_what_its_tensor_keeps_alive() -> None:
    """A view keeps its whole table; two views of it keep it once."""
    assert seen_bytes(torch.ones(3)) == 12
    assert seen_bytes(TABLE[1]) == TABLE.nbytes
    assert seen_bytes(TABLE[1], TABLE[2]) == TABLE.nbytes
    assert seen_bytes(TABLE[1], torch.ones(3)) == TABLE.nbytes + 12


def test_a_single_number_keeps_its_value() -> None:
    mode = DryRun()
    rate = torch.tensor(0.25)
    with mode, StandIns(mode):
        assert (-rate * 2).item() == -0.5
        rate_after = rate.mul_(3)
    assert rate == 0.25  # A dry run changes nothing real.
    assert rate_after is not None


def looks(outputs: Tensor, targets: Tensor) -> Tensor:
    """Leave out some by value."""
    kept = targets > 0
    return functional.cross_entropy(outputs[kept], targets[kept])


def task(loss_fn: Any, **changes: Any) -> Task:
    """Make the tiny task with another loss."""
    return replace(
        TASK, loss_fn=loss_fn, example_targets=torch.arange(NUM_CLASSES), **changes
    )


def test_a_loss_that_looks_at_values_is_priced_for_those_of_the_example() -> None:
    """More examples that count take more memory, wherever the loss runs."""
    few = task(looks, example_inputs=torch.zeros(3, 1, 6, 6))
    many = replace(few, example_targets=torch.ones(3, dtype=torch.int64))
    peaks = []
    for each in (few, many):
        chain = build_chain(each)
        profile = profile_chain(chain, batch_size=600, task=each)
        peaks.append(profile.loss.forward_peak_bytes)
    assert peaks[0] < peaks[1]


def test_gradients_of_a_real_loss_arrive_as_they_would() -> None:
    """Unused outputs have none, and integers need none."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU())
            self.used, self.unused = nn.Linear(8, 3), nn.Linear(8, 5)

        def forward(self, inputs: Tensor) -> Any:
            features = self.body(inputs)
            scores = self.used(features)
            return {
                "scores": scores,
                "unused": self.unused(features),
                "classes": scores.argmax(1),
            }

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return looks(outputs["scores"], targets)

    each = task(loss, model_fn=Several, metrics_fn=None)
    chain = build_chain(each)
    profile = profile_chain(chain, batch_size=4, task=each)
    with RouteChecker(each, example_batches(each, batch_size=4)) as checker:
        check = checker.check(Route.whole())
    assert check.differences == ()
    predicted = predicted_peak_bytes(profile, Route.whole())
    assert check.measured_peak_bytes == predicted


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda outputs, targets: 1 / 0,
        lambda outputs, targets: looks(outputs, targets.float()),
        partial(functional.nll_loss, reduction="none"),
    ],
    ids=["raises", "wrong dtype", "no number"],
)
def test_a_loss_that_cannot_run_is_refused(loss_fn: Any) -> None:
    each = task(loss_fn)
    with pytest.raises(InvalidTask, match="a dry run of Sequential"):
        profile_chain(build_chain(each), batch_size=4, task=each)


def test_a_tensor_that_is_not_counted_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: a log that takes what the loss keeps for nothing."""
    each = task(partial(functional.cross_entropy, weight=torch.ones(3)))
    chain, route = build_chain(each), Route.u_shape(2, 7)
    with RouteChecker(each, example_batches(each, batch_size=4)) as checker:
        measured = checker.check(route).measured_peak_bytes
    profile = profile_chain(chain, batch_size=4, task=each)
    assert predicted_peak_bytes(profile, route) == measured
    monkeypatch.setattr(fake_step, "_kept_bytes", lambda _: 0)
    wrong = profile_chain(chain, batch_size=4, task=each)
    assert predicted_peak_bytes(wrong, route) == measured - 12


def test_targets_grow_with_the_batch() -> None:
    """Those of unequal length by the number of examples; numbers do not."""
    mode, inputs = DryRun(), torch.zeros(2, 5)
    targets = {
        "labels": torch.zeros(6),
        "lengths": torch.zeros(2, 3),
        "scale": torch.tensor(1.0),
        "none": None,
    }
    found = fake_targets(targets, inputs, mode, batch_size=8)
    shapes = {key: None if x is None else tuple(x.shape) for key, x in found.items()}
    assert shapes == {"labels": (24,), "lengths": (8, 3), "scale": (), "none": None}
    (alone,) = fake_targets((torch.zeros(6, 2),), inputs, mode, batch_size=8)
    assert alone.shape == (8, 2)
