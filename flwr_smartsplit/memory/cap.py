"""memory_cap: a hard limit on the memory of a step, in three modes.

Metering slows down each operator, and what a step holds depends on its shapes, not on
its values. So a sampled cap meters the first two steps of each shape, in which the
optimizer allocates its state, and then one step in ``every``.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.memory.meter import MemoryMeter
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
        A sampled cap meters the first two steps of each shape, then one in so many.
    """

    def __init__(
        self,
        budget_bytes: int | None,
        *,
        name: str = "",
        mode: CapMode | str = CapMode.STRICT,
        every: int = 50,
    ) -> None:
        if budget_bytes is not None:
            budget_bytes = whole_bytes(budget_bytes, "budget_bytes")
        if every < 1:
            raise ValueError(f"every is {every}: give at least 1.")
        self.mode = CapMode(mode)
        self.every = every
        self.meter = MemoryMeter(budget_bytes, name=name)
        self._steps_by_shape: dict[tuple[Any, ...], int] = {}
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
        self.meter.budget_bytes = budget_bytes

    def start_over(self) -> None:
        """Meter the next steps like the first ones: what is trained has changed."""
        self._steps_by_shape.clear()

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
        if not self._is_due(batch):
            yield
            return
        try:
            with self._metered():
                self.meter.track(*owners, batch)
                yield
        finally:
            self.meter.forget(batch)

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

    def _is_due(self, batch: Any) -> bool:
        if self.mode is not CapMode.SAMPLED:
            return self.mode is CapMode.STRICT
        shape = tuple(
            tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)
        )
        seen = self._steps_by_shape.get(shape, 0)
        self._steps_by_shape[shape] = seen + 1
        return seen < _FIRST_STEPS or seen % self.every == 0


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
        A sampled cap meters the first two steps of each shape, then one in so many.

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
