"""What a place holds when it predicts: a dry run of one batch, forward only.

It is what a meter sees, to the byte: the route's segments run as they do there, in
evaluation mode and one after another, on fake tensors.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.memory.meter import MemoryMeter, unmetered
from flwr_smartsplit.profile.tensor_layout import (
    crossing_cost,
    packing_bytes,
    spanned_bytes,
)
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.fake_tensors import (
    DryRun,
    StandIns,
    fake_batch,
    fake_copy,
    warnings_ignored,
)
from flwr_smartsplit.split.segment import Segment, as_boundary
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.types import DEVICE, Crossed, Route, TensorCost

_RETURNED = (Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """What a batch forward along a route takes at one place, and what it returns."""

    peak_bytes: int  # Where every codec is ``Raw``
    crossings: tuple[Crossed, ...]  # Of the route's cuts
    state_bytes: int  # Of the units at that place
    largest_bytes: int  # Of what crosses a cut on the way, and of the outputs
    outputs: Any  # Of the model: fake tensors, nested as it returns them


def dry_forward(
    task: Task,
    route: Route,
    *,
    batch_size: int,
    place: str = DEVICE,
) -> Forwarded:
    """Find what a batch forward along a route takes at a place of this route.

    Nothing real is allocated. The dry run has its own thread: meters and modes are per
    thread, and the caller may be inside a metered step.

    Parameters
    ----------
    task : Task
        The model, and examples of its inputs.
    route : Route
        Where its units run.
    batch_size : int
        Examples in the batch.
    place : str
        The device, or one of the route's edges.

    Raises
    ------
    InvalidTask
        If the model cannot run such a batch in evaluation mode, or returns anything but
        nested tensors and plain values.
    """
    run = _DryRoute(task, route, place)
    with ThreadPoolExecutor(max_workers=1) as aside:
        return aside.submit(run.forward, batch_size).result()


class _DryRoute:
    """A route whose units all run here, and of which one place is metered."""

    def __init__(self, task: Task, route: Route, place: str) -> None:
        self._task = task
        self._chain = build_chain(task)
        self._legs = route.legs(len(self._chain))
        self._is_here = [leg.place == place for leg in self._legs]
        self._meter = MemoryMeter()
        self._crossings: list[Crossed] = []
        self._packed_peak = self._state_bytes = 0
        self._largest = 0

    @warnings_ignored()
    def forward(self, batch_size: int) -> Forwarded:
        try:
            outputs = self._run(batch_size)
        except InvalidTask:
            raise
        except Exception as error:
            reason = (str(error) or "no message").splitlines()[0].rstrip(".")
            raise InvalidTask(
                f"a dry run of {type(self._chain.model).__name__} in evaluation mode "
                f"at batch size {batch_size} fails: {type(error).__name__}: {reason}. "
                "The model must fit the examples and not look at values.",
                batch_size=batch_size,
            ) from error
        return Forwarded(
            peak_bytes=max(self._meter.peak_bytes, self._packed_peak),
            crossings=tuple(self._crossings),
            state_bytes=self._state_bytes,
            largest_bytes=self._largest,
            outputs=outputs,
        )

    def _run(self, batch_size: int) -> Any:
        mode, here = DryRun(), self._is_here
        segments = self._segments(mode)
        states = [s.state_dict(keep_vars=True) for s, is_here in segments if is_here]
        tensors = {id(x): x for state in states for x in state.values()}
        self._state_bytes = sum(x.nbytes for x in tensors.values())
        inputs = self._chain.example_inputs
        batch = fake_batch(inputs, mode, batch_size=batch_size)
        with mode, self._meter, StandIns(mode):
            self._meter.track(*(s for s, is_here in segments if is_here))
            if here[0]:
                self._meter.track(batch)
            value = batch
            for index, (segment, is_here) in enumerate(segments):
                runner = SegmentRunner(segment, self._task, is_trained=False)
                with _metered_if(is_here):
                    value = runner.evaluate(value)
                if index < len(segments) - 1:
                    value = self._crossed(as_boundary(value), index)
            self._check_outputs(value)
            if here[0] and not here[-1]:  # They come back.
                with _metered_if(True):
                    value = tree_map_only(Tensor, _arrived, value)
        return value

    def _segments(self, mode: DryRun) -> list[tuple[Segment, bool]]:
        """Copy the route's segments; a place holds a frozen tensor once."""
        copies: list[tuple[Segment, bool]] = []
        for leg, is_here in zip(self._legs, self._is_here, strict=True):
            beside = next((s for s, mine in copies if mine and is_here), None)
            template = self._chain.segment(leg.start, leg.stop)
            copies.append((fake_copy(template, mode, beside=beside), is_here))
        return copies

    def _crossed(self, boundary: tuple[Tensor, ...], index: int) -> Any:
        """Send a boundary over a cut: what is there afterwards is another one."""
        live, unit = self._meter.live_bytes, self._legs[index].stop - 1
        is_sent, is_received = self._is_here[index : index + 2]
        if is_sent:
            packed = live + sum(map(packing_bytes, boundary))
            self._packed_peak = max(self._packed_peak, packed)
        self._crossings.append(
            Crossed(
                after=self._chain.unit_names[unit],
                tensors=self._costs(boundary, unit),
                live_bytes=live,
                is_sent=is_sent,
                is_received=is_received,
            )
        )
        self._largest = max(self._largest, sum(x.nbytes for x in boundary))
        with _metered_if(is_received):
            return tuple(map(_arrived, boundary))

    def _costs(self, boundary: tuple[Tensor, ...], unit: int) -> tuple[TensorCost, ...]:
        flags = (*self._chain.units[unit].gradients, *(False,) * len(boundary))
        return tuple(
            replace(
                crossing_cost(tensor),
                has_gradient=False,
                is_context=not flags[place] and (place > 0 or any(flags)),
            )
            for place, tensor in enumerate(boundary)
        )

    def _check_outputs(self, outputs: Any) -> None:
        leaves = tree_leaves(outputs)
        strange = [x for x in leaves if not isinstance(x, _RETURNED)]
        if strange:
            raise InvalidTask(
                f"the model returns a {type(strange[0]).__name__}, which is no tensor "
                "or plain value, nor nested: return a tensor, tuple or dict to predict "
                "with it."
            )
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
        self._largest = max(self._largest, sum(x.nbytes for x in tensors))


def _arrived(sent: Tensor) -> Tensor:
    """Make a tensor that came: as the one that was sent, in memory of its own."""
    size, item = spanned_bytes(sent), sent.element_size()
    span = 1 + sum(
        (n - 1) * step for n, step in zip(sent.shape, sent.stride(), strict=True)
    )
    room = torch.empty(size // item, dtype=sent.dtype)
    lead = size // item - span if sent.numel() else 0
    if packing_bytes(sent):  # Its values come without the gaps, and are laid out.
        torch.empty(sent.numel(), dtype=sent.dtype)
    return room.as_strided(sent.shape, sent.stride(), lead)


def _metered_if(is_here: bool) -> AbstractContextManager[None]:
    return nullcontext() if is_here else unmetered()
