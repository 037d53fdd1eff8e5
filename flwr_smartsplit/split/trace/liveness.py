"""What is still needed after each operation of a model's graph.

A place for a cut is an operation after which few tensors are still needed, besides
parameters, which are read where they are used, and sizes: whole numbers read off a
tensor's shape. Sizes cross a cut as the shape of an empty tensor, which takes no
memory.
"""

import itertools
import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

_NUMBER, _SIZE, _TUPLE = range(3)
_ARITHMETIC = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod),
)


def read_sizes_early(graph: fx.Graph) -> None:
    """Move each read of a tensor's shape to where the tensor is made.

    Else a tensor stays alive until its shape is read, for instance the input for a
    final interpolation. Only for graphs in which nothing changes a shape in place.
    """
    for node in reversed(list(graph.nodes)):
        sources = node.all_input_nodes
        if is_size(node) and len(sources) == 1 and not is_size(sources[0]):
            sources[0].append(node)


@dataclass(frozen=True)
class Place:
    """Where a graph may be cut: after ``node``, which is one of the ``tensors``.

    All ``tensors`` and ``sizes`` cross, in the order they were made.
    """

    node: fx.Node
    tensors: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...] = ()


def live_places(graph: fx.Graph, max_tensors: int = 1) -> dict[fx.Node, Place]:
    """Find the nodes after which their value and at most a few others are alive.

    Without those after which nothing is computed.
    """
    last = list(graph.nodes)[-1]
    places = {}
    for node, live in _live_after(graph).items():
        tensors = tuple(other for other in live if not is_size(other))
        if node.op in ("placeholder", "get_attr") or node not in tensors:
            continue
        is_over = all(set(other.users) == {last} for other in tensors)
        if len(tensors) <= max_tensors and not is_over:
            sizes = tuple(other for other in live if is_size(other))
            places[node] = Place(node, tensors, sizes)
    return places


def longest_needed(graph: fx.Graph) -> tuple[str, int] | None:
    """Name the value that is alive after most other nodes, and count those."""
    counts = Counter(
        other.name
        for node, live in _live_after(graph).items()
        for other in live
        if other is not node and not is_size(other)
    )
    return counts.most_common(1)[0] if counts else None


def _live_after(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """List what is still needed after each node, in the order it was made."""
    nodes = list(graph.nodes)
    last_use = {
        source: index
        for index, node in enumerate(nodes)
        for source in node.all_input_nodes
    }
    after: dict[fx.Node, list[fx.Node]] = {}
    live: list[fx.Node] = []
    for index, node in enumerate(nodes[:-1]):
        if node.op != "get_attr":
            live = [*live, node]
        live = [other for other in live if last_use.get(other, -1) > index]
        after[node] = live
    return after


def is_size(node: fx.Node) -> bool:
    """Say whether a node's value is a size: whole numbers from a tensor's shape."""
    sources = node.all_input_nodes
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1:2] in (("shape",), ("ndim",))
    if node.target in (operator.getitem, *_ARITHMETIC, len, int):
        is_whole = not any(isinstance(arg, float) for arg in node.args)
        return is_whole and bool(sources) and all(map(is_size, sources))
    return False


def as_tensor(value: Any) -> Tensor:
    """Write a size as the shape of an empty tensor, signs in separate dimensions.

    Examples
    --------
    >>> as_tensor(torch.Size([4, 6])).shape
    torch.Size([0, 1, 4, 0, 6, 0])
    >>> as_size(as_tensor(torch.Size([4, 6]))), as_size(as_tensor(-7))
    (torch.Size([4, 6]), -7)
    """
    is_tuple = isinstance(value, tuple)
    kind = _SIZE if isinstance(value, torch.Size) else _TUPLE if is_tuple else _NUMBER
    signed = ((max(n, 0), max(-n, 0)) for n in (value if is_tuple else (value,)))
    return torch.empty(0, kind, *itertools.chain.from_iterable(signed))


def as_size(carrier: Tensor) -> Any:
    """Read a size off the shape of an empty tensor."""
    _, kind, *signed = carrier.shape
    pairs = zip(signed[::2], signed[1::2], strict=True)
    values = [above - below for above, below in pairs]
    if kind == _SIZE:
        return torch.Size(values)
    return tuple(values) if kind == _TUPLE else values[0]
