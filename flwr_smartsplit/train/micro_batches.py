"""Divide a batch into micro-batches, to accumulate gradients."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.types import WHOLE_BATCH, MicroBatch

BatchT = TypeVar("BatchT")


def micro_batches(
    batch: BatchT, accumulate: int
) -> Iterator[tuple[MicroBatch, BatchT]]:
    """Divide inputs and targets, in order, into parts of nearly equal size.

    There are fewer than ``accumulate`` parts if there are fewer examples; they share
    the batch's memory. Tensors of different lengths raise ``InvalidTask``.
    """
    total = 1 if accumulate == 1 else _common_length(batch, accumulate)
    count = max(1, min(accumulate, total))
    if count == 1:
        yield WHOLE_BATCH, batch
        return
    size, num_larger = divmod(total, count)
    start = 0
    for index in range(count):  # As in Tensor.tensor_split, the first are larger.
        stop = start + size + (index < num_larger)
        part: Any = tree_map_only(Tensor, partial(_rows, start, stop), batch)
        yield MicroBatch(index, count, total / (stop - start)), part
        start = stop


def mean_loss(losses: Sequence[tuple[float, int]]) -> float:
    """Compute the mean loss of a batch from its parts' ``(loss, examples)``."""
    if len(losses) == 1:
        return losses[0][0]
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


def micro_batch_size(batch_size: int, accumulate: int) -> int:
    """Count the examples of the largest micro-batch."""
    return -(-batch_size // min(accumulate, batch_size))


def num_examples(inputs: Any, targets: Any) -> int:
    """Count the examples of a batch: the rows of its targets if they are one tensor.

    Else those of the first input: nested targets may have several lengths.
    """
    if isinstance(targets, Tensor) and targets.dim():
        return int(targets.shape[0])
    leaves = tree_leaves(inputs)
    return next(int(x.shape[0]) for x in leaves if isinstance(x, Tensor) and x.dim())


def _common_length(batch: Any, accumulate: int) -> int:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    sizes = {_num_rows(tensor) for tensor in tensors}
    if len(sizes) != 1:
        raise InvalidTask(
            f"accumulate={accumulate} divides a batch by its examples, but its tensors "
            f"have {sorted(sizes)} of them in dimension 0. Give every tensor of a "
            "batch the examples in dimension 0, or do not accumulate."
        )
    return sizes.pop()


def _rows(start: int, stop: int, tensor: Tensor) -> Tensor:
    return tensor[start:stop]


def _num_rows(tensor: Tensor) -> int:
    return int(tensor.shape[0]) if tensor.dim() else -1
