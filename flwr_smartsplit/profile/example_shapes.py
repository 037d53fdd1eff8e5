"""The shapes of an example, and of the longest that a client met.

A prediction is for the task's example. Where sequences vary in length, a client reports
the largest sizes it saw, and is priced at these from then on.
"""

import itertools
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import Shapes

_MOST_VALUES = 2**26  # Of one example; who reports more is not believed.


def shapes_of(batch: Any) -> Shapes:
    """List the shapes of one example of a batch, tensor by tensor."""
    if isinstance(batch, Tensor):
        return (tuple(batch.shape[1:]),)
    if type(batch) is tuple:  # Each step's batch is one.
        return tuple(itertools.chain.from_iterable(map(shapes_of, batch)))
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return tuple(tuple(leaf.shape[1:]) for leaf in leaves)


def longest(shapes: Shapes, others: Shapes) -> Shapes:
    """Take the larger of two sizes everywhere; the first if they are no pair."""
    if [len(shape) for shape in shapes] != [len(other) for other in others]:
        return shapes
    pairs = zip(shapes, others, strict=True)
    return tuple(tuple(map(max, *pair)) for pair in pairs)


def example_shapes(task: Task) -> Shapes:
    """List the shapes of a task's example, targets last."""
    return shapes_of((task.example_inputs, task.example_targets))


def longer_than_example(shapes: Shapes, task: Task) -> Shapes:
    """Return at least the example's sizes, or ``()`` if nothing is above them."""
    usual = example_shapes(task)
    found = longest(usual, shapes)
    is_sane = all(prod(shape) <= _MOST_VALUES for shape in found)
    return found if found != usual and is_sane else ()


def with_example_shapes(chain: Chain, task: Task, shapes: Shapes) -> tuple[Chain, Task]:
    """Give a chain and its task examples of these shapes; ``()`` keeps them."""
    if not shapes:
        return chain, task
    wanted = iter(shapes)
    inputs = tree_map_only(
        Tensor, lambda x: _stretched(x, next(wanted)), task.example_inputs
    )
    targets = tree_map_only(
        Tensor, lambda x: _stretched(x, next(wanted)), task.example_targets
    )
    stretched = chain.given(inputs)
    return stretched, replace(task, example_inputs=inputs, example_targets=targets)


def _stretched(example: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat an example's values up to a shape, in the same order of dimensions."""
    if not example.dim() or tuple(example.shape[1:]) == shape:
        return example
    order = sorted(range(example.dim()), key=example.stride, reverse=True)
    for dim, size in enumerate(shape, start=1):
        index = torch.arange(size) % max(1, example.shape[dim])
        example = example.index_select(dim, index)
    ordered = example.permute(order).contiguous()
    return ordered.permute([order.index(dim) for dim in range(len(order))])
