"""What a run under fake tensors computes, as expressions that can be compared.

Every storage has a number, which stands for how its content was computed: by which
operator, with which numbers, from which other contents. Two runs that share a ``Table``
give the same number where they compute the same bits. Constants are computed for real,
so that one that was made while tracing is the same as one that is made in ``forward``.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

Table = dict[Any, int]
"""The number of each expression."""


@dataclass(frozen=True)
class Start:
    """Where a call begins: what its inputs hold, and how many numbers were drawn."""

    inputs: Mapping[int, int | None]
    num_draws: int


STATISTICS = ("running_mean", "running_var")
"""Arguments that a BatchNorm writes, though its schema does not say so."""


class Expressions(TorchDispatchMode):
    """Number what operators compute; use it inside a mode for fake tensors."""

    def __init__(self, table: Table) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, int] = {}
        self._table = table
        self._constants: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []  # Else a storage's address is used again
        self._num_draws = 0
        self._drawn: dict[int, list[int]] = {}

    # --- what is known beforehand -----------------------------------------------------

    def name(self, tensors: Mapping[str, Tensor]) -> None:
        """Give tensors numbers by their names."""
        for name, tensor in tensors.items():
            for key in _keys(tensor):
                self.storages.setdefault(key, self._number(("named", name)))
            self._alive.append(tensor)

    def know(self, fake: Tensor, real: Tensor) -> None:
        """Give a tensor a number by its content."""
        if fake.layout is torch.strided and not real.is_meta:
            self._hold(fake, real)

    # --- results ----------------------------------------------------------------------

    def start(self, inputs: Any) -> Start:
        """Note where a call with these inputs begins."""
        tensors = (x for x in tree_leaves(inputs) if isinstance(x, Tensor))
        keys = {key for tensor in tensors for key in _keys(tensor)}
        return Start({key: self.storages.get(key) for key in keys}, self._num_draws)

    @contextmanager
    def again(self, start: Start) -> Iterator[None]:
        """Begin a call again, with the same inputs and the same stream of numbers."""
        end = dict(self.storages), dict(self._constants), self._num_draws
        for key, number in start.inputs.items():
            if number is not None:
                self.storages[key] = number
        self._num_draws = start.num_draws
        try:
            yield
        finally:
            self.storages, self._constants, self._num_draws = end

    def copy_of(self, tensor: Tensor, start: Start) -> Tensor:
        """Copy a tensor as it was where a call began."""
        copied = tensor.clone()
        number = start.inputs.get(_key(tensor))
        if number is not None:
            self.storages[_key(copied)] = number
        return copied

    def of(self, value: Any) -> Any:
        """Return numbers in place of the tensors of a value."""
        leaves = tree_leaves(value)
        return tuple(self._described(leaf) for leaf in leaves)

    # --- operators --------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and number what it returns and writes."""
        kwargs = kwargs or {}
        given = dict(_by_name(func, args, kwargs))
        written, expression = self._expression(func, given)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        real = self._computed(func, (args, kwargs), tensors, written=written)
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._alive += [*tensors, *outputs]
        entered = {key for tensor in tensors for key in _keys(tensor)}
        for index, (tensor, before) in enumerate(written):
            self._write(tensor, (expression, index, *before))
        for index, output in enumerate(outputs):
            for key in _keys(output) - entered:
                self.storages[key] = self._number((expression, index))
        if real is None:
            for tensor, _ in written:
                self._constants.pop(_key(tensor), None)
        elif func.overloadpacket not in _UNFILLED:
            values = [x for x in tree_leaves(real) if isinstance(x, Tensor)]
            for fake, value in (
                *((tensor, self._constants[_key(tensor)]) for tensor, _ in written),
                *zip(outputs, values, strict=False),
            ):
                self._hold(fake, value)
        return result

    def _expression(
        self, func: Any, given: dict[str, Any]
    ) -> tuple[list[tuple[Tensor, tuple[Any, ...]]], Any]:
        """Describe a call; list what it writes, and what statistics were before."""
        updated: list[tuple[Tensor, tuple[Any, ...]]] = []
        if given.get("training") and STATISTICS[0] in given:
            # What it returns does not depend on the statistics that it only updates.
            statistics = [given.pop(name) for name in STATISTICS]
            if given.pop("momentum", None) != 0:
                updated = [(x, self._tensor(x)) for x in statistics if x is not None]
        written = [
            (value, ())
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in tree_leaves(given.get(argument.name))
            if isinstance(value, Tensor)
        ]
        written += updated
        described = [
            (name, self._described_all(value))
            for name, value in given.items()
            if value is not None and value is not False
        ]
        draw = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            draw, self._num_draws = self._num_draws, self._num_draws + 1
        name = func.overloadpacket.__name__.rstrip("_")
        return written, (name, func._overloadname, tuple(described), draw)

    def _described_all(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(self._described_all, value))
        return self._described(value)

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.Generator):
            drawn = self._drawn.setdefault(id(value), [len(self._drawn), 0])
            drawn[1] += 1  # Its next numbers are others.
            return "generator", *drawn
        return type(value).__name__, repr(value)

    def _tensor(self, tensor: Tensor) -> tuple[Any, ...]:
        keys = sorted(_keys(tensor))
        numbers = tuple(self._known(key, tensor) for key in keys)
        place: tuple[Any, ...] = ()
        if tensor.layout is torch.strided:
            place = tensor.storage_offset(), tensor.stride()
        role = tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad
        return numbers, place, role

    def _known(self, key: int, tensor: Tensor) -> int:
        if key not in self.storages:
            self._alive.append(tensor)
            self.storages[key] = self._number(("unknown", len(self.storages)))
            if type(tensor) in (Tensor, nn.Parameter):
                self.know(tensor, tensor)
        return self.storages[key]

    def _number(self, expression: Any) -> int:
        return self._table.setdefault(expression, len(self._table))

    def _write(self, tensor: Tensor, expression: Any) -> None:
        for key in _keys(tensor):
            before = self.storages.get(key)
            if tensor.layout is torch.strided and _covers(tensor):
                self.storages[key] = self._number(expression)
            else:
                place = self._tensor(tensor)[1:]
                self.storages[key] = self._number((before, expression, place))

    # --- constants --------------------------------------------------------------------

    def _hold(self, fake: Tensor, real: Tensor) -> None:
        """Give a tensor's storage a number by its content."""
        with _disable_current_modes():
            content = torch.empty(0, dtype=torch.uint8)
            content.set_(real.detach().untyped_storage())
            digest = hashlib.sha256(content.numpy().data).hexdigest()
        key = _key(fake)
        self._alive.append(fake)
        self._constants[key] = real
        self.storages[key] = self._number(("constant", digest))

    def _computed(
        self,
        func: Any,
        given: tuple[Any, Any],
        tensors: Iterable[Tensor],
        *,
        written: Iterable[tuple[Tensor, Any]],
    ) -> Any:
        """Compute an operator on constants for real; None if something is not one.

        It writes into copies: the constants are the model's own, or the user's.
        """
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None
        if func.overloadpacket is torch.ops.aten.lift_fresh:
            constant = given[0][0]
            if not _is_fake(constant):
                with _disable_current_modes():
                    return constant.clone()
        if any(_key(tensor) not in self._constants for tensor in tensors):
            return None
        for key in {_key(tensor) for tensor, _ in written}:
            self._constants[key] = _copy_of_storage(self._constants[key])

        def real(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            base = self._constants[_key(value)].detach()
            view = torch.empty(0, dtype=value.dtype)
            return view.set_(
                base.untyped_storage(),
                value.storage_offset(),
                value.shape,
                value.stride(),
            )

        with _disable_current_modes(), torch.no_grad():
            args, kwargs = tree_map(real, given)
            return func(*args, **kwargs)


_UNFILLED = (
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
)


def _by_name(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        yield argument.name, value
    yield from kwargs.items()


def _keys(tensor: Tensor) -> set[int]:
    if tensor.layout is torch.strided:
        return {tensor.untyped_storage()._cdata}
    return {id(tensor)}


def _key(tensor: Tensor) -> int:
    return next(iter(_keys(tensor)))


def _covers(tensor: Tensor) -> bool:
    size = tensor.numel() * tensor.element_size()
    return tensor.untyped_storage().nbytes() == size


def _copy_of_storage(tensor: Tensor) -> Tensor:
    with _disable_current_modes():
        copied = torch.empty(0, dtype=torch.uint8)
        return copied.set_(tensor.detach().untyped_storage().clone())


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor)
