"""Gradient accumulation is a plain loop that accumulates, whole and split."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.grad_clipping import total_norm
from flwr_smartsplit.train.micro_batches import (
    mean_loss,
    micro_batch_size,
    micro_batches,
)
from flwr_smartsplit.train.segment_runner import SegmentRunner
from tests.models import OPTIMIZERS, batches_of, seeded, small_cnn, task_of

BATCH_SIZE, NUM_STEPS = 8, 3
SHAPE = (3, 12, 12)
MAX_NORM = 0.5
State = dict[str, Tensor]


def plain_loop(model: nn.Module, task: Task, batches: Any, *, clip: bool) -> State:
    """Train as a user would who accumulates: the loss over the number of parts."""
    torch.manual_seed(3)
    optimizer = task.optimizer_fn(model.parameters())
    for inputs, targets in batches:
        optimizer.zero_grad()
        parts = min(task.accumulate, len(inputs))
        for x, y in zip(
            inputs.tensor_split(parts), targets.tensor_split(parts), strict=True
        ):
            loss = task.loss_fn(model(x), y)
            (loss / (len(inputs) / len(x))).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    return model.state_dict()


def split_loop(
    model: nn.Module, task: Task, batches: Any, cut: int | None
) -> tuple[State, list[float]]:
    """Train the same with one runner, or with two at a cut."""
    torch.manual_seed(3)
    chain = Chain.from_module(model, task.example_inputs)
    bounds = [0, len(chain)] if cut is None else [0, cut, len(chain)]
    runners = [
        SegmentRunner(chain.segment(*pair), task, steps_in_backward=True)
        for pair in pairwise(bounds)
    ]
    losses = []
    for step, batch in enumerate(batches):
        for part, (x, y) in micro_batches(batch, task.accumulate):
            how: dict[str, Any] = {"step": step, "part": part}
            if cut is None:
                loss, _ = runners[0].finish(x, y, inputs_are_boundary=False, **how)
            else:
                sent = runners[0].forward(x, inputs_are_boundary=False, **how)
                loss, back = runners[1].finish(
                    sent[0], y, inputs_are_boundary=True, **how
                )
                runners[0].backward(lambda back=back: back)
            losses.append(float(loss))
        if task.max_gradient_norm is not None:
            norms = {n: v for r in runners for n, v in r.gradient_norms().items()}
            for runner in runners:
                runner.update(total_norm(norms, model))
    return model.state_dict(), losses


def differing(one: State, other: State) -> list[str]:
    """Name the values whose bits differ."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def both(
    accumulate: int, optimizer: str, cut: int | None, *, clip: bool = False
) -> list[str]:
    """Compare the two loops from the same start."""
    task = replace(
        task_of(small_cnn, optimizer=OPTIMIZERS[optimizer], shape=SHAPE),
        accumulate=accumulate,
        max_gradient_norm=MAX_NORM if clip else None,
    )
    model = seeded(small_cnn).train()
    twin = copy.deepcopy(model)
    batches = batches_of(NUM_STEPS, BATCH_SIZE, shape=SHAPE)
    expected = plain_loop(twin, task, batches, clip=clip)
    found, _ = split_loop(model, task, batches, cut)
    return differing(expected, found)


@pytest.mark.every(4)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [2, 3, 4, 8, 9])
@pytest.mark.parametrize("cut", [None, 1, 4])
def test_micro_batches_are_the_loop_that_accumulates(
    cut: int | None, accumulate: int, optimizer: str
) -> None:
    """Even parts, uneven parts, single examples; more parts than examples."""
    assert both(accumulate, optimizer, cut) == []


@pytest.mark.parametrize("cut", [None, 3])
def test_clipping_comes_after_the_last_micro_batch(cut: int | None) -> None:
    """By the norm of the summed gradients."""
    assert both(4, "momentum", cut, clip=True) == []


@pytest.mark.parametrize(
    "plant",
    [
        lambda part: replace(part, loss_divisor=part.loss_divisor * 1.0001),
        lambda part: replace(part, index=0, count=1),
        lambda part: replace(part, index=max(part.index, 1)),
    ],
    ids=["another weight", "a step each", "gradients of the last step"],
)
def test_a_planted_error_is_seen(
    plant: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the weight of a part, in when the optimizer steps, in what is added up."""
    real = micro_batches

    def bent(batch: Any, accumulate: int) -> Any:
        return [(plant(part), values) for part, values in real(batch, accumulate)]

    monkeypatch.setitem(globals(), "micro_batches", bent)
    assert both(4, "momentum", None) != []


def test_a_batch_without_accumulation_is_handed_on_as_it_is() -> None:
    """Not even a view."""
    batch = (torch.zeros(4), torch.zeros(3))
    ((part, same),) = micro_batches(batch, 1)
    assert same is batch
    assert part.is_first
    assert part.is_last


def test_tensors_of_other_lengths_are_refused() -> None:
    """A mask without a batch dimension would be cut in pieces."""
    with pytest.raises(InvalidTask, match=r"\[3, 4\] of them in dimension 0"):
        list(micro_batches((torch.zeros(4, 2), torch.zeros(3)), 2))


def test_a_task_without_micro_batches_is_refused() -> None:
    """Nothing would ever be trained."""
    with pytest.raises(ValueError, match="at least 1 micro-batch"):
        replace(task_of(small_cnn, shape=SHAPE), accumulate=0)


def test_parts_are_as_even_as_can_be_the_larger_ones_first() -> None:
    """And each weighs by its examples."""
    parts = micro_batches(torch.arange(3), 2)
    assert [(part.loss_divisor, x.tolist()) for part, x in parts] == [
        (1.5, [0, 1]),
        (3.0, [2]),
    ]
    sizes = [micro_batch_size(*case) for case in ((32, 4), (10, 4), (3, 8))]
    assert sizes == [8, 3, 1]
    assert mean_loss([(1.0, 2), (4.0, 1)]) == 2.0
