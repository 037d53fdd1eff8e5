"""What a step really holds: a meter of live tensor storages, and a hard limit.

The meter counts each storage once, from the operator that made it until its last
user is gone, and raises right after the operator that crossed the cap. On CPU it
agrees with torch's own MemTracker to the byte; under fake tensors it predicts a
real step. It does not see scratch memory inside an operator.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.errors import MemoryCapExceeded, bytes_text

_pauses = threading.local()


class _Storage(weakref.ref[Any]):
    """A weak reference to a storage that remembers how large it was."""

    __slots__ = ("key", "num_bytes")
    key: int
    num_bytes: int


class MemoryMeter(TorchDispatchMode):
    """Count the bytes of live tensor storages that this thread makes.

    Parameters
    ----------
    budget_bytes : int, optional
        The cap; None only measures.
    name : str
        Whose memory it is, for the error.

    Attributes
    ----------
    live_bytes, peak_bytes : int
        What is alive now, and the most that was alive so far.
    """

    def __init__(self, budget_bytes: int | None = None, *, name: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.budget_bytes = budget_bytes
        self.name = name
        self.live_bytes = 0
        self.peak_bytes = 0
        self._alarm_bytes = 0
        self._storages: dict[int, _Storage] = {}
        self._on_death = _death_notice(weakref.ref(self))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch's default wrapper costs 2 us per operator and only serves dynamo.
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled regions stay compiled."""
        return True

    def track(self, *things: Any) -> None:
        """Count what exists already: modules, optimizers, tensors, nested batches.

        Raises
        ------
        MemoryCapExceeded
            If what exists already is more than the cap.
        """
        for thing in things:
            for tensor in _tensors_in(thing):
                self._see(tensor)
        self._check("track")

    def forget(self, *things: Any) -> None:
        """Stop counting what stays alive but is not the step's, such as a batch.

        A loader that keeps its batches would otherwise seem to fill the memory.
        """
        for thing in things:
            for tensor in _tensors_in(thing):
                known = self._storages.pop(tensor.untyped_storage()._cdata, None)
                if known is not None:
                    self.live_bytes -= known.num_bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator, count what it returned, and compare with the cap."""
        result = func(*args, **(kwargs or {}))
        if getattr(_pauses, "depth", 0):
            return result
        before = self.live_bytes
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, tuple | list):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        if self.live_bytes > max(before, self._alarm_bytes):
            self._check(func)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor.is_meta:
            return  # It has a size, but no memory.
        if tensor.layout is torch.sparse_coo:
            self._see(tensor._indices())
            self._see(tensor._values())
        if tensor.layout is not torch.strided:
            return  # Other layouts do not show their storages.
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None:
            self.live_bytes += num_bytes - known.num_bytes
            known.num_bytes = num_bytes
            return
        reference = _Storage(storage, self._on_death)
        reference.key, reference.num_bytes = key, num_bytes
        self._storages[key] = reference
        self.live_bytes += num_bytes

    def _check(self, operator: Any) -> None:
        live, budget = self.live_bytes, self.budget_bytes
        self.peak_bytes = max(self.peak_bytes, live)
        self._alarm_bytes = self.peak_bytes
        if budget is None:
            return
        self._alarm_bytes = min(self.peak_bytes, budget)
        if live <= budget:
            return
        raise MemoryCapExceeded(
            f"{self.name or 'this step'}: {operator} brings live tensors to "
            f"{bytes_text(live)}, {bytes_text(live - budget)} over the cap of "
            f"{bytes_text(budget)}. Cut earlier, lower the batch size, or raise the "
            "budget.",
            live_bytes=live,
            budget_bytes=budget,
            operator=str(operator),
        )


def _death_notice(meter: "weakref.ref[MemoryMeter]") -> Any:
    """Make the callback that takes a dead storage off its meter."""

    def forget(storage: _Storage) -> None:
        owner = meter()
        if owner is not None and owner._storages.get(storage.key) is storage:
            del owner._storages[storage.key]
            owner.live_bytes -= storage.num_bytes

    return forget


def _tensors_in(thing: Any) -> Iterator[Tensor]:
    """Find the tensors of a module (with gradients), an optimizer or a batch."""
    if isinstance(thing, nn.Module):
        for parameter in thing.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from thing.buffers()
    elif isinstance(thing, Optimizer):
        yield from _tensors_in(list(thing.state.values()))
    else:
        for leaf in tree_leaves(thing):
            if isinstance(leaf, Tensor):
                yield leaf


@contextmanager
def unmetered() -> Iterator[None]:
    """Leave what this thread does inside to nobody's account.

    An edge in the device's own process and thread must not count against the
    device.
    """
    _pauses.depth = getattr(_pauses, "depth", 0) + 1
    try:
        yield
    finally:
        _pauses.depth -= 1


@contextmanager
def memory_cap(budget_bytes: int | None, *, name: str = "") -> Iterator[MemoryMeter]:
    """Raise as soon as live tensors made inside take more than ``budget_bytes``.

    The error comes from Python, right after the operator that crossed the cap and
    before the system acts: a worker that the system kills takes others with it.

    Parameters
    ----------
    budget_bytes : int or None
        The cap; None only measures.
    name : str
        Whose memory it is, for the error.

    Yields
    ------
    MemoryMeter
        ``track()`` what exists already; read ``peak_bytes`` at any time.

    Raises
    ------
    MemoryCapExceeded
        With live bytes, cap and operator.

    Examples
    --------
    >>> import torch
    >>> with memory_cap(5_000) as meter:
    ...     values = torch.zeros(1_000)
    >>> meter.peak_bytes
    4000
    """
    if budget_bytes is not None and budget_bytes < 0:
        raise ValueError(
            f"budget_bytes is {budget_bytes}: give bytes of at least 0, or None."
        )
    with MemoryMeter(budget_bytes, name=name) as meter:
        yield meter
