"""What functions and methods do to the samples of a batch, by name.

Each rule says what kind of value comes out, or doubts. A rule sees how the operation
is called and the shapes of a dry run, in which a batch has two samples.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from flwr_smartsplit.split.trace.op_recorder import NodeFacts


class Kind(Enum):
    """What a value of a graph has to do with the samples of a batch."""

    SAMPLES = "a tensor whose dimension 0 is the samples"
    SEVERAL = "a tuple of such tensors"
    CONSTANT = "the same whatever the batch"
    SHAPE = "the shape of such a tensor"
    COUNT = "the number of samples"


class Doubt(Exception):
    """It cannot be shown that samples stay apart."""


def require(is_certain: bool) -> None:
    """Doubt unless something is certain."""
    if not is_certain:
        raise Doubt


@dataclass(frozen=True)
class Call:
    """One operation of a graph: what it is given, and what is known of that."""

    node: fx.Node
    kinds: Mapping[fx.Node, Kind]
    facts: Mapping[fx.Node, NodeFacts]

    @property
    def args(self) -> tuple[Any, ...]:
        """What it is given by position; a method's object is the first."""
        return self.node.args

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """What it is given by name."""
        return self.node.kwargs

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Find an argument, however it is given."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def dims(self, position: int, name: str, default: Any = None) -> Any:
        """Find an argument that may be a list or several arguments."""
        value = self.arg(position, name, default)
        if isinstance(value, list | tuple):
            return tuple(value)
        return self.args[position:] if len(self.args) > position else (value,)

    def kind(self, value: Any) -> Kind:
        """Tell what an argument is."""
        if isinstance(value, fx.Node):
            require(value in self.kinds)
            return self.kinds[value]
        if isinstance(value, slice):
            value = (value.start, value.stop, value.step)
        if isinstance(value, list | tuple):
            require(all(self.kind(item) is Kind.CONSTANT for item in value))
        require(not isinstance(value, dict))
        return Kind.CONSTANT

    def value(self, node: Any) -> Any:
        """Find what an argument was in the dry run."""
        return self.facts[node].value if isinstance(node, fx.Node) else node

    def rank(self, node: Any) -> int:
        """Count the dimensions of a tensor."""
        value = self.value(node)
        require(isinstance(value, Tensor))
        return int(value.dim())

    def samples(self, *, rank: int = 1) -> fx.Node:
        """Take the first argument, which has to be samples of at least some rank."""
        first = self.arg(0, "input")
        require(self.kind(first) is Kind.SAMPLES and self.rank(first) >= rank)
        node: fx.Node = first
        return node

    def rest_is_constant(self) -> None:
        """Doubt if anything but the first argument depends on the batch."""
        rest = [*self.args[1:], *(v for k, v in self.kwargs.items() if k != "input")]
        require(all(self.kind(value) is Kind.CONSTANT for value in rest))

    def result(self) -> Kind:
        """Tell one tensor from several; a tuple may end in None."""
        value = self.facts[self.node].value
        if isinstance(value, Tensor):
            return Kind.SAMPLES
        require(isinstance(value, tuple | list))
        for part in value:
            require(part is None or isinstance(part, Tensor))
        return Kind.SEVERAL


Rule = Callable[[Call], Kind]

ATTENTION = functional.scaled_dot_product_attention


def constant_call(call: Call) -> Kind:
    """Compute from what does not depend on the batch; with known functions only."""
    is_method = call.node.op == "call_method"
    module = str(getattr(call.node.target, "__module__", "torch") or "torch")
    known = ("torch", "_operator", "operator", "builtins", "math")
    require(is_method or module.split(".", maxsplit=1)[0] in known)
    return Kind.CONSTANT


def _pointwise(call: Call) -> Kind:
    """Go element by element; what is broadcast must not come to lie along samples."""
    given = [*call.args, *call.kwargs.values()]
    kinds = [call.kind(value) for value in given]
    require(set(kinds) <= {Kind.SAMPLES, Kind.CONSTANT} and Kind.SAMPLES in kinds)
    ranks = {
        call.rank(v) for v, k in zip(given, kinds, strict=True) if k is Kind.SAMPLES
    }
    require(len(ranks) == 1)
    (rank,) = ranks
    for value, kind in zip(given, kinds, strict=True):
        other = call.value(value)
        if kind is Kind.CONSTANT and isinstance(other, Tensor):
            fits = other.dim() < rank or (other.dim() == rank and other.shape[0] == 1)
            require(fits)
    return call.result()


