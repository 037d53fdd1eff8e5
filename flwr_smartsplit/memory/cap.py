"""memory_cap: a hard limit on the memory of a step, in three modes.

Metering slows down each operator, and what a step holds depends on the kind of its
batch (shapes, dtypes, layouts), not on its values. So a sampled cap meters the first
two steps of each kind, in which the optimizer allocates its state, and then one step in
``every``. What they held is remembered, by their place in the round, where the caller
says of which steps it holds: then later rounds are metered one step in ``every`` only.
"""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from flwr_smartsplit.memory.meter import MemoryMeter, parts_of
from flwr_smartsplit.types.sizes import whole_bytes

_FIRST_STEPS = 2


class CapMode(StrEnum):
    """How much a cap meters: some steps, everything, or nothing."""

    SAMPLED = "sampled"
    STRICT = "strict"
    OFF = "off"

    @classmethod
    def _missing_(cls, value: object) -> None:
        names = ", ".join(repr(mode.value) for mode in cls)
        raise ValueError(f"the cap's mode is {value!r}: choose one of {names}.")


class Place(Enum):
    """Where a step is in its round: the optimizer has its state after the first."""

    FIRST = "first"
    FIRST_OF_ITS_KIND = "first of its kind"
    LATER = "later"


@dataclass(slots=True)
class KindOfStep:
    """What is known of the steps with one kind of batch."""

    num_steps: int = 0
    peak_bytes: dict[Place, int] = field(default_factory=dict)  # Once it was metered

    def note(self, place: Place, peak_bytes: int) -> None:
        """Note what a step held."""
        self.peak_bytes[place] = max(self.peak_bytes.get(place, 0), peak_bytes)


KindsOfSteps = dict[Hashable, KindOfStep]


@lru_cache(maxsize=256)
def known_steps(*where: Hashable) -> KindsOfSteps:
    """Return what this process knows of the steps of one place.

    Parameters
    ----------
    *where : Hashable
        All that their memory depends on besides the batch: what is trained, and how.
    """
    del where
    return {}


class MemoryCap:
    """A meter, and the choice of steps that it meters.

    Parameters
    ----------
    budget_bytes : int or None
        The cap; None only measures.
    name : str
        Whose memory it is, for the error.
    mode : CapMode or str
        ``"strict"``, ``"sampled"`` or ``"off"``.
    every : int
        A sampled cap meters the first two steps of each kind of batch (shapes, dtypes,
        layouts), then one in so many.
    device : torch.device, optional
        Counts the memory of this device only; of all devices by default.
    spare_bytes : int
        What the cap allows beyond every budget: see ``accelerator_overhead``.
    known : KindsOfSteps, optional
        What was metered of the same steps before, see ``known_steps``; extended here.
    """

    def __init__(  # noqa: PLR0913 - what is metered, and when
        self,
        budget_bytes: int | None,
        *,
        name: str = "",
        mode: CapMode | str = CapMode.STRICT,
        every: int = 50,
        device: torch.device | None = None,
        spare_bytes: int = 0,
        known: KindsOfSteps | None = None,
    ) -> None:
        if budget_bytes is not None:
            budget_bytes = whole_bytes(budget_bytes, "budget_bytes")
        if every < 1:
            raise ValueError(f"every is {every}: give at least 1.")
        self.mode = CapMode(mode)
        self.every = every
        self.spare_bytes = spare_bytes
        self.meter = MemoryMeter(name=name, device=device)
        self.limit(budget_bytes)
        self._known: KindsOfSteps = {} if known is None else known
        self._steps_by_kind: dict[Hashable, int] = {}
        self._metered_threads: set[int] = set()

    @property
    def peak_bytes(self) -> int:
        """The most that was alive while metering."""
        return self.meter.peak_bytes

    @property
    def live_bytes(self) -> int:
        """What is alive now of what was metered."""
        return self.meter.live_bytes

    def track(self, *things: Any) -> None:
        """Count what exists already; raise MemoryCapExceeded if that is too much."""
        if self.mode is not CapMode.OFF:
            self.meter.track(*things)

    def limit(self, budget_bytes: int | None) -> None:
        """Set another cap from now on; None only measures."""
        spare = self.spare_bytes
        self.meter.budget_bytes = None if budget_bytes is None else budget_bytes + spare

    def start_over(self) -> None:
        """Meter the next steps like the first ones: what is trained has changed."""
        self._known = {}
        self._steps_by_kind.clear()

    @contextmanager
    def building(self) -> Iterator[None]:
        """Meter what is built before the first step."""
        with nullcontext() if self.mode is CapMode.OFF else self._metered():
            yield

    @contextmanager
    def step(self, batch: Any, *owners: Any) -> Iterator[None]:
        """Meter one step if it is its turn.

        Parameters
        ----------
        batch : Tensor or nested tensors
            Counts during this step only.
        *owners : nn.Module or Optimizer
            What else the step uses.

        Raises
        ------
        MemoryCapExceeded
            At the operator that exceeds the cap.
        """
        is_first = not self._steps_by_kind
        kind, seen = self._counted(batch)
        later = Place.LATER if seen else Place.FIRST_OF_ITS_KIND
        place = Place.FIRST if is_first else later
        peak = None if kind is None else kind.peak_bytes.get(place)
        if not self._is_due(kind, seen, peak):
            yield
            if kind is not None and seen < _FIRST_STEPS:
                self.meter.track(*owners)  # By now the optimizer has its state.
                self.meter.peak_bytes = max(self.peak_bytes, peak or 0)
            return
        with self._noting(kind, place):
            try:
                with self._metered():
                    self.meter.track(*owners, batch)
                    yield
            finally:
                self.meter.forget(batch)

    @contextmanager
    def _noting(self, kind: KindOfStep | None, place: Place) -> Iterator[None]:
        """Note what a step holds."""
        before, self.meter.peak_bytes = self.peak_bytes, self.live_bytes
        try:
            yield
            if kind is not None:
                kind.note(place, self.peak_bytes)
        finally:
            self.meter.peak_bytes = max(before, self.peak_bytes)

    @contextmanager
    def _metered(self) -> Iterator[None]:
        """Meter this thread, once however deeply the calls are nested."""
        thread = threading.get_ident()
        if thread in self._metered_threads:
            yield
            return
        self._metered_threads.add(thread)
        try:
            with self.meter:
                yield
        finally:
            self._metered_threads.discard(thread)

    def _counted(self, batch: Any) -> tuple[KindOfStep | None, int]:
        """Count a step; return its kind, and how many came before it here."""
        if self.mode is not CapMode.SAMPLED:
            return None, 0
        name = _kind_of(batch)
        seen = self._steps_by_kind.get(name, 0)
        self._steps_by_kind[name] = seen + 1
        kind = self._known.setdefault(name, KindOfStep())
        kind.num_steps += 1
        return kind, seen

    def _is_due(self, kind: KindOfStep | None, seen: int, peak: int | None) -> bool:
        if kind is None:
            return self.mode is CapMode.STRICT
        limit = self.meter.budget_bytes
        if peak is not None and (limit is None or peak <= limit):
            return (kind.num_steps - 1) % self.every == 0
        return seen < _FIRST_STEPS or seen % self.every == 0


