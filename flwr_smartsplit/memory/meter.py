"""What a step really holds: a meter of live tensor storages.

The meter counts each storage once, from the operator that made or first used it until
its last user is gone. On CPU it agrees with torch's own MemTracker to the byte; under
fake tensors it predicts a real step. On CUDA it counts whole blocks of 512 bytes, as
torch's allocator gives them out. It does not see scratch memory inside an operator.
With a budget it raises right after the operator that exceeded it.
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

ACTIVATIONS = "activations and temporaries"
BATCH = "batch"
BEING_BUILT = "parameters and buffers being built"
BUILDING = "building"
CUDA_BLOCK_BYTES = 512
PARTS = "parts_in_a_dry_run"
"""The attribute in which a fake sparse tensor keeps its parts."""

# Takes a constant, which a dry run replaces: two tensors where a real step has one.
_LIFT = torch.ops.aten.lift_fresh.default
_SEQUENCES = (tuple, list)  # A union type would be built at every use.

_here = threading.local()  # this thread's phase, and how often it is unmetered


class phase:
    """Name what this thread is doing, for a meter's error."""

    __slots__ = ("_before", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        """Begin it."""
        self._before = getattr(_here, "phase", "")
        _here.phase = self._name

    def __exit__(self, *_: object) -> None:
        """Go back to what it was doing before."""
        _here.phase = self._before


@contextmanager
def unmetered() -> Iterator[None]:
    """Count nothing that this thread does inside, such as the work of a local edge."""
    _here.pauses = getattr(_here, "pauses", 0) + 1
    try:
        yield
    finally:
        _here.pauses -= 1


class _Storage(weakref.ref[Any]):
    """A weak reference to a storage that remembers its size."""

    __slots__ = ("born", "key", "num_bytes", "taken_bytes")
    key: int
    num_bytes: int
    taken_bytes: int
    born: int


class MemoryMeter(TorchDispatchMode):
    """Count the bytes of live tensor storages that operators make or use.

    It counts in the threads that enter it. What another thread, a loader or numpy made
    counts from its first use inside. ``budget_bytes`` is the cap; None only measures.
    With a ``device``, the memory of other devices does not count.
    """

    def __init__(
        self,
        budget_bytes: int | None = None,
        *,
        name: str = "",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.budget_bytes = budget_bytes
        self.device = device
        self.name = name
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, _Storage] = {}
        self._owners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._batch: set[int] = set()
        # Storages die in any thread, also while this one holds the lock.
        self._lock = threading.RLock()
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
        """Count what exists already: modules, optimizers, tensors, nested batches."""
        for thing in things:
            is_owner = isinstance(thing, nn.Module | Optimizer)
            if is_owner:
                self._owners.add(thing)
            for _, tensor in _tensors_in(thing):
                self._see(tensor)
                if not is_owner:
                    self._batch.update(self._storages.keys() & _keys_of(tensor))
        self._check("track")

    def forget(self, *things: Any) -> None:
        """Stop counting what outlives the step, such as a batch that a loader keeps."""
        for thing in things:
            for _, tensor in _tensors_in(thing):
                for key in _keys_of(tensor):
                    known = self._storages.get(key)
                    if known is not None:
                        self._lose(known)

    def bytes_by_kind(self) -> dict[str, int]:
        """Split the live bytes by what they are for."""
        is_building = getattr(_here, "phase", "") == BUILDING
        unnamed = BEING_BUILT if is_building else ACTIVATIONS
        kinds = dict.fromkeys(list(self._batch), BATCH)
        for owner in list(self._owners):
            for kind, tensor in _tensors_in(owner):
                kinds |= dict.fromkeys(_keys_of(tensor), kind)
        totals: dict[str, int] = {}
        for key, storage in list(self._storages.items()):
            kind = kinds.get(key, unnamed)
            totals[kind] = totals.get(kind, 0) + storage.taken_bytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator, count what it used and returned, and check the cap."""
        kwargs = kwargs or {}
        if getattr(_here, "pauses", 0):
            return func(*args, **kwargs)
        before = self.live_bytes
        if func is not _LIFT:
            self._see_all(args)
            if kwargs:
                self._see_all(kwargs.values())
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, _SEQUENCES):
            self._see_all(result)
        if self.live_bytes > before:
            self._check(func)
        return result

    def _see_all(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._see(value)
            elif isinstance(value, _SEQUENCES):
                self._see_all(value)

    def _see(self, tensor: Tensor) -> None:
        """Count a tensor unless it is known. Most are: this path must be fast."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:
            for part in parts_of(tensor):
                self._see(part)
            return
        key, num_bytes = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None and known.num_bytes == num_bytes:
            return
        if tensor.is_meta or tensor.layout is not torch.strided:
            return  # It has a size, but no memory of its own.
        if self.device is not None and tensor.device != self.device:
            return
        with self._lock:
            known = self._storages.get(key)
            if known is None:
                known = self._storages[key] = _Storage(storage, self._on_death)
                known.key, known.num_bytes, known.taken_bytes = key, 0, 0
                self._made(known)
            # The size is kept unrounded: it is compared at each use.
            self._change(known, _taken(tensor, num_bytes) - known.taken_bytes)
            known.num_bytes, known.taken_bytes = num_bytes, _taken(tensor, num_bytes)

    def _lose(self, storage: _Storage) -> None:
        with self._lock:
            if self._storages.get(storage.key) is storage:
                del self._storages[storage.key]
                self._batch.discard(storage.key)
                self._change(storage, -storage.taken_bytes)

    def _made(self, storage: _Storage) -> None:
        """Note a new storage; a log numbers it."""

    def _change(self, storage: _Storage, num_bytes: int) -> None:
        """Count what a storage grew or shrank by; a log records it."""
        del storage
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _check(self, operator: Any) -> None:
        live, budget = self.live_bytes, self.budget_bytes
        if budget is None or live <= budget:
            return
        kinds = self.bytes_by_kind()
        during = getattr(_here, "phase", "")
        parts = ", ".join(f"{kind} {bytes_text(n)}" for kind, n in kinds.items())
        raise MemoryCapExceeded(
            f"{self.name or 'this step'}: {operator}"
            f"{f' in {during}' if during else ''} brings live tensors to "
            f"{bytes_text(live)}, {bytes_text(live - budget)} over the cap of "
            f"{bytes_text(budget)} ({parts}). Cut earlier, lower the batch size, or "
            "raise the budget.",
            client=self.name,
            operator=str(operator),
            phase=during,
            live_bytes=live,
            budget_bytes=budget,
            bytes_by_kind=kinds,
        )


def _death_notice(meter: "weakref.ref[MemoryMeter]") -> Any:
    """Make the callback that removes a freed storage from its meter."""

    def forget(storage: _Storage) -> None:
        owner = meter()
        if owner is not None:
            owner._lose(storage)

    return forget


def _tensors_in(thing: Any) -> Iterator[tuple[str, Tensor]]:
    """Find the tensors of a module (with gradients), an optimizer or a batch."""
    if isinstance(thing, nn.Module):
        for parameter in thing.parameters():
            yield "parameters", parameter
            if parameter.grad is not None:
                yield "gradients", parameter.grad
        for buffer in thing.buffers():
            yield "buffers", buffer
    elif isinstance(thing, Optimizer):
        for _, tensor in _tensors_in(list(thing.state.values())):
            yield "optimizer state", tensor
    else:
        for leaf in tree_leaves(thing):
            if isinstance(leaf, Tensor):
                yield BATCH, leaf


def _taken(tensor: Tensor, num_bytes: int) -> int:
    """Size of what the allocator takes for a storage."""
    if not tensor.is_cuda:
        return num_bytes
    return -(-num_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES


def parts_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that a sparse one is made of; other layouts hide theirs."""
    kept: tuple[Tensor, ...] | None = getattr(tensor, PARTS, None)
    if kept is not None:
        return kept
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in {torch.sparse_csc, torch.sparse_bsc}:
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()


def _keys_of(tensor: Tensor) -> set[int]:
    try:
        return {tensor.untyped_storage()._cdata}
    except NotImplementedError:
        return {key for part in parts_of(tensor) for key in _keys_of(part)}
