"""The channel groups of a model, read off its traced graphs.

What is listed in ``operations.py`` is understood. Everything else keeps all channels
that it touches, so a group is never wrong, only missing.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.fake_tensors import (
    DryRun,
    fake_batch,
    fake_copy,
    warnings_ignored,
)
from flwr_smartsplit.split.narrow import operations as ops
from flwr_smartsplit.split.narrow.channel_sets import ChannelSets, Track
from flwr_smartsplit.split.segment import Batch
from flwr_smartsplit.split.template import building
from flwr_smartsplit.split.trace.tracing import trace_graph
from flwr_smartsplit.types import ChannelGroup

_NUM_EXAMPLES = 2  # A BatchNorm refuses to train on one.


@dataclass(frozen=True)
class Channels:
    """A model's channel groups, and why other channels stay whole."""

    groups: tuple[ChannelGroup, ...]
    reasons: Mapping[str, str]
    steps: Mapping[bool, str]  # What the whole model computes, by mode

    def require_groups(self, model: nn.Module) -> None:
        """Raise ``NotSplittable`` if no channel of a model may be left out."""
        if self.groups:
            return
        reasons = [f"{name}: {why}" for name, why in self.reasons.items()]
        raise NotSplittable(
            f"{type(model).__name__} cannot be narrowed: no channels of it are "
            "understood from the first layer that makes them to the last that reads "
            f"them ({'; '.join(reasons[:5]) or 'it has no convolution or linear'}). "
            "Train it whole or split: leave out Planning(variants=...)."
        )

    @warnings_ignored()
    def require_same_steps(self, small: nn.Module, example_inputs: Batch) -> None:
        """Raise ``NotSplittable`` if a narrower model computes otherwise.

        So it does where forward reads how large a layer is: the number is that of the
        whole model in one, and its own in the other.
        """
        for mode, steps in self.steps.items():
            with building:
                own = copy.deepcopy(small).train(mode)
                found = str(trace_graph(own, example_inputs))
            pairs = zip(steps.splitlines(), found.splitlines(), strict=False)
            other = next((pair for pair in pairs if pair[0] != pair[1]), None)
            if found != steps:
                where = f"{other[0].strip()} became {other[1].strip()}" if other else ""
                raise NotSplittable(
                    f"{type(small).__name__} cannot be narrowed: with fewer channels "
                    f"its forward does other things ({where:.200}). It reads the size "
                    "of a layer, such as out_features: use a number or a shape of what "
                    "the layer returns, or leave out Planning(variants=...)."
                )


