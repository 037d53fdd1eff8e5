"""Compile a piece of a model's graph into a function of the model and its inputs.

A region is a part of a piece that runs twice: it becomes a function of its own, which
the piece's function calls through torch's checkpointing.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx, nn

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.activation_checkpointing import run_twice
from flwr_smartsplit.split.trace.liveness import Place, as_size, as_tensor

NO_OPERATIONS = ("output", "get_attr")


@dataclass(frozen=True)
class Piece:
    """The nodes between two places, and what enters and leaves."""

    nodes: list[fx.Node]
    entering: Place | None
    leaving: Place | None


@dataclass(frozen=True)
class Region:
    """Neighbouring nodes of a piece that keep their inputs and rerun in backward.

    ``outputs`` are the nodes that others use, ``norms`` the names of its BatchNorms,
    whose statistics must not be updated twice.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    norms: tuple[str, ...] = ()

    @classmethod
    def of(cls, nodes: Sequence[fx.Node], norms: Sequence[str] = ()) -> "Region":
        """Make a region of nodes: find its inputs and outputs."""
        mine = set(nodes)
        needed = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
        return cls(
            tuple(nodes),
            tuple(n for n in needed if n not in mine and n.op != "get_attr"),
            tuple(n for n in nodes if not mine.issuperset(n.users)),
            tuple(norms),
        )


class _Copy:
    """A new graph with copies of some nodes of another."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> fx.Node:
        """Copy a node and its inputs, each once."""
        if node not in self.copies:
            self.copies[node] = self.graph.node_copy(node, self.of)
        return self.copies[node]

    def compiled(self, model: nn.Module) -> Callable[..., Any]:
        """Make a function of the graph."""
        try:
            return type(fx.GraphModule(model, self.graph)).forward
        except SyntaxError as error:
            nodes = self.graph.nodes
            targets = sorted(str(n.target) for n in nodes if n.op == "call_module")
            raise NotSplittable(
                f"torch.fx makes no code of {', '.join(targets)}: a name of a module "
                "must not be a word of Python's own. Rename it."
            ) from error


def compiled(
    model: nn.Module, piece: Piece, regions: Sequence[Region] = ()
) -> Callable[..., Any]:
    """Compile a piece into ``forward(root, *inputs)``, with ``regions`` that run twice.

    Raises ``NotSplittable`` if a module's name is a Python keyword.
    """
    copy = _Copy()
    graph = copy.graph
    # For fx, this name is the module itself.
    root = graph.placeholder("self") if regions else None
    if piece.entering is not None:
        for index, tensor in enumerate(piece.entering.tensors):
            copy.copies[tensor] = graph.placeholder(f"boundary_{index}")
        sizes = piece.entering.sizes
        carriers = [graph.placeholder(f"size_{i}") for i in range(len(sizes))]
        for size, carrier in zip(sizes, carriers, strict=True):
            copy.copies[size] = graph.call_function(as_size, (carrier,))
    region_of = {node: region for region in regions for node in region.nodes}
    for node in piece.nodes:
        region = region_of.get(node)
        if region is not None and node is region.nodes[0]:
            copy.copies |= _call(model, region, root, copy)
        elif node.op not in NO_OPERATIONS:
            copy.of(node)
    result = _result(piece, copy)
    if root is not None:
        # fx deletes a name after its last use, and module calls do not count as one.
        result = graph.call_function(_first, (result, root))
    graph.output(result)
    return copy.compiled(model)


def _result(piece: Piece, copy: _Copy) -> Any:
    if piece.leaving is None:
        return fx.map_arg(piece.nodes[-1].args[0], copy.of)
    tensors = [copy.of(tensor) for tensor in piece.leaving.tensors]
    sizes = map(copy.of, piece.leaving.sizes)
    carried = [copy.graph.call_function(as_tensor, (size,)) for size in sizes]
    boundary = (*tensors, *carried)
    return boundary if len(boundary) > 1 else boundary[0]


def _first(value: Any, other: Any) -> Any:
    del other
    return value


def _call(
    model: nn.Module, region: Region, root: fx.Node | None, copy: _Copy
) -> Mapping[fx.Node, fx.Node]:
    """Call a region in a new graph; return what replaces its nodes there."""
    function = _twice(_region_function(model, region), region.norms)
    values = (root, *(copy.of(node) for node in region.inputs))
    called = copy.graph.call_function(function, values)
    results = dict.fromkeys(region.nodes, called)  # Those of inner nodes are unused.
    if len(region.outputs) > 1:
        for index, node in enumerate(region.outputs):
            item = copy.graph.call_function(operator.getitem, (called, index))
            results[node] = item
    return results


def _region_function(model: nn.Module, region: Region) -> Callable[..., Any]:
    copy = _Copy()
    for index, node in enumerate(region.inputs):
        copy.copies[node] = copy.graph.placeholder(f"input_{index}")
    for node in region.nodes:
        copy.of(node)
    results = tuple(copy.of(node) for node in region.outputs)
    copy.graph.output(results if len(results) > 1 else results[0])
    return copy.compiled(model)


def _twice(function: Callable[..., Any], norms: Sequence[str]) -> Callable[..., Any]:
    def run_again(root: nn.Module, *values: Any) -> Any:
        own = nn.ModuleList(root.get_submodule(name) for name in norms)
        return run_twice(partial(function, root), *values, root=own)

    return run_again