def _kind_of(leaf: Any) -> tuple[Any, ...]:
    """Say all of nested tensors that memory may depend on; of another value, its type.

    Every step asks, and batches are tuples: what torch says of a nesting takes longer.
    """
    if type(leaf) in (tuple, list):
        return type(leaf), *map(_kind_of, leaf)
    if not isinstance(leaf, Tensor):
        leaves, nesting = tree_flatten(leaf)
        if nesting.is_leaf():
            return (type(leaf),)
        return str(nesting), *map(_kind_of, leaves)
    kind = type(leaf), tuple(leaf.shape), leaf.dtype, leaf.layout, leaf.requires_grad
    if leaf.layout is not torch.strided:
        return *kind, tuple(map(_kind_of, parts_of(leaf)))
    # A kernel may copy what overlaps, has gaps or lies in another order.
    is_odd = leaf.is_conj(), leaf.is_neg()
    return *kind, leaf.stride(), leaf.untyped_storage().nbytes(), is_odd


@contextmanager
def memory_cap(
    budget_bytes: int | None,
    *,
    name: str = "",
    mode: CapMode | str = CapMode.STRICT,
    every: int = 50,
) -> Iterator[MemoryCap]:
    """Raise as soon as live tensors made inside take more than ``budget_bytes``.

    Python raises the error right after the operator that exceeded the cap, before the
    system acts: a worker that the system kills takes others with it.

    Parameters
    ----------
    budget_bytes : int or None
        The cap; None only measures.
    name : str
        Whose memory it is, for the error.
    mode : CapMode or str
        ``"strict"`` meters everything inside, ``"sampled"`` only steps marked with
        ``cap.step(batch, model, optimizer)`` whose turn it is, ``"off"`` nothing.
    every : int
        A sampled cap meters the first two steps of each kind of batch (shapes, dtypes,
        layouts), then one in so many.

    Yields
    ------
    MemoryCap
        ``track()`` what exists already; read ``peak_bytes`` at any time.

    Raises
    ------
    MemoryCapExceeded
        With client, operator, phase, live bytes, cap, and the bytes by kind.

    Examples
    --------
    >>> import torch
    >>> with memory_cap(5_000) as cap:
    ...     values = torch.zeros(1_000)
    >>> cap.peak_bytes
    4000
    >>> with memory_cap(5_000, mode="sampled", every=10) as cap:
    ...     for batch in (torch.zeros(200) for _ in range(30)):
    ...         with cap.step(batch):
    ...             total = (batch + 1).sum()
    >>> cap.peak_bytes
    1608
    """
    cap = MemoryCap(budget_bytes, name=name, mode=mode, every=every)
    with cap._metered() if cap.mode is CapMode.STRICT else nullcontext():
        yield cap
