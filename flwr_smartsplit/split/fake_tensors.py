"""Dry runs: tensors that have sizes but no memory, for costs and cuts."""

import copy
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from flwr_smartsplit.split.layout import is_dense
from flwr_smartsplit.split.sparse_fakes import is_sparse_fake, keep_parts, part_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Operators whose first result has another layout under fake tensors: the CPU's kernels
# make it contiguous, or in the memory format of an input: here with its position.
_aten = torch.ops.aten
_PACKED = {_aten.log_sigmoid_forward.default, _aten.rrelu_with_noise.default}
_SUGGESTED = {
    _aten.channel_shuffle.default: 0,
    _aten.native_batch_norm.default: 0,
    _aten.native_group_norm.default: 0,
    _aten.native_group_norm_backward.default: 0,
    _aten.reflection_pad2d.default: 0,
    _aten.reflection_pad2d_backward.default: 1,
    _aten.reflection_pad3d.default: 0,
    _aten.reflection_pad3d_backward.default: 1,
    _aten.replication_pad2d.default: 0,
    _aten.replication_pad2d_backward.default: 1,
    _aten.replication_pad3d.default: 0,
    _aten.replication_pad3d_backward.default: 1,
}


# Operators whose CPU kernels make the result in a storage that may be larger: as large
# as the first input, or for losses that take a mean, as large as all terms.
_LIKE_INPUT = {_aten.im2col.default, _aten.col2im.default}
_LIKE_TERMS = {
    _aten.binary_cross_entropy.default,
    _aten.mse_loss.default,
    _aten.smooth_l1_loss.default,
}


def _storage_numel(func: Any, args: Any, result: Tensor) -> int:
    """Count the values for which an operator's result has room."""
    if func in _LIKE_INPUT:
        return int(max(result.numel(), args[0].numel()))
    if func in _LIKE_TERMS:
        shapes = (tensor.shape for tensor in args[:2])
        return int(max(result.numel(), math.prod(torch.broadcast_shapes(*shapes))))
    return result.numel()


def _with_room(tensor: Tensor, numel: int) -> Tensor:
    """Make a tensor anew, at the start of a storage for so many values."""
    room = tensor.new_empty(numel)
    return room.as_strided(tensor.shape, tensor.stride())


# Their kernels shrink lists of indices that they have made one longer.
_BAGS = {
    _aten._embedding_bag.default,
    _aten._embedding_bag_forward_only.default,
}
_LAST_OFFSET = 7  # The position of include_last_offset among their arguments.


def _with_room_for_last(args: Any, kwargs: Any, result: Any) -> Any:
    """Return what a bag returns, with the room that its lists have."""
    values, bags, sizes, places = result
    if bags.numel():
        bags = _with_room(bags, bags.numel() + 1)
    has_last = args[_LAST_OFFSET] if len(args) > _LAST_OFFSET else False
    if kwargs.get("include_last_offset", has_last):
        sizes = _with_room(sizes, sizes.numel() + 1)
    return values, bags, sizes, places


_MASKED = {
    _aten.native_batch_norm_backward.default,
    _aten.convolution_backward.default,
}
# These kernels compute a weight's gradient with its bias's; that of transposed
# convolutions has no name.
_COMPUTE = {"Mkldnn", "???"}


def _as_asked(func: Any, args: Any, result: Any, mode: FakeTensorMode) -> Any:
    """Return the gradients that the CPU's kernels compute for a mask of those needed.

    Batch norm leaves its input's out, where fakes have it; most convolutions compute
    their weight's with their bias's, where fakes leave it out.
    """
    first, second, third = result
    if func is _aten.native_batch_norm_backward.default:
        *_, mask = args
        return (first if mask[0] else None), second, third
    _, inputs, weight, bias_sizes, *how, mask = args
    if mask[2] and not mask[1] and _kernel(inputs, weight, bias_sizes, how) in _COMPUTE:
        with mode:
            second = torch.empty_like(weight)
    return first, second, third


def _kernel(inputs: Tensor, weight: Tensor, bias_sizes: Any, how: list[Any]) -> str:
    """Name the CPU's kernel for a convolution."""
    with _disable_current_modes():  # It depends on sizes only.
        inputs, weight = (
            torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            for tensor in (inputs, weight)
        )
        kernel = torch._C._select_conv_backend(inputs, weight, None, *how, bias_sizes)
    return str(kernel.name)


