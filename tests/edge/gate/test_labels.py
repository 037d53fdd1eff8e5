"""LabelCheck: labels are tried on the CPU once for each new thing they index."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit.edge import service as module
from flwr_smartsplit.edge.gate.labels import LabelCheck
from flwr_smartsplit.errors import EdgeError
from flwr_smartsplit.train.segment_runner import SegmentRunner
from tests.edge.gate.federation import Federation
from tests.edge.gate.test_forged_requests import labels
from tests.tasks import TASK

OUTPUTS = torch.randn(4, 3)


class Counting:
    """A loss that counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __deepcopy__(self, memo: Any) -> "Counting":
        return self

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        self.num_calls += 1
        assert outputs.device.type == "cpu"
        return nn.functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize("wrong", [3, 999, -1, -5, 2**40])
def test_a_label_that_the_loss_cannot_take_is_refused(wrong: int) -> None:
    """Also after others have been taken, and every time."""
    check = LabelCheck(TASK)
    check(OUTPUTS, torch.tensor([0, 1, 2, -100]))
    for _ in range(2):
        with pytest.raises(EdgeError, match=f"IndexError: Target {wrong} is out of"):
            check(OUTPUTS, torch.tensor([0, wrong, 2, 1]))


def test_labels_are_tried_once() -> None:
    """Later batches index nothing new; half precision is tried in single."""
    loss = Counting()
    check = LabelCheck(replace(TASK, loss_fn=loss))
    for values in ([0, 2, 1, 1], [0, 0, 0, 0], [2, 2, 1, 0]):
        check(OUTPUTS.half(), torch.tensor(values))
    assert loss.num_calls == 1
    check(OUTPUTS, torch.tensor([0, -100, 1, 1]))
    assert loss.num_calls == 2


def test_what_fails_with_any_labels_is_left_to_the_loss() -> None:
    """It cannot run on the CPU, or its outputs do not fit: that is said by itself."""

    def only_on_a_gpu(outputs: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("not on this device")

    LabelCheck(replace(TASK, loss_fn=only_on_a_gpu))(OUTPUTS, torch.tensor([999] * 4))


def test_targets_that_index_nothing_are_not_tried() -> None:
    """Floats, flags, nested ones and none at all."""
    loss = Counting()
    check = LabelCheck(replace(TASK, loss_fn=loss))
    for targets in (
        torch.ones(4),
        {"is": torch.ones(4) > 0},
        None,
        torch.ones(0).int(),
    ):
        check(OUTPUTS, targets)
    assert loss.num_calls == 0


def test_an_edge_on_an_accelerator_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown on the CPU, which it takes for another device here."""

    def runner(*args: Any, device: Any, **kinds: Any) -> SegmentRunner:
        return SegmentRunner(*args, **kinds)

    monkeypatch.setattr(module, "SegmentRunner", runner)
    monkeypatch.setattr(module, "CPU", torch.device("meta"))
    federation = Federation.start(tmp_path)
    with pytest.raises(EdgeError, match=r"do not fit the loss .IndexError: Target 7"):
        federation.thief.step(targets=labels(7, 0, 0, 0))
    federation.check_unharmed()
