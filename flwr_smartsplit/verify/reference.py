"""The stock model, trained in a plain PyTorch loop that knows no units.

It shares only random numbers with split training: torch's generator is seeded right
before the operator that draws a unit's first random number.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from flwr_smartsplit.loss_terms import loss_divided_by
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.fake_tensors import (
    DryRun,
    fake_batch,
    fake_copy,
    warnings_ignored,
)
from flwr_smartsplit.split.segment import Batch
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.lr_schedule import scheduler_of
from flwr_smartsplit.train.micro_batches import (
    mean_loss,
    micro_batches,
    num_examples,
)
from flwr_smartsplit.train.rng import UnitStreams, derived_seed

Batches = Sequence[tuple[Batch, Any]]


@dataclass(frozen=True, slots=True)
class Truth:
    """Mean losses of the stock model: of first and last batch, untrained; of all."""

    eval_loss: float
    train_loss: float


def train_stock(  # noqa: PLR0913 - what is trained, and how
    model: nn.Module,
    task: Task,
    batches: Batches,
    *,
    chain: Chain,
    streams: UnitStreams,
    config: Mapping[str, Any] | None = None,
    ends: Batches,
    name_step: Callable[[int | str], None] = lambda step: None,
) -> Truth:
    """Evaluate the module on ``ends``, then train it in place, in a plain loop.

    ``chain`` says which unit draws how many random numbers, ``streams`` from which
    stream. ``name_step`` is told the name of each step, or of its micro-batches.
    """
    autocast: AbstractContextManager[Any] = nullcontext()
    if task.autocast_dtype is not None:
        autocast = torch.autocast("cpu", task.autocast_dtype)
    # A copy: it may change its state in evaluation, too.
    eval_loss = _evaluated(copy.deepcopy(model), task, ends, autocast)
    model.train()
    optimizer = task.optimizer_fn([p for p in model.parameters() if p.requires_grad])
    scheduler = scheduler_of(optimizer, task, config or {})
    firsts = first_draws(chain, batches[0][0])
    losses: list[tuple[float, int]] = []
    for step, batch in enumerate(map(_copied, batches)):
        optimizer.zero_grad()
        parts = []
        for part, (inputs, targets) in micro_batches(batch, task.accumulate):
            name_step(part.in_step(step))
            draws = seeded_draws(firsts, streams, part.in_step(step))
            with autocast:
                divided = loss_divided_by(part.loss_divisor)
                with divided, draws if firsts else nullcontext():
                    outputs = call(model, inputs)
                loss = task.loss_fn(outputs, targets)
            (loss / part.loss_divisor if part.count > 1 else loss).backward()
            parts.append((float(loss.detach()), num_examples(inputs, targets)))
        if task.max_gradient_norm is not None:
            clip_grad_norm_(model.parameters(), task.max_gradient_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append((mean_loss(parts), num_examples(*batch)))
    return Truth(eval_loss, _mean_loss(losses))


def _evaluated(
    model: nn.Module,
    task: Task,
    batches: Batches,
    autocast: AbstractContextManager[Any],
) -> float:
    """Evaluate some batches, before anything is trained."""
    model.eval()
    with torch.no_grad(), autocast:
        return _mean_loss(
            (task.loss_fn(call(model, inputs), targets), num_examples(inputs, targets))
            for batch in map(_copied, batches)
            for _, (inputs, targets) in micro_batches(batch, task.accumulate)
        )


def _copied(batch: tuple[Batch, Any]) -> tuple[Batch, Any]:
    """Copy a batch: a model may write into it."""
    copied: tuple[Batch, Any] = tree_map_only(Tensor, torch.clone, batch)
    return copied


def call(model: nn.Module, inputs: Batch) -> Any:
    """Call a module with a batch."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _mean_loss(losses: Iterable[tuple[Tensor | float, int]]) -> float:
    total, examples = 0.0, 0
    for loss, size in losses:
        total += float(loss) * size
        examples += size
    return total / examples


class _OnDraw(TorchDispatchMode):
    """Call a function before each operator that draws random numbers."""

    def __init__(self, function: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._function = function
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._function(self.count)
            self.count += 1
        return func(*args, **(kwargs or {}))


def seeded_draws(
    firsts: Mapping[int, int], streams: UnitStreams, step: int | str
) -> _OnDraw:
    """Let the stock model draw the numbers of its units: seed where each one begins."""

    def seed(draw: int) -> None:
        if draw in firsts:
            root = (streams.seed, streams.round_number, streams.client_key)
            value = derived_seed(*root, step, firsts[draw])
            torch.default_generator.manual_seed(value)

    return _OnDraw(seed)


@warnings_ignored()
def first_draws(chain: Chain, inputs: Batch) -> dict[int, int]:
    """Find the number of each unit's first draw among all draws of a forward."""
    mode, draws = DryRun(), _OnDraw(lambda _: None)
    segment = fake_copy(chain.segment(0, len(chain)), mode).train()
    batch = fake_batch(inputs, mode, batch_size=len(tree_leaves(inputs)[0]))
    counts = [0]

    def count(_: int, value: Any) -> Any:
        counts.append(draws.count)
        return value

    with mode, draws:
        segment(batch, observe=count)
    drawn = enumerate(pairwise(counts))
    return {before: unit for unit, (before, after) in drawn if after > before}
