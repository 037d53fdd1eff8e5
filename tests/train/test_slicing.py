"""Slices look at a batch without copying it, and boundaries are laid together as whole.

What a sliced front does in a step is tested along routes in tests/runtime.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit import Task
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.slicing import SlicedRunner, dense_slice, room_for, sliced


def test_a_slice_of_a_batch_shares_its_memory() -> None:
    """Whatever the batch looks like."""
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    for batch in (x, (x, y), {"a": x, "b": y}):
        with MemoryMeter() as meter:
            meter.track(x, y)
            before = meter.live_bytes
            part: Any = sliced(batch, 2, 4)
            assert meter.live_bytes == before
        first = part if isinstance(part, Tensor) else next(iter(_values(part)))
        assert torch.equal(first, x[2:4])


def _values(part: Any) -> Any:
    return part.values() if isinstance(part, dict) else part


LAYOUTS = {
    "contiguous": torch.randn(8, 3, 4, 5),
    "channels last": torch.randn(8, 4, 5, 3).permute(0, 3, 1, 2),
    "flat": torch.randn(8, 7),
    "transposed inside": torch.randn(8, 5, 3).transpose(1, 2),
    "one value": torch.randn(8),
    "single channel": torch.randn(8, 1, 4, 5).contiguous(
        memory_format=torch.channels_last
    ),
}


@pytest.mark.parametrize("whole", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_parts_are_laid_together_as_the_whole_lies(whole: Tensor, size: int) -> None:
    """Kernels choose their order of summation by strides."""
    room = room_for(whole[:size].clone(), 8)
    assert room.shape == whole.shape
    assert room.stride() == whole.stride()


@pytest.mark.parametrize(
    "whole", [torch.randn(3, 8).t(), torch.randn(8, 6)[:, ::2], torch.ones(1).expand(8)]
)
def test_parts_of_another_layout_are_laid_together_without_gaps(whole: Tensor) -> None:
    """Samples that lie inside each other, gaps, repetitions."""
    assert room_for(whole[:3], 8).is_contiguous()


@pytest.mark.parametrize("whole", LAYOUTS.values(), ids=LAYOUTS)
def test_a_gradients_slice_is_not_copied_where_it_has_no_gaps(whole: Tensor) -> None:
    """It is sent at once."""
    part = dense_slice(whole, 2, 5)
    assert torch.equal(part, whole[2:5])
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_a_gradients_slice_does_not_keep_gaps() -> None:
    """The device would make room for them."""
    whole = torch.randn(3, 8).t()
    part = dense_slice(whole, 2, 4)
    assert torch.equal(part, whole[2:4])
    assert part.untyped_storage().nbytes() == part.nbytes


def double_precision_task() -> Task:
    """Make a task of two layers."""
    return Task(
        model_fn=lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double(),
        loss_fn=nn.functional.mse_loss,
        optimizer_fn=partial(torch.optim.SGD, lr=0.1),
        example_inputs=torch.zeros(1, 4, dtype=torch.float64),
        example_targets=torch.zeros(1, 2, dtype=torch.float64),
    )


def test_slices_go_out_in_order_and_add_up() -> None:
    """Each once; gradients are complete before the one update."""
    task = double_precision_task()
    model = task.model_fn()
    chain = Chain.from_module(model, task.example_inputs)
    runner = SegmentRunner(chain.segment(0, 1), task)
    front = SlicedRunner(runner, 2)
    x, gradient = (torch.randn(5, n, dtype=torch.float64) for n in (4, 3))
    before = model[0].weight.detach().clone()
    starts: list[int] = []
    asked: list[tuple[int, int]] = []

    def receive(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        assert torch.equal(model[0].weight, before)
        return gradient[start:stop].clone()

    front.forward(x, step=0, send=lambda start, _: starts.append(start))
    front.backward(x, step=0, receive=receive)
    assert starts == [0, 2, 4]
    assert asked == [(0, 2), (2, 4), (4, 5)]
    expected = before - 0.1 * gradient.t() @ x
    assert torch.allclose(model[0].weight, expected, rtol=0, atol=1e-14)