def _per_sample(rank: int | None = None, *, least: int = 1) -> Rule:
    """Read the first argument sample by sample, the others being constant."""

    def rule(call: Call) -> Kind:
        samples = call.samples(rank=least)
        require(rank is None or call.rank(samples) == rank)
        call.rest_is_constant()
        return call.result()

    return rule


def _along(position: int, name: str = "dim", default: Any = None) -> Rule:
    """Work along given dimensions, none of which is that of the samples."""

    def rule(call: Call) -> Kind:
        rank = call.rank(call.samples())
        call.rest_is_constant()
        dims = call.arg(position, name, default)
        dims = dims if isinstance(dims, list | tuple) else (dims,)
        require(bool(dims) and all(isinstance(dim, int) for dim in dims))
        require(all(dim % rank != 0 for dim in dims))
        return call.result()

    return rule


def _transpose(call: Call) -> Kind:
    rank = call.rank(call.samples())
    for dim in (call.arg(1, "dim0"), call.arg(2, "dim1")):
        require(isinstance(dim, int) and dim % rank != 0)
    return call.result()


def _permute(call: Call) -> Kind:
    rank = call.rank(call.samples())
    first = call.dims(1, "dims")[0]
    require(isinstance(first, int) and first % rank == 0)
    return call.result()


def _unsqueeze(call: Call) -> Kind:
    rank, dim = call.rank(call.samples()), call.arg(1, "dim")
    require(isinstance(dim, int) and dim % (rank + 1) != 0)
    return call.result()


def _reshape(call: Call) -> Kind:
    """Keep the number of samples in front; -1 is, as the dry run's shapes show."""
    call.samples()
    first, *others = call.dims(1, "shape")
    require(all(call.kind(other) is Kind.CONSTANT for other in others))
    is_rest = isinstance(first, int) and first == -1
    require(is_rest or (isinstance(first, fx.Node) and call.kind(first) is Kind.COUNT))
    return call.result()


def _expand(call: Call) -> Kind:
    """Repeat along other dimensions, or a constant once for each sample."""
    source = call.args[0]
    first, *others = call.dims(1, "size")
    require(all(call.kind(other) is Kind.CONSTANT for other in others))
    is_count = isinstance(first, fx.Node) and call.kind(first) is Kind.COUNT
    if call.kind(source) is Kind.SAMPLES:
        require(len(others) + 1 == call.rank(source) and (is_count or first == -1))
    else:
        rank = call.rank(source)
        is_single = rank <= len(others) or call.value(source).shape[0] == 1
        require(call.kind(source) is Kind.CONSTANT and is_count and is_single)
    return call.result()


def _joined(call: Call) -> Kind:
    """Put tensors side by side within each sample."""
    tensors, dim = call.arg(0, "tensors"), call.arg(1, "dim", 0)
    require(isinstance(tensors, list | tuple) and isinstance(dim, int))
    require(all(call.kind(tensor) is Kind.SAMPLES for tensor in tensors))
    require(len({call.rank(tensor) for tensor in tensors}) == 1)
    require(dim % call.rank(call.node) != 0)
    return call.result()


def _matmul(call: Call) -> Kind:
    left, right = call.arg(0, "input"), call.arg(1, "other")
    kinds = call.kind(left), call.kind(right)
    ranks = call.rank(left), call.rank(right)
    if kinds == (Kind.SAMPLES, Kind.CONSTANT):
        require(ranks[0] >= 2 and ranks[1] <= 2)  # noqa: PLR2004 - a matrix at most
    else:
        require(kinds == (Kind.SAMPLES, Kind.SAMPLES))
        require(ranks[0] == ranks[1] >= 3)  # noqa: PLR2004 - a matrix for each sample
    return call.result()


def _attention(call: Call) -> Kind:
    tensors, rest = call.args[:3], call.args[3:]
    require(len(tensors) == 3 and not rest)  # noqa: PLR2004 - query, key, value
    require(all(call.kind(tensor) is Kind.SAMPLES for tensor in tensors))
    ranks = {call.rank(tensor) for tensor in tensors}
    require(len(ranks) == 1 and min(ranks) >= 3)  # noqa: PLR2004 - (sample, place, ...)
    require(call.kwargs.get("attn_mask") is None)
    require(set(map(call.kind, call.kwargs.values())) <= {Kind.CONSTANT})
    return call.result()