@warnings_ignored()
def find_channels(model: nn.Module, example_inputs: Batch) -> Channels:
    """Find the channel groups of a model, whose parameters may be on meta.

    Raises ``NotSplittable`` if torch.fx cannot trace it.
    """
    with building:  # A trace changes torch for all threads.
        own = copy.deepcopy(model)
        sets, steps = ChannelSets(_aliases(own)), {}
        for mode in (True, False):
            graph = trace_graph(own.train(mode), example_inputs)
            steps[mode] = str(graph)
            values = _values(own, graph, example_inputs)
            _Reader(sets, own, values).read(graph)
    return Channels(sets.groups(), sets.reasons(), steps)


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """List all names of each tensor of the state, by each of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(each) for each in names.values() for name in each}


def _values(model: nn.Module, graph: fx.Graph, inputs: Batch) -> dict[fx.Node, Any]:
    """Run a graph under fake tensors, and return what its nodes are."""
    mode = DryRun()
    runner = fx.Interpreter(
        fake_copy(model, mode).train(model.training),
        garbage_collect_values=False,
        graph=graph,
    )
    batch = tree_leaves(fake_batch(inputs, mode, batch_size=_NUM_EXAMPLES))
    with mode, torch.no_grad():
        runner.run(*batch)
    return runner.env


class _Reader:
    """Follows channels through one graph."""

    def __init__(
        self,
        sets: ChannelSets,
        model: nn.Module,
        values: Mapping[fx.Node, Any],
    ) -> None:
        self._sets = sets
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._state = model.state_dict(keep_vars=True)
        self._values = values
        self._tracks: dict[fx.Node, Track] = {}
        self._shapes: dict[fx.Node, fx.Node] = {}  # Of which value
        self._counts: dict[fx.Node, Track] = {}  # Numbers of channels
        self._batches: set[fx.Node] = set()  # Numbers of examples

    def read(self, graph: fx.Graph) -> None:
        """Follow every node, in order."""
        for node in graph.nodes:
            track = self._followed(node)
            if track is not None:
                self._tracks[node] = track

    # --- what nodes are ---------------------------------------------------------------

    def _followed(self, node: fx.Node) -> Track | None:
        """Return the channels of a node's value; fix those it uses unlike any known."""
        for read in self._rules(node):
            found = read(node)
            if found is not None:
                return found.track
        why = f"{_text(node)} is not understood"
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            for name in self._state:
                if f"{name}.".startswith(f"{target}."):
                    self._keep_whole(name, why)
        for each in node.all_input_nodes:
            self._fix(each, why)
        return None

    def _keep_whole(self, name: str, why: str) -> None:
        self._sets.keep_whole(name, range(self._state[name].dim()), why)

    def _rules(self, node: fx.Node) -> Iterator[Callable[[fx.Node], "_Found | None"]]:
        if node.op == "call_module":
            yield self._module
        elif node.op in ("call_function", "call_method"):
            yield self._shape
            if node.target in ops.EACH:
                yield self._each
            if node.target in ops.BINARY:
                yield self._joined
            if node.target in ops.SPATIAL:
                yield self._spatial
            yield self._reshaped

    def _fix(self, node: fx.Node, why: str) -> None:
        """Keep all channels that a value, a shape or a number tells of."""
        node = self._shapes.get(node, node)
        for tracks in (self._tracks, self._counts):
            if node in tracks:
                self._sets.fix(tracks[node], why)

    def _dims(self, node: Any) -> tuple[int, ...]:
        value = self._values.get(node) if isinstance(node, fx.Node) else None
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    # --- modules ----------------------------------------------------------------------

    def _module(self, node: fx.Node) -> "_Found | None":
        module, name = self._modules[str(node.target)], str(node.target)
        inputs = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(inputs, fx.Node) or ops.has_hooks(module):
            return None
        dims, kind = self._dims(inputs), type(module)
        found: _Found | None = None
        if kind in ops.CONVOLUTIONS and len(dims) == ops.num_spatial(kind) + 2:
            found = self._convolution(node, name, module, inputs)
        elif kind is nn.Linear and len(dims) == 2:  # noqa: PLR2004 - batch, features
            found = self._layer(node, name, (0, 1), inputs)
        elif ops.normalises(module, len(dims)):
            found = self._normalised(name, module, inputs)
        elif ops.is_each(module, len(dims)):
            found = _Found(self._tracks.get(inputs))
        elif ops.flattens(module):
            found = self._flattened(inputs)
        return found

    def _convolution(
        self, node: fx.Node, name: str, module: Any, inputs: fx.Node
    ) -> "_Found | None":
        channels = module.in_channels
        if module.groups == 1:
            axes = (1, 0) if module.transposed else (0, 1)
            return self._layer(node, name, axes, inputs)
        track = self._tracks.get(inputs)
        is_depthwise = module.groups == channels == module.out_channels
        if track is None or track.repeat > 1 or not is_depthwise:
            return None
        self._hold(name, track, ("weight", "bias"))
        return _Found(track)

    def _layer(
        self, node: fx.Node, name: str, axes: tuple[int, int], inputs: fx.Node
    ) -> "_Found":
        """Read a layer of which every output depends on every input."""
        out, into = axes
        track = self._tracks.get(inputs)
        weight = f"{name}.weight"
        if track is None:
            self._sets.keep_whole(weight, [into], "all of what it reads stays")
        else:
            self._sets.hold(weight, into, track)
        made = self._sets.open(weight, out, self._dims(node)[1])
        self._hold(name, made, ("bias",))
        users = (self._modules.get(str(u.target)) for u in node.users)
        if not all(type(user) in ops.NORMS for user in users):
            self._sets.leave_unscaled(made, name)
        return _Found(made)

    def _normalised(
        self, name: str, module: nn.Module, inputs: fx.Node
    ) -> "_Found | None":
        track = self._tracks.get(inputs)
        if track is None:
            return None
        if isinstance(module, nn.GroupNorm):
            if track.repeat > 1:
                return None
            self._sets.keep_runs(track, module.num_channels // module.num_groups)
        self._hold(name, track, ops.PER_CHANNEL)
        return _Found(track)

    def _hold(self, name: str, track: Track, parts: tuple[str, ...]) -> None:
        """Note where a module has a value for each channel."""
        for part in parts:
            if isinstance(getattr(self._modules[name], part, None), Tensor):
                self._sets.hold(f"{name}.{part}", 0, track)

    # --- functions and methods --------------------------------------------------------

    def _each(self, node: fx.Node) -> "_Found | None":
        """Read what does the same to each value, of which it has one tensor."""
        inputs = node.all_input_nodes
        dims = self._dims(inputs[0]) if len(inputs) == 1 else ()
        if not dims or self._dims(node) != dims:
            return None
        return _Found(self._tracks.get(inputs[0]))

    def _joined(self, node: fx.Node) -> "_Found | None":
        """Read what does the same to pairs of values."""
        tensors = [n for n in node.all_input_nodes if self._dims(n)]
        numbers = [n for n in node.all_input_nodes if n not in tensors]
        if any(n in self._counts or n in self._shapes for n in numbers):
            return None
        rank, track, why = len(self._dims(node)), None, f"{_text(node)} mixes widths"
        for each in tensors:
            dims, own = self._dims(each), self._tracks.get(each)
            if len(dims) != rank or rank < 2:  # noqa: PLR2004 - batch, channels
                return None
            if dims[1] == 1 != self._dims(node)[1]:
                self._fix(each, why)
            elif own is None:
                return None
            else:
                track = own if track is None else self._sets.join(track, own, why)
        return _Found(track)

    def _spatial(self, node: fx.Node) -> "_Found | None":
        """Read what works within each channel."""
        inputs = node.all_input_nodes
        if len(inputs) != 1 or isinstance(self._values.get(node), tuple):
            return None
        before, after = self._dims(inputs[0]), self._dims(node)
        rank = ops.SPATIAL[node.target]
        is_right = len(before) == (rank or len(before)) >= 3  # noqa: PLR2004
        return _Found(self._tracks.get(inputs[0])) if is_right and after else None

    def _shape(self, node: fx.Node) -> "_Found | None":
        """Read a question for a shape, or for a part of it."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or len(node.all_input_nodes) != 1:
            return None
        if ops.asks_shape(node):
            self._shapes[node] = source
            return _Found(None)
        index = ops.asked_size(node, of_shape=source in self._shapes)
        if index is None:
            return _Found(None) if ops.is_harmless(node) else None
        tensor = self._shapes.get(source, source)
        track, rank = self._tracks.get(tensor), len(self._dims(tensor))
        if index % max(rank, 1) == 0:
            self._batches.add(node)
        elif track is not None and index % rank == 1:
            self._counts[node] = track
        return _Found(None)

    def _reshaped(self, node: fx.Node) -> "_Found | None":
        """Read what keeps batch and channels apart from all that is changed."""
        inputs = node.args[0] if node.args else None
        if not isinstance(inputs, fx.Node):
            return None
        track, dims = self._tracks.get(inputs), self._dims(inputs)
        if ops.averages_space(node, len(dims)):
            return _Found(track)
        if ops.flattens_all(node, len(dims)):
            return self._flattened(inputs)
        sizes = ops.view_sizes(node)
        if track is None or len(sizes) < 2:  # noqa: PLR2004 - batch, channels
            return None
        return self._viewed(node, inputs, track, sizes)

    def _viewed(
        self, node: fx.Node, inputs: fx.Node, track: Track, sizes: tuple[Any, ...]
    ) -> "_Found | None":
        dims = self._dims(inputs)
        if sizes[0] not in self._batches:
            return None
        if sizes[1:] == (-1,):
            return self._flattened(inputs)
        count = self._counts.get(sizes[1]) if isinstance(sizes[1], fx.Node) else None
        is_apart = self._dims(node)[:2] == dims[:2] and track.repeat == 1
        if count is None or not is_apart or self._counts.keys() & set(sizes[2:]):
            return None
        return _Found(self._sets.join(track, count, f"{_text(node)} mixes widths"))

    def _flattened(self, inputs: fx.Node) -> "_Found | None":
        track, dims = self._tracks.get(inputs), self._dims(inputs)
        if track is None or len(dims) < 2:  # noqa: PLR2004 - batch, channels
            return _Found(None)
        area = torch.Size(dims[2:]).numel()
        return _Found(Track(track.channels, track.repeat * area))


@dataclass(frozen=True, slots=True)
class _Found:
    """What an operation that is understood makes; None if no channels are followed."""

    track: Track | None


def _text(node: fx.Node) -> str:
    if node.op == "output":
        return "what the model returns"
    target = node.target
    return str(getattr(target, "__name__", target))
