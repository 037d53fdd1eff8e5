"""RouteRunner: runs one client's route in one round, step by step.

The device has the first segment, and the last one too if the route returns; edges have
the segments between.
"""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flwr_smartsplit.device.cut_mover import CutMover
from flwr_smartsplit.device.gradient_check import GradientCheck, Ratings
from flwr_smartsplit.device.metrics import Metrics
from flwr_smartsplit.device.step_timer import StepTimer
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import Connect, EdgeClient, opening_of, signed_opening
from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.edge.tensors import WireTensor, pack_targets, unpack_targets
from flwr_smartsplit.errors import InvalidRoute, RefusedMessage, RefusedMove
from flwr_smartsplit.memory.cap import CapMode, MemoryCap
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.profile.example_shapes import longer_than_example, shapes_of
from flwr_smartsplit.split.build import (
    build_chain,
    check_unsent,
    materialise,
    state_views,
)
from flwr_smartsplit.split.segment import Batch, Boundary, Segment, as_boundary
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.grad_clipping import fisher_proxy, total_norm
from flwr_smartsplit.train.micro_batches import (
    mean_loss,
    micro_batches,
    num_examples,
)
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.torch_device import CPU, placed, synchronise
from flwr_smartsplit.types import (
    KEEP_ALL,
    WHOLE_BATCH,
    Advice,
    ClientPlan,
    Leg,
    MicroBatch,
    Receipt,
    RecomputePlan,
    StepReport,
)


