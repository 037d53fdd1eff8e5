"""What is understood of torch's operations: how they treat channels, along axis 1.

Types are compared exactly: a subclass may do anything.
"""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from flwr_smartsplit.split.trace.conditions import check_answer

F: Any = functional

CONVOLUTIONS = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
INSTANCE_NORMS = {nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d}
NORMS = BATCH_NORMS | INSTANCE_NORMS | {nn.GroupNorm}
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")

_EACH_MODULES = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh),
    *(nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
}
_SPATIAL_MODULES: dict[type, int] = {
    kind: rank + 2
    for rank, kinds in {
        1: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
        2: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
        3: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
    }.items()
    for kind in kinds
} | {nn.ZeroPad2d: 4, nn.ReflectionPad2d: 4, nn.ReplicationPad2d: 4}

EACH: set[Any] = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus),
    *(F.dropout, F.dropout2d, torch.relu, torch.sigmoid, torch.tanh, torch.clamp),
    *(torch.abs, torch.neg, torch.exp, torch.square, torch.sqrt, operator.neg),
    *("relu", "relu_", "sigmoid", "tanh", "clamp", "abs", "neg", "square", "sqrt"),
    *("contiguous", "clone", "detach", "float"),
}
"""They do the same to every value."""

BINARY: set[Any] = {
    *(operator.add, operator.sub, operator.mul, operator.truediv),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(torch.add, torch.sub, torch.mul, torch.div),
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "expand_as"),
}
"""They do the same to every pair of values, or to a value and a number."""

SPATIAL: dict[Any, int | None] = {
    F.max_pool1d: 3,
    F.avg_pool1d: 3,
    F.adaptive_avg_pool1d: 3,
    F.max_pool2d: 4,
    torch.max_pool2d: 4,
    F.avg_pool2d: 4,
    F.adaptive_avg_pool2d: 4,
    F.adaptive_max_pool2d: 4,
    F.max_pool3d: 5,
    F.avg_pool3d: 5,
    F.adaptive_avg_pool3d: 5,
    F.interpolate: None,
}
"""They work within each channel; the number of axes that they take, if it is fixed."""

_FLATTEN = {torch.flatten, "flatten"}
_VIEW = {torch.reshape, "reshape", "view"}
_MEAN = {torch.mean, "mean"}
_HARMLESS_ATTRIBUTES = {"dtype", "device", "ndim", "requires_grad", "is_cuda"}


def num_spatial(kind: type) -> int:
    """Count the axes that a convolution slides along."""
    return int(kind.__name__[-2])


def has_hooks(module: nn.Module) -> bool:
    """Say whether something else happens when a module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def normalises(module: nn.Module, rank: int) -> bool:
    """Say whether a module normalises its channels, each alone or in groups.

    One without any value for each channel could not be told that there are fewer.
    """
    kind = type(module)
    weight, mean = (getattr(module, n, None) for n in ("weight", "running_mean"))
    if weight is None and (mean is None or kind is nn.GroupNorm):
        return False
    if kind is nn.GroupNorm or kind in BATCH_NORMS:
        return rank >= 2  # noqa: PLR2004 - batch, channels
    return kind in INSTANCE_NORMS and rank == num_spatial(kind) + 2


def is_each(module: nn.Module, rank: int) -> bool:
    """Say whether a module works on every value, or within each channel."""
    kind = type(module)
    if kind is nn.PReLU:
        return getattr(module, "num_parameters", 0) == 1
    if kind in _EACH_MODULES:
        return True
    if kind is nn.Upsample:
        return rank >= 3  # noqa: PLR2004 - batch, channels, at least one more
    return _SPATIAL_MODULES.get(kind) == rank


def flattens(module: nn.Module) -> bool:
    """Say whether a module flattens all but the batch."""
    if type(module) is not nn.Flatten:
        return False
    return bool((module.start_dim, module.end_dim) == (1, -1))


def flattens_all(node: fx.Node, rank: int) -> bool:
    """Say whether a call flattens all but the batch."""
    if node.target not in _FLATTEN:
        return False
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False))
    ends = {"start_dim": 0, "end_dim": -1, **given, **node.kwargs}
    return bool(ends["start_dim"] == 1 and ends["end_dim"] in (-1, rank - 1))


def averages_space(node: fx.Node, rank: int) -> bool:
    """Say whether a call takes means over other axes than batch and channels."""
    if node.target not in _MEAN:
        return False
    over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = [over] if isinstance(over, int) else over
    if not isinstance(axes, list | tuple) or not axes:
        return False
    return all(isinstance(axis, int) and axis % rank > 1 for axis in axes)


def view_sizes(node: fx.Node) -> tuple[Any, ...]:
    """Return the sizes that a call gives a value; none for other calls."""
    if node.target not in _VIEW or node.kwargs:
        return ()
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        return tuple(sizes[0])
    return tuple(sizes)


def asks_shape(node: fx.Node) -> bool:
    """Say whether a call returns a value's whole shape."""
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return node.target == "size" and len(node.args) == 1 and not node.kwargs


def asked_size(node: fx.Node, *, of_shape: bool) -> int | None:
    """Return the axis whose size a call returns; None for other calls."""
    asks = operator.getitem if of_shape else "size"
    index = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return index if node.target == asks and isinstance(index, int) else None


def is_harmless(node: fx.Node) -> bool:
    """Say whether a call tells nothing of sizes."""
    if node.target is getattr:
        return node.args[1] in _HARMLESS_ATTRIBUTES
    if node.target is check_answer:
        return bool(node.args[1] == "len")
    return node.target == "dim"