def _shape_norm(call: Call) -> Kind:
    rank = call.rank(call.samples())
    call.rest_is_constant()
    require(len(call.dims(1, "normalized_shape")) < rank)
    return call.result()


def _pad(call: Call) -> Kind:
    rank = call.rank(call.samples())
    call.rest_is_constant()
    require(len(call.dims(1, "pad")) // 2 < rank)
    return call.result()


def _size(call: Call) -> Kind:
    rank, dim = call.rank(call.samples()), call.arg(1, "dim")
    if dim is None:
        return Kind.SHAPE
    require(isinstance(dim, int))
    return Kind.CONSTANT if dim % rank else Kind.COUNT


def _getattr(call: Call) -> Kind:
    call.samples()
    name = call.args[1]
    require(name in ("shape", "ndim", "dtype", "device"))
    return Kind.SHAPE if name == "shape" else Kind.CONSTANT


def _rank(call: Call) -> Kind:
    call.samples()
    return Kind.CONSTANT


def _getitem(call: Call) -> Kind:
    source, index = call.args
    kind = call.kind(source)
    if kind is Kind.SEVERAL:
        require(isinstance(index, int))
        return Kind.CONSTANT if call.value(call.node) is None else call.result()
    if kind is Kind.SHAPE:
        return _of_shape(index, len(call.value(source)))
    require(kind is Kind.SAMPLES and isinstance(index, tuple))
    first, *others = index
    require(first == slice(None) and call.kind(tuple(others)) is Kind.CONSTANT)
    require(all(o is None or isinstance(o, int | slice) for o in others))
    return call.result()


def _of_shape(index: Any, rank: int) -> Kind:
    if isinstance(index, int):
        return Kind.CONSTANT if index % rank else Kind.COUNT
    require(isinstance(index, slice) and index.step is None)
    require(
        all(end is None or isinstance(end, int) for end in (index.start, index.stop))
    )
    return Kind.CONSTANT if (index.start or 0) % rank else Kind.SHAPE


def _table() -> dict[Any, Rule]:
    """Join the rules: methods by name, functions by themselves."""
    table: dict[Any, Rule] = {}
    for names, rule in _RULES.items():
        for name in names.split():
            table[name] = rule
            for home in (torch, functional, operator):
                function = getattr(home, name, None)
                if callable(function):
                    table[function] = rule
    return {**table, getattr: _getattr, math.sqrt: constant_call}


_POINTWISE = (
    "add sub mul truediv neg pow abs iadd isub imul itruediv add_ sub_ mul_ div_ div "
    "true_divide exp log sqrt rsqrt reciprocal square sin cos erf tanh sigmoid relu "
    "relu_ relu6 clamp where maximum minimum gelu silu leaky_relu elu hardswish "
    "hardtanh hardsigmoid mish softplus logsigmoid selu celu dropout dropout1d "
    "dropout2d dropout3d contiguous clone float double half masked_fill"
)
_RULES: dict[str, Rule] = {
    _POINTWISE: _pointwise,
    "linear": _per_sample(least=2),
    "conv1d conv_transpose1d max_pool1d avg_pool1d adaptive_avg_pool1d": _per_sample(3),
    "conv2d conv_transpose2d max_pool2d avg_pool2d adaptive_avg_pool2d "
    "adaptive_max_pool2d": _per_sample(4),
    "conv3d conv_transpose3d max_pool3d avg_pool3d adaptive_avg_pool3d": _per_sample(5),
    "group_norm": _per_sample(least=2),
    "interpolate": _per_sample(least=3),
    "layer_norm rms_norm": _shape_norm,
    "pad": _pad,
    "softmax log_softmax mean sum amax amin logsumexp select narrow squeeze argmax "
    "cumsum unflatten": _along(1),
    "unbind": _along(1, default=0),
    "chunk split": _along(2, default=0),
    "normalize": _along(2, default=1),
    "flatten": _along(1, "start_dim", 0),
    "transpose swapaxes": _transpose,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "view reshape": _reshape,
    "expand": _expand,
    "cat concat stack": _joined,
    "matmul bmm": _matmul,
    "scaled_dot_product_attention": _attention,
    "size": _size,
    "dim": _rank,
    "getitem": _getitem,
}
CALLS = _table()
"""A rule for each function, and for each method by its name."""
