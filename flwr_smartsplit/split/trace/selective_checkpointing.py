"""Choose the parts of a unit that run twice, so that it saves only costly results.

A region is a run of cheap operators, usually with one costly operator at its end. That
one saves its inputs before it runs, and torch's checkpointing stops once every saved
tensor is there; so a normalisation and an activation before a convolution run twice,
but the convolution does not. The region keeps its inputs instead of what was saved
inside.

All decisions use what a dry run saw each node do (``op_recorder.py``); an operator not
known to be cheap is costly.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flwr_smartsplit.split.activation_checkpointing import has_statistics
from flwr_smartsplit.split.trace.op_recorder import NodeFacts, storages_of
from flwr_smartsplit.split.trace.subgraphs import Piece, Region, compiled

_CHEAP = frozenset(
    "native_batch_norm _native_batch_norm_legit native_layer_norm native_group_norm "
    "_fused_rms_norm _softmax _log_softmax hardswish hardsigmoid mish elu celu "
    "leaky_relu _prelu_kernel softplus hardtanh threshold glu log_sigmoid_forward "
    "max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d mean sum amax amin var var_mean linalg_vector_norm cat stack "
    "clone copy _to_copy _unsafe_view _reshape_alias detach constant_pad_nd flip roll "
    "pixel_shuffle native_channel_shuffle upsample_nearest2d upsample_bilinear2d "
    "masked_fill tril triu empty empty_like zeros zeros_like ones ones_like full "
    "full_like arange scalar_tensor lift_fresh device".split()
)
"""Operators that cost next to nothing beside a product of matrices, besides views and
those that torch calls pointwise."""

_NEGLIGIBLE = 0.02
"""The negligible fraction of a unit's FLOPs, or of what it keeps: products in a
squeeze-and-excitation may rerun, and a region has to save more."""

_Option = tuple[int, int]
"""The first node of a region, and the one after its last."""


def selective_function(
    model: nn.Module, piece: Piece, facts: dict[fx.Node, NodeFacts]
) -> Callable[..., Any] | None:
    """Compile a piece whose cheap operators run twice; None if that saves nothing.

    The model is in training mode; ``facts`` say what each node of its graph does.
    """
    regions = find_regions(model, piece, facts)
    return compiled(model, piece, regions) if regions else None


def find_regions(
    model: nn.Module, piece: Piece, facts: dict[fx.Node, NodeFacts]
) -> list[Region]:
    """Choose the parts of a unit that run twice, so that it keeps least."""
    unit = _UnitGraph(model, piece, facts)
    choice = _least_kept(unit)
    regions = (
        Region.of(unit.nodes[start:stop], unit.norms(start, stop))
        for start, stop in choice
    )
    return [region for region in regions if region.outputs]


class _UnitGraph:
    """A unit's nodes in order, and what may be done with them.

    ``sizes`` holds the bytes of each storage that the unit may keep, without those that
    are kept anyway.
    """

    def __init__(
        self, model: nn.Module, piece: Piece, facts: dict[fx.Node, NodeFacts]
    ) -> None:
        self.nodes = [n for n in piece.nodes if n.op.startswith("call_")]
        self.facts = [facts[node] for node in self.nodes]
        self.model = model
        self._values = {node: facts[node].value for node in self._all_inputs()}
        self._most_flops = _negligible(fact.flops for fact in self.facts)
        self._maker: dict[int, int] = {}
        self._last_written: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        for index, fact in enumerate(self.facts):
            for key in storages_of(fact.value):
                self._maker.setdefault(key, index)
            self._last_written |= dict.fromkeys(fact.written, index)
            self.sizes |= fact.saved | _sizes(fact.value)
        entered = self._entered(piece, facts)
        saved = {key for fact in self.facts for key in fact.saved}
        # Else what the unit before keeps would depend on whether this one is selective.
        self._closed = entered - saved if piece.entering is not None else set()
        for key in entered | self._left(piece, facts):
            self.sizes.pop(key, None)

    def _all_inputs(self) -> Iterator[fx.Node]:
        return (n for node in self.nodes for n in (node, *node.all_input_nodes))

    def _entered(self, piece: Piece, facts: dict[fx.Node, NodeFacts]) -> set[int]:
        if piece.entering is not None:
            return storages_of([facts[n].value for n in piece.entering.tensors])
        batch = [n for n in piece.nodes if n.op == "placeholder"]
        return storages_of([facts[node].value for node in batch])

    def _left(self, piece: Piece, facts: dict[fx.Node, NodeFacts]) -> set[int]:
        if piece.leaving is not None:
            return storages_of([facts[n].value for n in piece.leaving.tensors])
        outputs = [n for n in piece.nodes if n.op == "output"]
        return storages_of([facts[node].value for node in outputs])

    def norms(self, start: int, stop: int) -> list[str]:
        """Name the modules among some nodes that keep running statistics."""
        modules = [n for n in self.nodes[start:stop] if n.op == "call_module"]
        return [
            str(node.target)
            for node in modules
            if any(
                map(
                    has_statistics, self.model.get_submodule(str(node.target)).modules()
                )
            )
        ]

    def _may_repeat(self, index: int) -> bool:
        fact = self.facts[index]
        return fact.repeats and not fact.is_random

    def is_cheap(self, index: int) -> bool:
        """Say whether a node may run twice at next to no cost."""
        fact = self.facts[index]
        is_small = fact.flops <= self._most_flops
        known = all(
            _is_cheap(each) or (is_small and each.overloadpacket in flop_registry)
            for each in fact.operators
        )
        return known and self._may_repeat(index)

    def ends_regions(self, index: int) -> bool:
        """Say whether a costly node saves only what it computes from."""
        fact = self.facts[index]
        first = fact.operators[: fact.num_before_saved]
        return self._may_repeat(index) and all(map(_is_cheap, first))

    def runs(self) -> Iterator[tuple[int, int]]:
        """Find the runs of cheap nodes, each with the costly node after it, if any."""
        start, count = 0, len(self.nodes)
        for index in range(count + 1):
            if index < count and self.is_cheap(index):
                continue
            if index > start:
                yield start, min(index + 1, count)
            start = index + 1

    def options(self, first: int, last: int) -> Iterator[_Option]:
        """List the regions that a run allows, the smallest first."""
        has_end = not self.is_cheap(last - 1)
        stops = [last - 1] if has_end else [last]
        if has_end and self.ends_regions(last - 1):
            stops.append(last)
        for stop in stops:
            for start in reversed(range(first, min(stop, last - has_end))):
                if self._is_legal(start, stop):
                    yield start, stop

    def _is_legal(self, start: int, stop: int) -> bool:
        """Say whether some nodes can rerun later from their inputs."""
        written = {key for fact in self.facts[start:stop] for key in fact.written}
        if any(not start <= self._maker.get(key, start) < stop for key in written):
            return False
        values = [self._values[n] for n in self._inputs(start, stop)]
        if any(_holds_tensors(value) for value in values):
            return False
        keys = storages_of(values)
        is_changed = any(self._last_written.get(key, -1) >= start for key in keys)
        return not is_changed and keys.isdisjoint(self._closed | written)

    def _inputs(self, start: int, stop: int) -> tuple[fx.Node, ...]:
        return Region.of(self.nodes[start:stop]).inputs

    def kept(self, low: int, high: int, option: _Option | None) -> set[int]:
        """Find the storages that some nodes keep, given the region among them."""
        start, stop = option or (low, low)
        outside = [*self.facts[low:start], *self.facts[stop:high]]
        keys = {key for fact in outside for key in fact.saved}
        if option is not None:
            keys |= storages_of([self._values[n] for n in self._inputs(start, stop)])
        return keys & self.sizes.keys()


def _least_kept(unit: _UnitGraph) -> list[_Option]:
    """Choose a region in each run, or none, so that the unit keeps least.

    Several runs may keep the same storage, so choices depend on each other: start from
    the largest regions, then improve one run after the other.
    """
    runs = {run: list(unit.options(*run)) for run in unit.runs()}
    best = {run: options[-1] if options else None for run, options in runs.items()}
    inside = {index for run in runs for index in range(*run)}
    others = [i for i in range(len(unit.nodes)) if i not in inside]
    keepers = Counter(key for i in others for key in unit.kept(i, i + 1, None))
    plain = Counter(keepers)
    for run in runs:
        keepers.update(unit.kept(*run, best[run]))
        plain.update(unit.kept(*run, None))
    price = _NEGLIGIBLE * sum(unit.sizes[key] for key in plain)
    for _ in range(2):
        for run, options in runs.items():
            keepers.subtract(unit.kept(*run, best[run]))
            costs = {
                option: _bytes(unit, unit.kept(*run, option), keepers)
                + (0 if option is None else price)
                for option in (None, *options)
            }
            best[run] = min(costs, key=lambda option: costs[option])
            keepers.update(unit.kept(*run, best[run]))
    return sorted(option for option in best.values() if option is not None)


def _bytes(unit: _UnitGraph, keys: Iterable[int], keepers: Counter[int]) -> int:
    return sum(unit.sizes[key] for key in keys if keepers[key] <= 0)


@cache
def _is_cheap(operator: Any) -> bool:
    """Say whether an operator costs next to nothing to run again."""
    packet = operator.overloadpacket
    name = packet.__name__
    if operator.is_view or name in _CHEAP:
        return True
    packets = [packet]  # In-place variants have fewer tags.
    if name.endswith("_") and hasattr(torch.ops.aten, name[:-1]):
        packets.append(getattr(torch.ops.aten, name[:-1]))
    return name.rstrip("_") in _CHEAP or any(
        torch.Tag.pointwise in getattr(each, overload).tags
        for each in packets
        for overload in each.overloads()
    )


def _negligible(flops: Iterable[int]) -> int:
    """Find the most FLOPs up to which all nodes together are negligible."""
    counts = Counter(flops)
    allowed = _NEGLIGIBLE * sum(each * times for each, times in counts.items())
    total = most = 0
    for each in sorted(counts):
        total += each * counts[each]
        if total <= allowed:
            most = each
    return most


def _holds_tensors(value: Any) -> bool:
    leaves = tree_leaves(value)
    is_one = isinstance(value, Tensor)
    return not is_one and any(isinstance(leaf, Tensor) for leaf in leaves)


def _sizes(value: Any) -> dict[int, int]:
    return {
        leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided
    }
