"""Dry runs: tensors that have sizes but no memory, for costs and cuts."""

import copy
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from flwr_smartsplit.split.layout import is_dense

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Operators whose first result has another layout under fake tensors: the CPU's kernels
# make it contiguous, or in the memory format of their first input.
_aten = torch.ops.aten
_PACKED = {_aten.log_sigmoid_forward.default, _aten.rrelu_with_noise.default}
_SUGGESTED = {
    _aten.channel_shuffle.default,
    _aten.native_batch_norm.default,
    _aten.native_group_norm.default,
    _aten.native_group_norm_backward.default,
}


class DryRun(FakeTensorMode):
    """Fake tensors with the layout that the CPU's kernels give them.

    The layout decides which later operators copy, and so what a step allocates.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and correct its first result's layout where torch errs."""
        result: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _SUGGESTED:
            layout = suggest_memory_format(args[0])
        elif func in _PACKED:
            layout = torch.contiguous_format
        else:
            return result
        with self:
            if isinstance(result, Tensor):
                return result.contiguous(memory_format=layout)
            first, *others = result
            if first is not None:  # None if backward computes other gradients only.
                first = first.contiguous(memory_format=layout)
            return (first, *others)


class _Filters:
    """Python's list of warning filters, which all threads share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_blocks = 0
        self._before: Any = None

    def ignore(self) -> None:
        """Ignore all warnings until the last open block ends."""
        with self._lock:
            if self._num_blocks == 0:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")
            self._num_blocks += 1

    def restore(self) -> None:
        """Restore the user's filters if this block was the last."""
        with self._lock:
            self._num_blocks -= 1
            if self._num_blocks == 0:
                self._before.__exit__(None, None, None)


_filters = _Filters()


@contextmanager
def warnings_ignored() -> Iterator[None]:
    """Ignore the warnings of a dry run, even where the user makes them errors.

    The real step gives its own.
    """
    _filters.ignore()
    try:
        yield
    finally:
        _filters.restore()


def fake_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Make a fake CPU tensor of the same shape, strides, dtype and role."""
    with mode:
        if tensor.dim() == 0 and not tensor.is_floating_point():
            # A counter needs a value: BatchNorm may divide by it.
            return torch.tensor(0, dtype=tensor.dtype)
        fake = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
        )
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        vars(fake).update(vars(tensor))  # An optimizer_fn may look at its attributes.
    return fake


def fake_copy(segment: ModuleT, mode: FakeTensorMode) -> ModuleT:
    """Copy a module with fake tensors in place of its own; allocates nothing."""
    tensors = [
        value
        for module in segment.modules()
        for values in (module._parameters, module._buffers, module.__dict__)
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    return copy.deepcopy(segment, {id(t): fake_like(t, mode) for t in tensors})


def constants_of(module: nn.Module) -> dict[str, Tensor]:
    """Find the tensors of a module that are neither parameters nor buffers."""
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    }


def fake_batch(batch: Any, mode: FakeTensorMode, *, batch_size: int) -> Any:
    """Make a fake batch of ``batch_size`` examples, nested like ``batch``.

    Dense examples keep their layout: a convolution takes more memory for some layouts.
    """

    def fake(tensor: Tensor) -> Tensor:
        shape, strides = tensor.shape[1:], tensor.stride()[1:]
        if not is_dense(shape, strides):
            return torch.empty((batch_size, *shape), dtype=tensor.dtype)
        sizes, steps = (batch_size, *shape), (math.prod(shape), *strides)
        return torch.empty_strided(sizes, steps, dtype=tensor.dtype)

    with mode:
        return tree_map(fake, batch)
