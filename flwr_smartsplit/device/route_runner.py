"""Walk: one client's way along its route in one round, step by step.

The device has the first segment, and the last one too if the route comes back; edges
have what lies between.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from flwr_smartsplit.device.metrics import Tally
from flwr_smartsplit.device.step_timer import Pace
from flwr_smartsplit.edge.client import Connect, EdgeLink, opening_of, packed, unpacked
from flwr_smartsplit.edge.moving import off_wire
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import MemoryCapExceeded, RefusedMove
from flwr_smartsplit.memory.cap import CapMode, MemoryCap
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.split.segment import Batch, Segment, as_boundary
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.grad_clipping import total_norm
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.unit_migration import carried, check_kept, rebuilt
from flwr_smartsplit.types import (
    KEEP_ALL,
    Advice,
    ClientPlan,
    Leg,
    Receipt,
    RecomputePlan,
    StepReport,
)

State = Mapping[str, npt.NDArray[Any]]


class Walk:
    """Train or evaluate batch after batch along a client's route.

    Parameters
    ----------
    plan : ClientPlan
        The route, the seeds, and how edges are reached.
    task : Task
        Model, loss and optimizer.
    cap : MemoryCap
        Watches what the device holds.
    is_trained : bool
        Whether there are training steps to come, or only evaluation.
    pace : Pace, optional
        Knows what a step takes; without it, the steps are measured.
    """

    def __init__(
        self,
        plan: ClientPlan,
        task: Task,
        cap: MemoryCap,
        *,
        is_trained: bool,
        pace: Pace | None = None,
    ) -> None:
        self.plan = plan
        self.route = plan.route
        self.recompute = plan.recompute
        self.cap = cap
        self.pace = pace or Pace(plan, clock=time.perf_counter)
        self.tally = Tally()
        self.advice: Advice | None = None
        self._is_trained = is_trained
        self.streams = UnitStreams(plan.seed, plan.round_number, plan.client_key)
        self._task = task
        self._chain = build_chain(task)
        self._runners: list[SegmentRunner] = []
        self._link: EdgeLink | None = None
        self._norm: float | None = None

    def open(
        self,
        state: State,
        connect: Connect,
        *,
        token: str,
        batch_size: int | None = None,
    ) -> None:
        """Build the device's segments under the cap, and those at the edges.

        Parameters
        ----------
        state : Mapping[str, ndarray]
            The global state of the device segments.
        connect : Callable[[place, address], Transport]
            Reaches an edge.
        token : str
            Of this opening.
        batch_size : int, optional
            The most examples that a batch will have, if that is known.
        """
        num_units = len(self._chain)
        for leg in self.route.device_legs(num_units):
            self._runners.append(self._built(leg, state))
        legs = self.route.edge_legs(num_units)
        if legs:
            opening = opening_of(
                self.plan,
                legs,
                is_trained=self._is_trained,
                token=token,
                batch_size=batch_size,
            )
            address = self.plan.edge_addresses[legs[0].place]
            self._link = EdgeLink(connect(legs[0].place, address), opening)

    def train_step(self, inputs: Batch, targets: Tensor) -> None:
        """Do one training step, metered if it is its turn."""
        with self.cap.step((inputs, targets), *self._owners()):
            with self.pace.step(self.route, self.recompute):
                loss = self._step(inputs, targets)
        self.tally.count(int(targets.shape[0]), {"loss": loss})

    def evaluate_step(self, inputs: Batch, targets: Tensor) -> None:
        """Evaluate one batch, metered if it is its turn."""
        with self.cap.step((inputs, targets), *self._owners()):
            values = self._evaluated(inputs, targets)
        self.tally.count(int(targets.shape[0]), values)

    @property
    def num_steps(self) -> int:
        """How many steps are done."""
        return self.tally.num_steps

    @property
    def live_bytes(self) -> int:
        """What this client's tensors take now, also where its cap looks at none."""
        if self.cap.mode is not CapMode.OFF:
            return self.cap.live_bytes
        meter = MemoryMeter(None)
        meter.track(*self._owners())
        return meter.live_bytes

    def replan(self, recompute: RecomputePlan, *, reason: str = "") -> None:
        """Run other units twice from the next step on.

        Parameters
        ----------
        recompute : RecomputePlan
            What the device runs twice.
        reason : str
            Why, for the report.

        Raises
        ------
        InvalidPlan
            If it does not lie within the device's segments.
        """
        if recompute == self.recompute:
            return
        for leg in self.route.device_legs(len(self._chain)):
            recompute.within(leg.start, leg.stop)
        self.tally.replan(str(self.recompute), str(recompute), reason)
        self.recompute = recompute
        for runner in self._runners:
            runner.recompute = recompute
        self.cap.start_over()

    def move(
        self, cut: int, *, recompute: RecomputePlan = KEEP_ALL, reason: str = ""
    ) -> None:
        """Move the cut between the device and the first edge, between two steps.

        Parameters
        ----------
        cut : int
            The first unit at the edge from now on.
        recompute : RecomputePlan
            What the device runs twice from now on.
        reason : str
            Why, for the report.

        Raises
        ------
        RefusedMove
            If it cannot be done exactly; training may go on with the cut as it is.
        MemoryCapExceeded
            If more units do not fit; training may go on with the cut as it is.
        InvalidRoute
            If there is no such cut.
        EdgeError
            If the edge fails, and with it this client's part of the round.
        """
        before = self.route
        route = before.with_first_cut(cut)
        route.legs(len(self._chain))
        if route == before:
            return
        self._runners[0] = self._moved(before.cuts[0], cut)
        self.route = route
        self.cap.start_over()
        self.tally.move(before.cuts[0], cut, reason)
        self.replan(recompute, reason=reason)

    def seal(self) -> tuple[Receipt, ...]:
        """Finish the sessions at the edges, if there are any."""
        if self._link is None:
            return ()
        return self._link.seal(self.num_steps, self._norm)

    def abandon(self) -> None:
        """Tell the edges to forget this client, if they can still be told."""
        if self._link is not None:
            self._link.abandon_quietly()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Copy the state of the device's segments, in the chain's order."""
        state: dict[str, npt.NDArray[Any]] = {}
        for runner in self._runners:
            state |= state_of(runner.segment)
        return state

    def report(self, *, num_epochs: int) -> StepReport:
        """Sum up what was done and measured."""
        sent, received = (0, 0) if self._link is None else self._link.traffic()
        return replace(
            self.tally.report(num_epochs=num_epochs),
            peak_bytes=self.cap.peak_bytes,
            sent_bytes=sent,
            received_bytes=received,
            num_threads=torch.get_num_threads(),
            step_seconds=self.pace.mean(self.route, self.recompute) or 0.0,
        )

    # --- one step -----------------------------------------------------------------

    def _step(self, inputs: Batch, targets: Tensor) -> float:
        """Train on one batch; what a step holds ends where it is used last."""
        head, step = self._runners[0], self.num_steps
        seconds = self.pace.latest(self.route, self.recompute)
        if self._link is None:
            loss, _ = head.finish(inputs, targets, step=step, inputs_are_boundary=False)
            self._update({})
            return float(loss)
        if self.route.returns:
            return self._returning_step(inputs, targets, self._link)
        boundary = packed(head.forward(inputs, step=step, inputs_are_boundary=False))
        labels = WireTensor.pack(targets)
        stepped = self._link.train(
            step, boundary, labels, self._norm, step_seconds=seconds
        )
        del boundary  # It shares the memory of what was sent.
        self.advice = stepped.advice
        head.backward(lambda: (stepped.gradient.unpack(),))
        self._update(stepped.norms)
        return stepped.loss

    def _returning_step(self, inputs: Batch, targets: Tensor, link: EdgeLink) -> float:
        """Train on one batch whose loss is here: the labels never leave the device."""
        (head, tail), step = self._runners, self.num_steps
        boundary = packed(head.forward(inputs, step=step, inputs_are_boundary=False))
        num_examples = int(targets.shape[0])
        forwarded = link.forward(step, boundary, num_examples, self._norm)
        del boundary
        loss, gradients = tail.finish(
            unpacked(forwarded), targets, step=step, inputs_are_boundary=True
        )
        mean_loss = float(loss)
        del loss
        if not gradients:
            raise RuntimeError("the last segment gave its boundary no gradient.")
        if self._task.max_gradient_norm is None:
            tail.release_gradients()  # They have been used.
        sent = WireTensor.pack(gradients[0])
        del gradients
        returned = link.backward(step, sent)
        del sent
        head.backward(lambda: (returned.gradient.unpack(),))
        self._update(returned.norms)
        return mean_loss

    def _update(self, norms: Mapping[str, float]) -> None:
        """Update what waits for the norm of all gradients, those at edges too."""
        if self._task.max_gradient_norm is None:
            return
        for runner in self._runners:
            norms = {**norms, **runner.gradient_norms()}
        self._norm = total_norm(norms, self._chain.model)
        for runner in self._runners:
            runner.update(self._norm)

    def _evaluated(self, inputs: Batch, targets: Tensor) -> Mapping[str, float]:
        """Return loss and metrics of one batch."""
        head, *rest = self._runners
        outputs = head.evaluate(inputs)
        if self._link is None:
            return head.assess(outputs, targets)
        sent = packed(as_boundary(outputs))
        del outputs
        if not rest:
            return self._link.evaluate(sent, WireTensor.pack(targets))
        forwarded = self._link.evaluate_forward(sent)
        del sent
        return rest[0].assess(rest[0].evaluate(unpacked(forwarded)), targets)

    # --- what runs here -----------------------------------------------------------

    def _built(self, leg: Leg, state: State) -> SegmentRunner:
        with self.cap.building():
            segment = materialise(self._chain, leg.start, leg.stop, state)
            self.cap.track(segment)
        return self._runner(segment)

    def _runner(self, segment: Segment) -> SegmentRunner:
        runner = SegmentRunner(
            segment,
            self._task,
            streams=self.streams,
            config=self.plan.config,
            is_trained=self._is_trained,
            is_lean=True,
        )
        runner.recompute = self.recompute
        return runner

    def _moved(self, before: int, cut: int) -> SegmentRunner:
        """Give the first segment units, or take some; the edge has switched then."""
        link, head, step = self._link, self._runners[0], self.num_steps
        if link is None or not self._is_trained:
            raise RefusedMove("a cut moves only while a session at an edge is trained.")
        for runner in self._runners:
            runner.release_gradients()  # They have been used.
        remake = partial(rebuilt, head, self._chain, range(cut), make=self._runner)
        if cut < before:
            check_kept(self._chain, self._task, range(cut, before))
            fewer = remake(num_steps=step)
            leaving = carried(head, self._chain, cut, before)
            link.move(step, cut, leaving, self._norm)
            return fewer
        arriving = link.move(step, cut, None, self._norm)
        if arriving is None:
            raise RuntimeError("the edge gave units away and did not send them.")
        try:
            with self.cap.building():
                more = remake(num_steps=step, arriving=off_wire(arriving))
                self.cap.track(more.segment, more.optimizer)
        except (MemoryCapExceeded, RefusedMove):
            link.move(step, before, arriving, self._norm)
            raise
        return more

    def _owners(self) -> list[Any]:
        return [
            owner
            for runner in self._runners
            for owner in (runner.segment, runner.optimizer)
        ]
