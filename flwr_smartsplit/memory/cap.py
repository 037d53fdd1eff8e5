"""memory_cap: a hard limit on what a step holds, in three modes.

Metering costs time in each operator, and what a step holds depends on its shapes,
not on its values. So a sampled cap looks at the first two steps of each shape, where
the optimizer makes its state, and then at one in so many.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.memory.meter import MemoryMeter

_FIRST_STEPS = 2


class CapMode(StrEnum):
    """How closely a cap looks: at some steps, at everything, or not at all."""

    SAMPLED = "sampled"
    STRICT = "strict"
    OFF = "off"

    @classmethod
    def _missing_(cls, value: object) -> None:
        names = ", ".join(repr(mode.value) for mode in cls)
        raise ValueError(f"the cap's mode is {value!r}: choose one of {names}.")


class MemoryCap:
    """A meter, and the steps that it looks at.

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
        if budget_bytes is not None and budget_bytes < 0:
            raise ValueError(
                f"budget_bytes is {budget_bytes}: give bytes of at least 0, or None."
            )
        if every < 1:
            raise ValueError(f"every is {every}: give at least 1.")
        self.mode = CapMode(mode)
        self.every = every
        self.meter = MemoryMeter(budget_bytes, name=name)
        self._steps_by_shape: dict[tuple[Any, ...], int] = {}
        self._metered_threads: set[int] = set()

    @property
    def peak_bytes(self) -> int:
        """The most that was alive in what was metered."""
        return self.meter.peak_bytes

    @property
    def live_bytes(self) -> int:
        """What is alive of what was metered."""
        return self.meter.live_bytes

    def track(self, *things: Any) -> None:
        """Count what exists already: modules, optimizers, tensors, nested batches.

        Raises
        ------
        MemoryCapExceeded
            If what exists already is more than the cap.
        """
        if self.mode is not CapMode.OFF:
            self.meter.track(*things)

    def limit(self, budget_bytes: int | None) -> None:
        """Set another cap from now on; None only measures."""
        self.meter.budget_bytes = budget_bytes

    def start_over(self) -> None:
        """Look at the next steps as at the first ones: what is trained has changed."""
        self._steps_by_shape.clear()

    @contextmanager
    def building(self) -> Iterator[None]:
        """Meter what is built before the first step."""
        if self.mode is CapMode.OFF:
            yield
        else:
            with self._metered():
                yield

    @contextmanager
    def step(self, batch: Any, *owners: Any) -> Iterator[None]:
        """Meter one step if it is its turn.

        Parameters
        ----------
        batch : Tensor or nested tensors
            Counts during this step, and is forgotten after it.
        *owners : nn.Module or Optimizer
            What the step uses besides.

        Raises
        ------
        MemoryCapExceeded
            At the operator that crosses the cap.
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
        """Meter this thread, once however deeply it is asked to."""
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

    The error comes from Python, right after the operator that crossed the cap and
    before the system acts: a worker that the system kills takes others with it.

    Parameters
    ----------
    budget_bytes : int or None
        The cap; None only measures.
    name : str
        Whose memory it is, for the error.
    mode : CapMode or str
        ``"strict"`` meters all that happens inside, ``"sampled"`` only steps marked
        with ``cap.step(batch, model, optimizer)`` whose turn it is, ``"off"`` none.
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
    if cap.mode is CapMode.STRICT:
        with cap._metered():
            yield cap
    else:
        yield cap
