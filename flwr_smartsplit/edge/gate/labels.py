"""LabelCheck: tries labels on the CPU before an accelerator reads them.

There, an index out of range ends the whole process, and with it everybody's sessions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flwr_smartsplit.errors import EdgeError
from flwr_smartsplit.task import Task, copied_loss

_Range = tuple[int, frozenset[int]]  # The largest, and those below 0
_MOST_NEGATIVE = 100


class LabelCheck:
    """Run a task's loss on zeros whenever labels are new in what they index."""

    def __init__(self, task: Task) -> None:
        self._loss_fn = copied_loss(task.loss_fn)
        self._known: dict[int, _Range] = {}  # By the label's place in the targets

    def __call__(self, outputs: Any, targets: Any) -> None:
        """Raise ``EdgeError`` if the loss cannot take these labels."""
        found = {i: _range_of(x) for i, x in enumerate(tree_leaves(targets))}
        new = {i: r for i, r in found.items() if r and not self._has(i, r)}
        if not new:
            return
        # Whatever fails with harmless labels, too, does not fail by these.
        error = self._tried(outputs, tree_map_only(Tensor, _on_cpu, targets))
        if error and not self._tried(outputs, tree_map_only(Tensor, _zeros, targets)):
            raise EdgeError(
                f"labels from {new} do not fit the loss ({type(error).__name__}: "
                f"{error}): let the loader yield labels of the model's classes."
            )
        for index, (largest, negative) in new.items():
            before = self._known.get(index, (-1, frozenset()))
            self._known[index] = max(largest, before[0]), negative | before[1]

    def _has(self, index: int, found: _Range) -> bool:
        largest, negative = self._known.get(index, (-1, frozenset()))
        return found[0] <= largest and found[1] <= negative

    def _tried(self, outputs: Any, targets: Any) -> Exception | None:
        zeros = tree_map_only(Tensor, _zeros, outputs)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                self._loss_fn(zeros, targets)
        except Exception as error:
            return error
        return None


def _range_of(leaf: Any) -> _Range | None:
    """Say what a tensor of whole numbers may index; None for any other."""
    if not isinstance(leaf, Tensor) or not leaf.numel() or leaf.dtype == torch.bool:
        return None
    if leaf.is_floating_point() or leaf.is_complex():
        return None
    negative = leaf[leaf < 0].unique()[:_MOST_NEGATIVE].tolist()
    return int(leaf.max()), frozenset(negative)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _zeros(tensor: Tensor) -> Tensor:
    """Make zeros on the CPU, which may know no loss of half precision."""
    is_half = tensor.is_floating_point() and tensor.dtype != torch.float64
    return torch.zeros(tensor.shape, dtype=torch.float32 if is_half else tensor.dtype)
