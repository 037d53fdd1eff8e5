"""The loss of a dry run: under fake tensors, or for real where it looks at values.

CTC, a boolean mask or hard negatives decide by values how much they allocate. Such a
loss is run on random outputs and the task's example targets: a loss and its outputs are
small beside a model. A meter counts what it makes as if it were fake.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from flwr_smartsplit.profile.memory_trace import LoggingMeter
from flwr_smartsplit.split.fake_tensors import rows_of_targets
from flwr_smartsplit.task import Task, copied_loss

_LOOKS_AT_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


class DryLoss:
    """A task's loss in a dry run; ``spans`` are the changes that its forwards made."""

    def __init__(
        self, task: Task, mode: FakeTensorMode, meter: LoggingMeter, *, batch_size: int
    ) -> None:
        self.spans: list[range] = []
        self._task = task
        self._loss_fn = copied_loss(task.loss_fn)
        self._mode = mode
        self._meter = meter
        self._batch_size = batch_size
        self._looks_at_values = False

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Compute the loss of fake outputs."""
        start = self._meter.position
        try:
            return self._computed(outputs, targets)
        finally:
            self.spans.append(range(start, self._meter.position))

    def _computed(self, outputs: Any, targets: Any) -> Tensor:
        if not self._looks_at_values:
            try:
                return self._loss_fn(outputs, targets)
            except _LOOKS_AT_VALUES:
                self._looks_at_values = True
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        loss: Tensor = _RealLoss.apply(self, outputs, *leaves)
        return loss

    def run(self, outputs: Any) -> tuple[Tensor, list[Tensor], list[bool]]:
        """Compute a real loss; also return its outputs, and which of them it saved."""
        chance = torch.Generator().manual_seed(0)
        with _disable_current_modes():
            made: list[Tensor] = []

            def real(fake: Tensor) -> Tensor:
                like = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
                if fake.is_floating_point():
                    like.uniform_(generator=chance)
                else:
                    like.zero_()
                made.append(like.requires_grad_(fake.requires_grad))
                self._meter.ignore(like)
                return like

            outputs = tree_map_only(Tensor, real, outputs)
            targets = self._real_targets()
            saved: set[int] = set()

            def note(tensor: Tensor) -> Tensor:
                saved.add(tensor.untyped_storage()._cdata)
                return tensor

            with self._meter, torch.enable_grad(), saved_tensors_hooks(note, _itself):
                loss = self._loss_fn(outputs, targets)
            self._meter.forget(loss)
            self._meter.ignore(loss)  # Its fake counts.
        kept = [tensor.untyped_storage()._cdata in saved for tensor in made]
        return loss, made, kept

    def differentiated(
        self, loss: Tensor, outputs: list[Tensor]
    ) -> list[Tensor | None]:
        """Return the gradients of real outputs as fakes that the meter counts."""
        wanted = [output for output in outputs if output.requires_grad]
        with _disable_current_modes():
            seed = torch.ones_like(loss)
            self._meter.ignore(seed)  # The fake loss's counts.
            with self._meter:
                found = iter(torch.autograd.grad(loss, wanted, seed, allow_unused=True))
        gradients = [next(found) if x.requires_grad else None for x in outputs]
        fakes = [None if x is None else self.fake_like(x) for x in gradients]
        del found, gradients  # Before the fakes are counted.
        self._meter.see(*fakes)
        return fakes

    def fake_like(self, real: Tensor) -> Tensor:
        """Make a fake tensor, which the meter does not count yet."""
        with _disable_current_modes(), self._mode:
            return torch.empty_strided(real.shape, real.stride(), dtype=real.dtype)

    def _real_targets(self) -> Any:
        """Repeat the example targets until there are enough, uncounted."""
        task = self._task
        rows = iter(
            rows_of_targets(
                task.example_targets, task.example_inputs, batch_size=self._batch_size
            )
        )

        def repeated(example: Tensor) -> Tensor:
            size = next(rows)
            repeats = -(-size // max(1, len(example))) if example.dim() else 1
            enough = torch.cat([example] * repeats)[:size] if example.dim() else example
            self._meter.ignore(enough)
            return enough

        return tree_map_only(Tensor, repeated, task.example_targets)


class _RealLoss(torch.autograd.Function):
    """A fake loss whose memory is that of a real one."""

    @staticmethod
    def forward(ctx: Any, dry: DryLoss, outputs: Any, *leaves: Tensor) -> Tensor:
        """Run the loss for real; keep of the fake outputs what it saved."""
        ctx.dry = dry
        with torch.enable_grad():
            ctx.loss, ctx.outputs, kept = dry.run(outputs)
        if ctx.loss.dim():
            raise ValueError(f"the loss has shape {tuple(ctx.loss.shape)}, not ()")
        ctx.save_for_backward(
            *(leaf for leaf, is_kept in zip(leaves, kept, strict=True) if is_kept)
        )
        return dry.fake_like(ctx.loss)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        """Return fakes of the real gradients."""
        loss, outputs = ctx.loss, ctx.outputs
        ctx.loss = ctx.outputs = None
        return None, None, *ctx.dry.differentiated(loss, outputs)


def _itself(value: Any) -> Any:
    return value
