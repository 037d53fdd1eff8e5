"""Sparse tensors of a dry run, which torch gives a shape but no parts.

The gradient of ``Embedding(sparse=True)`` is one. Its parts are what takes memory, so
they are kept beside it: as many values as there were tokens, since nothing is known of
which are equal.
"""

from typing import Any

import torch
from torch import Tensor

from flwr_smartsplit.memory.meter import PARTS

_aten = torch.ops.aten
_INDICES = {_aten._indices.default, _aten.indices.default}
_VALUES = {_aten._values.default, _aten.values.default}
_SAME = {_aten.detach.default, _aten.alias.default}


def is_sparse_fake(value: Any) -> bool:
    """Say whether parts are kept for a value, or should be."""
    return isinstance(value, Tensor) and value.layout is torch.sparse_coo


def part_of(func: Any, args: Any) -> Tensor | None:
    """Return the part that an operator reads; None for other operators."""
    if func in _INDICES or func in _VALUES:
        parts: tuple[Tensor, Tensor] | None = getattr(args[0], PARTS, None)
        if parts is not None:
            return parts[func in _VALUES]
    return None


def keep_parts(func: Any, args: Any, result: Tensor) -> None:
    """Give an operator's sparse result the parts that the real one has."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    sources = [getattr(each, PARTS) for each in tensors if hasattr(each, PARTS)]
    if not sources:
        parts = _new_parts(func, tensors, result)
    elif func in _SAME or (len(sources) == 1 and result is args[0]):
        parts = sources[0]
    else:
        # Torch appends what it adds to a sparse tensor.
        count = sum(values.shape[0] for _, values in sources)
        indices, values = sources[0]
        parts = (
            indices.new_empty((indices.shape[0], count)),
            values.new_empty((count, *values.shape[1:])),
        )
    setattr(result, PARTS, parts)


def _new_parts(func: Any, tensors: list[Tensor], result: Tensor) -> tuple[Tensor, ...]:
    """Return the parts of a tensor that is made of them, or of dense tensors."""
    if "sparse_coo_tensor" in str(func):
        return tuple(tensors[:2])
    # A gradient with a row for each index, as EmbeddingBag's.
    whole = [tensor for tensor in tensors if not tensor.is_floating_point()]
    indices = max(whole, key=Tensor.numel).reshape(1, -1)
    rows = indices.shape[1], *result.shape[1:]
    return indices, torch.empty(rows, dtype=result.dtype)