class DryRun(FakeTensorMode):
    """Fake tensors with the layout that the CPU's kernels give them.

    The layout decides which later operators copy, and so what a step allocates.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and correct its first result's layout where torch errs."""
        part = part_of(func, args)
        if part is not None:
            return part
        result: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _MASKED:
            result = _as_asked(func, args, result, self)
        elif is_sparse_fake(result):
            with self:
                keep_parts(func, args, result)
        if func in _LIKE_INPUT or func in _LIKE_TERMS:
            with self:
                return _with_room(result, _storage_numel(func, args, result))
        if func in _BAGS:
            with self:
                return _with_room_for_last(args, kwargs or {}, result)
        if func in _SUGGESTED:
            layout = suggest_memory_format(args[_SUGGESTED[func]])
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


class StandIns(TorchDispatchMode):
    """Show a dry run fakes of the real tensors that user code holds.

    A loss may hold class weights, an optimizer its learning rate: as an argument, an
    attribute, a global or in a closure. The fakes take the place of their storages, so
    that a meter below counts each once. Single numbers keep their value.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._bases: dict[int, tuple[Tensor, Tensor]] = {}  # Real and fake, by storage.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator on fakes only."""
        if func is not _aten.lift_fresh.default:  # It makes a constant a fake itself.
            args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self._bases:
            is_number = storage.nbytes() == tensor.element_size()
            with _disable_current_modes():
                values = tensor.tolist() if is_number else None
            with self._mode:
                fake = (
                    torch.tensor(values, dtype=tensor.dtype)
                    if is_number
                    else torch.empty(storage.nbytes(), dtype=torch.uint8)
                )
            self._bases[storage._cdata] = tensor, fake
        _, base = self._bases[storage._cdata]
        if base.dtype == tensor.dtype and base.shape == tensor.shape:
            return base
        place = tensor.shape, tensor.stride(), tensor.storage_offset()
        with self._mode:
            return base.view(tensor.dtype).as_strided(*place)


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
    """Ignore the warnings of what the user did not write, even where they are errors.

    A dry run's: the real step gives its own. Torch's, of how its settings are read.
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


def fake_copy(
    segment: ModuleT, mode: FakeTensorMode, *, beside: nn.Module | None = None
) -> ModuleT:
    """Copy a module with fake tensors in place of its own; allocates nothing.

    The copy shares its parameters with ``beside``, another fake copy.
    """
    shared = dict(beside.named_parameters(remove_duplicate=False)) if beside else {}
    fakes: dict[int, Any] = {
        id(parameter): shared[name]
        for name, parameter in segment.named_parameters(remove_duplicate=False)
        if name in shared
    }
    for module in segment.modules():
        for values in (module._parameters, module._buffers, module.__dict__):
            for value in values.values():
                if isinstance(value, Tensor) and id(value) not in fakes:
                    fakes[id(value)] = fake_like(value, mode)
    return copy.deepcopy(segment, fakes)


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
    with mode:
        return tree_map_only(Tensor, partial(_fake_rows, batch_size), batch)


def fake_targets(
    targets: Any, inputs: Any, mode: FakeTensorMode, *, batch_size: int
) -> Any:
    """Make fake targets of ``batch_size`` examples, nested like ``targets``."""
    rows = rows_of_targets(targets, inputs, batch_size=batch_size)
    counts = iter(rows)
    with mode:
        return tree_map_only(Tensor, lambda x: _fake_rows(next(counts), x), targets)


def rows_of_targets(targets: Any, inputs: Any, *, batch_size: int) -> list[int]:
    """Count the rows of each tensor of the targets in a batch of other size.

    Where the tensors of an example differ in length, as the joined labels of CTC, they
    grow with the batch: by the number of examples in the inputs.
    """
    lengths = [
        len(x) for x in tree_leaves(targets) if isinstance(x, Tensor) and x.dim()
    ]
    inputs = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    examples = len(inputs[0]) if inputs else 0
    is_uneven = len(set(lengths)) > 1 and examples in lengths
    return [
        -(-len(x) * batch_size // examples) if is_uneven and x.dim() else batch_size
        for x in tree_leaves(targets)
        if isinstance(x, Tensor)
    ]


def _fake_rows(num_rows: int, tensor: Tensor) -> Tensor:
    if not tensor.dim():
        return torch.empty((), dtype=tensor.dtype)
    shape, strides = tensor.shape[1:], tensor.stride()[1:]
    if not is_dense(shape, strides):
        return torch.empty((num_rows, *shape), dtype=tensor.dtype)
    sizes, steps = (num_rows, *shape), (math.prod(shape), *strides)
    return torch.empty_strided(sizes, steps, dtype=tensor.dtype)