class RouteRunner:
    """Train or evaluate batches along a client's route, metered by ``cap``."""

    def __init__(  # noqa: PLR0913 - what runs where, and what is noted of it
        self,
        plan: ClientPlan,
        task: Task,
        cap: MemoryCap,
        *,
        is_trained: bool,
        timer: StepTimer,
        device: torch.device = CPU,
        ratings: Ratings | None = None,
        noise_seed: int | None = None,
    ) -> None:
        self.plan = plan
        self.route = plan.route
        self.recompute = plan.recompute
        self.cap = cap
        self.timer = timer
        self.metrics = Metrics()
        self.advice: Advice | None = None
        self._is_trained = is_trained
        self._device = device
        self._task = task
        self._chain = build_chain(task).under(plan.variant)
        self._check_defended()
        self.streams = UnitStreams(
            plan.seed,
            plan.round_number,
            plan.client_key,
            device,
            secret_unit=self._chain.num_defended - 1,
            secret=secrets.randbits(64) if noise_seed is None else noise_seed,
        )
        self._runners: list[SegmentRunner] = []
        self._edge: EdgeClient | None = None
        self._ratings = ratings
        self._check: GradientCheck | None = None
        self._norm: float | None = None
        self.accumulate = max(task.accumulate, plan.accumulate)

    def open(
        self,
        state: State,  # Of the device segments
        connect: Connect,
        *,
        token: str,  # Identifies this opening
        batch_size: int | None = None,  # The largest that will come, if known
    ) -> None:
        """Build the device's segments under the cap, and open sessions at the edges."""
        self.build(state)
        self.enter(connect, token=token, batch_size=batch_size)

    def build(self, state: State) -> None:
        """Build the device's segments under the cap."""
        for leg in self.route.device_legs(len(self._chain)):
            self._runners.append(self._built(leg, state))

    def enter(
        self, connect: Connect, *, token: str, batch_size: int | None = None
    ) -> None:
        """Open sessions at the edges; see ``open``."""
        legs = self.route.edge_legs(len(self._chain))
        if legs:
            self._check = self._checking(legs[0].place)
            opening = signed_opening(self.plan) or opening_of(
                self.plan,
                legs,
                is_trained=self._is_trained,
                token=token,
                batch_size=batch_size,
                accumulate=self.accumulate,
            )
            address = self.plan.edge_addresses[legs[0].place]
            transport = connect(legs[0].place, address)
            self._edge = EdgeClient(transport, opening, device=self._device)

    def train_step(self, inputs: Batch, targets: Any) -> None:
        """Do one training step, metered if the cap's schedule says so."""
        self.metrics.saw(shapes_of((inputs, targets)))
        inputs, targets = self._placed(inputs, targets)
        with self.cap.step((inputs, targets), *self._owners()):
            with self.timer.step(self.route, self.recompute):
                loss = self._step(inputs, targets)
                synchronise(self._device)
        self.metrics.count(num_examples(inputs, targets), {"loss": loss})

    def evaluate_step(self, inputs: Batch, targets: Any) -> None:
        """Evaluate one batch, metered if the cap's schedule says so."""
        self.metrics.saw(shapes_of((inputs, targets)))
        inputs, targets = self._placed(inputs, targets)
        with self.cap.step((inputs, targets), *self._owners()):
            for _, (x, y) in micro_batches((inputs, targets), self.accumulate):
                self.metrics.count(num_examples(x, y), self._evaluated(x, y))

    def predict_step(self, inputs: Batch, *, like: Any) -> Any:
        """Run one batch forward, metered if the cap's schedule says so.

        Returns what the model returns; ``like`` is nested as that is.
        """
        inputs = placed(inputs, self._device)
        with self.cap.step((inputs,), *self._owners()):
            outputs = self._predicted(inputs, like)
            synchronise(self._device)
        self.cap.meter.forget(outputs)  # They are the caller's.
        return outputs

    @property
    def num_steps(self) -> int:
        """Steps done."""
        return self.metrics.num_steps

    @property
    def live_bytes(self) -> int:
        """Bytes of this client's tensors now, even if its cap is off."""
        if self.cap.mode is not CapMode.OFF:
            return self.cap.live_bytes
        meter = MemoryMeter(device=self._device)
        meter.track(*self._owners())
        return meter.live_bytes

    def replan(self, recompute: RecomputePlan, *, reason: str = "") -> None:
        """Recompute other units from the next step on, or raise ``InvalidPlan``."""
        if recompute == self.recompute:
            return
        for leg in self.route.device_legs(len(self._chain)):
            recompute.within(leg.start, leg.stop)
        self.metrics.replan(str(self.recompute), str(recompute), reason)
        self.recompute = recompute
        for runner in self._runners:
            runner.recompute = recompute
        self.cap.start_over()

    def move(
        self, cut: int, *, recompute: RecomputePlan = KEEP_ALL, reason: str = ""
    ) -> None:
        """Move the cut between the device and the first edge, between two steps.

        ``cut`` is the edge's new first unit, ``recompute`` the device's new plan.
        Raises ``InvalidRoute`` if there is no such cut, and ``RefusedMove`` or
        ``MemoryCapExceeded`` if an exact move is impossible or does not fit; training
        may then continue. After an ``EdgeError`` it cannot.
        """
        before = self.route
        route = before.with_first_cut(cut)
        route.legs(len(self._chain))
        if route == before:
            return
        if self._edge is None or not self._is_trained:
            raise RefusedMove("a cut moves only while a session at an edge is trained.")
        for runner in self._runners:
            runner.release_gradients()  # They are no longer needed.
        mover = CutMover(self._task, self._chain, self.cap, self._runner)
        self._runners[0] = mover.move(
            self._runners[0],
            self._edge,
            (before.cuts[0], cut),
            step=self.num_steps,
            norm=self._norm,
        )
        self.route = route
        self.cap.start_over()
        self.metrics.move(before.cuts[0], cut, reason)
        self.replan(recompute, reason=reason)

    def seal(self) -> tuple[Receipt, ...]:
        """Finish the sessions at the edges, if any."""
        if self._edge is None:
            return ()
        if self._check is not None:
            self._check.conclude()
        return self._edge.seal(self.num_steps, self._norm)

    def abandon(self) -> None:
        """Delete this client's sessions, if their edges can be reached."""
        if self._edge is not None:
            self._edge.abandon()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Copy what training can change of the device's state, in the chain's order."""
        state: dict[str, npt.NDArray[Any]] = {}
        legs = self.route.device_legs(len(self._chain))
        for runner, leg in zip(self._runners, legs, strict=True):
            views = state_views(runner.segment)
            changed = self._chain.changed_names(leg.start, leg.stop)
            check_unsent(runner.segment, changed)
            state |= {name: np.array(views[name]) for name in changed}
        return state

    def report(self, *, num_epochs: int) -> StepReport:
        """Report what was done and measured."""
        nothing = 0, 0
        sent, received = nothing if self._edge is None else self._edge.traffic()
        plain = nothing if self._edge is None else self._edge.plain_traffic()
        if plain == (sent, received):
            plain = nothing
        return replace(
            self.metrics.report(num_epochs=num_epochs),
            peak_bytes=self.cap.peak_bytes,
            example_shapes=longer_than_example(self.metrics.example_shapes, self._task),
            sent_bytes=sent,
            received_bytes=received,
            plain_sent_bytes=plain[0],
            plain_received_bytes=plain[1],
            num_threads=torch.get_num_threads(),
            step_seconds=self.timer.mean(self.route, self.recompute) or 0.0,
        )

    def _step(self, inputs: Batch, targets: Any) -> float:
        """Train on one batch, micro-batch by micro-batch; return its mean loss."""
        losses: list[tuple[float, int]] = []
        norms: Mapping[str, float] = {}
        for part, (x, y) in micro_batches((inputs, targets), self.accumulate):
            loss, norms = self._forward_backward(x, y, part)
            losses.append((loss, num_examples(x, y)))
        self._update(norms, sum(size for _, size in losses))
        return mean_loss(losses)

    def _forward_backward(
        self, inputs: Batch, targets: Any, part: MicroBatch
    ) -> tuple[float, Mapping[str, float]]:
        """Return loss and gradient norms; free each tensor after its last use."""
        head, edge = self._runners[0], self._edge
        at: dict[str, Any] = {"step": self.num_steps, "part": part}
        if edge is None:
            loss, _ = head.finish(inputs, targets, inputs_are_boundary=False, **at)
            return float(loss), {}
        stepped = edge.forward(
            self._noted(head.forward(inputs, inputs_are_boundary=False, **at), targets),
            self._request(targets, part, num_examples(inputs, targets)),
            head,
        )
        self.advice, value = stepped.advice, stepped.values.get("loss", 0.0)
        if self.route.returns:
            value, stepped = self._finish(stepped, targets, edge, part)
        check, decode = self._check, edge.outward.decode_gradients
        if check is None:
            head.backward(lambda: decode(stepped.gradients))
        else:
            head.backward(lambda: check.came(decode(stepped.gradients)))
            check.judge()
        return value, stepped.norms

    def _check_defended(self) -> None:
        """Refuse a route that would leave the device before the task's defence."""
        first, chain = self.route.device_legs(len(self._chain))[0], self._chain
        if first.stop < chain.num_defended:
            raise InvalidRoute(
                f"client {self.plan.client_key!r} is planned along {self.route}, and "
                f"its task's defence keeps the first {chain.num_defended} units on the "
                "device: the strategy has another task, or is not honest."
            )

    def _checking(self, place: str) -> GradientCheck | None:
        """Make the check of an edge, if this client wants one."""
        if self._ratings is None or not self._is_trained:
            return None
        targets, client = self._task.example_targets, self.plan.client_key
        return GradientCheck(place, targets, self._ratings, client=client)

    def _noted(self, boundary: Boundary, targets: Any) -> Boundary:
        """Let the check see a boundary that is about to be sent."""
        return boundary if self._check is None else self._check.sent(boundary, targets)

    def _finish(
        self, stepped: wire.Stepped, targets: Any, edge: EdgeClient, part: MicroBatch
    ) -> tuple[float, wire.Stepped]:
        """Finish a step on the device, which the labels never leave."""
        tail, step = self._runners[-1], self.num_steps
        loss, gradients = tail.finish(
            edge.returning.decode(stepped.boundary, gradients=tail.entering),
            targets,
            step=step,
            part=part,
            inputs_are_boundary=True,
        )
        value = float(loss)
        del loss
        if self._task.max_gradient_norm is None and part.count == 1:
            tail.release_gradients()  # They are no longer needed.
        sent = edge.returning.encode_gradients(gradients)
        del gradients
        back = wire.Backward(step=step, part=part, gradients=sent)
        return value, edge.pass_on(back)

    def _request(self, targets: Any, part: MicroBatch, size: int) -> wire.Forward:
        """Make the request of a step, without its boundary."""
        seconds = None
        if self._is_trained:
            seconds = self.timer.latest(self.route, self.recompute)
        return wire.Forward(
            step=self.num_steps,
            targets=None if self.route.returns else pack_targets(targets),
            num_examples=size,
            part=part,
            norm=self._norm,
            step_seconds=seconds,
        )

    def _update(self, norms: Mapping[str, float], size: int) -> None:
        """Clip by the norm of all gradients, also those at edges, and update.

        ``size`` is that of the batch.
        """
        waits = self._task.max_gradient_norm is not None
        if not waits and not self.plan.wants_fisher:
            return
        for runner in self._runners:
            norms = {**norms, **runner.gradient_norms()}
        if self.plan.wants_fisher:
            model = self._chain.model
            self.metrics.learns(fisher_proxy(norms, model, num_examples=size))
        if not waits:
            return
        self._norm = total_norm(norms, self._chain.model, self._device)
        for runner in self._runners:
            runner.update(self._norm)

    def _evaluated(self, inputs: Batch, targets: Any) -> Mapping[str, float]:
        head, tail, edge = self._runners[0], self._runners[-1], self._edge
        if edge is None:
            return head.assess(head.evaluate(inputs), targets)
        request = self._request(targets, WHOLE_BATCH, num_examples(inputs, targets))
        stepped = edge.forward(as_boundary(head.evaluate(inputs)), request, head)
        if not self.route.returns:
            return stepped.values
        returned = edge.returning.decode(stepped.boundary, gradients=tail.entering)
        return tail.assess(tail.evaluate(returned), targets)

    def _predicted(self, inputs: Batch, like: Any) -> Any:
        head, tail, edge = self._runners[0], self._runners[-1], self._edge
        if edge is None:
            return head.evaluate(inputs)
        request = wire.Forward(step=0, num_examples=num_examples(inputs, None))
        stepped = edge.forward(as_boundary(head.evaluate(inputs)), request, head)
        if not self.route.returns:
            return placed(_unpacked(stepped.outputs, like), self._device)
        returned = edge.returning.decode(stepped.boundary, gradients=tail.entering)
        return tail.evaluate(returned)

    def _built(self, leg: Leg, state: State) -> SegmentRunner:
        with self.cap.building():
            beside = [runner.segment for runner in self._runners]
            segment = materialise(
                self._chain, leg.start, leg.stop, state, beside=beside
            )
            if self._device != CPU:
                segment.to(self._device)
            self.cap.track(segment)
        return self._runner(segment)

    def _runner(self, segment: Segment) -> SegmentRunner:
        runner = SegmentRunner(
            segment,
            self._task,
            streams=self.streams,
            config=self.plan.config,
            is_trained=self._is_trained,
            steps_in_backward=True,
            notes_norms=self.plan.wants_fisher and self._is_trained,
            device=self._device,
        )
        runner.recompute = self.recompute
        return runner

    def _placed(self, inputs: Batch, targets: Any) -> tuple[Batch, Any]:
        """Place a batch; labels that an edge needs, and not the device, stay."""
        is_sent = self._edge is not None and not self.route.returns
        own_targets = targets if is_sent else placed(targets, self._device)
        return placed(inputs, self._device), own_targets

    def _owners(self) -> list[Any]:
        return [x for each in self._runners for x in (each.segment, each.optimizer)]


def _unpacked(outputs: WireTensor | tuple[WireTensor, ...] | None, like: Any) -> Any:
    """Read the outputs that an edge returned, if they are nested as they should be."""
    try:
        if isinstance(outputs, WireTensor) == isinstance(like, Tensor):
            return unpack_targets(outputs or (), like=like)
    except ValueError:
        pass
    raise RefusedMessage(
        "the edge's outputs are not nested as the model's: use one task and one "
        "release of flwr_smartsplit everywhere."
    )
