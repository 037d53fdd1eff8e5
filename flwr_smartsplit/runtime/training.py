"""One client's part of a round: a loader along its route, under its cap.

Both Flower APIs call these two functions; neither knows that the other exists.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flwr_smartsplit.errors import (
    EdgeError,
    InvalidRoute,
    InvalidTask,
    MemoryCapExceeded,
    SmartSplitError,
)
from flwr_smartsplit.model.building import build_chain, materialise, state_of
from flwr_smartsplit.model.cap import CapMode, MemoryCap
from flwr_smartsplit.model.segment import Batch, Boundary, SegmentRunner
from flwr_smartsplit.runtime import transport as wire
from flwr_smartsplit.runtime.randomness import UnitStreams
from flwr_smartsplit.runtime.threads import torch_threads
from flwr_smartsplit.runtime.wire import WireTensor
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ClientPlan, Leg, Receipt, Status, StepReport

State = Mapping[str, npt.NDArray[Any]]
Loader = Iterable[tuple[Batch, Tensor]]
Connect = Callable[[str, str], wire.Transport]
"""``connect(place, address)`` reaches an edge."""

_SPLIT_LEGS = 2
_PAIR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a client brings to every round.

    Parameters
    ----------
    task : Task
        Model, loss and optimizer.
    connect : Callable[[place, address], Transport]
        Reaches an edge.
    cap_mode : CapMode or str
        Whether the cap looks at some steps (``"sampled"``), all (``"strict"``) or
        none (``"off"``).
    meter_every : int
        A sampled cap meters the first two steps, then one in so many.
    local_epochs : int
        Passes over the training loader.
    clock : Callable[[], float]
        Seconds that only move forward.
    """

    task: Task
    connect: Connect
    cap_mode: CapMode | str = CapMode.SAMPLED
    meter_every: int = 50
    local_epochs: int = 1
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        for name in ("meter_every", "local_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1.")
        CapMode(self.cap_mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a client has at the end of its part of a round.

    Parameters
    ----------
    state : Mapping[str, ndarray]
        Its device segments' state; empty unless the report's status is OK.
    receipts : tuple[Receipt, ...]
        What its edges hold.
    report : StepReport
        What it measured.
    """

    state: State
    receipts: tuple[Receipt, ...]
    report: StepReport


def train_locally(
    plan: ClientPlan, state: State, loader: Loader, conditions: Conditions
) -> Outcome:
    """Train one client for one round, and never let it take others down.

    Parameters
    ----------
    plan : ClientPlan
        The route, the cap and the seeds.
    state : Mapping[str, ndarray]
        The global state of the device segments.
    loader : Iterable
        Batches ``(inputs, targets)``.
    conditions : Conditions
        What the client brings.

    Returns
    -------
    Outcome
        Going over the cap or losing the edge ends in a report with that status and
        the numbers, not in an exception.
    """
    start = conditions.clock()
    with torch_threads(plan.num_threads):
        walk = _Walk(plan, conditions, plan.session)
        try:
            walk.open(state)
            for epoch in range(conditions.local_epochs):
                for batch in walk.streams.batches(loader, epoch):
                    walk.train_step(*_own_batch(batch))
            receipts = walk.seal()
            new_state = state_of(walk.runner.segment)
            outcome = Outcome(
                state=new_state,
                receipts=receipts,
                report=walk.report(num_epochs=conditions.local_epochs),
            )
        except (MemoryCapExceeded, EdgeError) as error:
            walk.abandon()
            outcome = Outcome(state={}, receipts=(), report=walk.failure(error))
        except BaseException:
            walk.abandon()
            raise
    seconds = conditions.clock() - start
    return replace(outcome, report=replace(outcome.report, seconds=seconds))


def evaluate_locally(
    plan: ClientPlan, state: State, loader: Loader, conditions: Conditions
) -> StepReport:
    """Evaluate along the route, so that a weak device never holds the model.

    Parameters and outcome are as for ``train_locally``; nothing is sealed.
    """
    start = conditions.clock()
    with torch_threads(plan.num_threads):
        walk = _Walk(plan, conditions, lambda place: f"{plan.session(place)}/evaluate")
        try:
            walk.open(state)
            for batch in walk.streams.batches(loader, 0):
                walk.evaluate_step(*_own_batch(batch))
            report = walk.report(num_epochs=1)
        except (MemoryCapExceeded, EdgeError) as error:
            report = walk.failure(error)
        finally:
            walk.abandon()
    return replace(report, seconds=conditions.clock() - start)


class _Walk:
    """One client's way along its route in one round."""

    def __init__(
        self, plan: ClientPlan, conditions: Conditions, session: Callable[[str], str]
    ) -> None:
        self.plan = plan
        self.conditions = conditions
        self.session = session
        self.streams = UnitStreams(plan.seed, plan.round_number, plan.client_key)
        self.cap = MemoryCap(
            plan.budget_bytes,
            name=f"client {plan.client_key}",
            mode=conditions.cap_mode,
            every=conditions.meter_every,
        )
        self.runner: SegmentRunner
        self.tail: _TailLink | None = None
        self.num_steps = 0
        self.num_examples = 0
        self._sums: dict[str, float] = {"loss": 0.0}

    def open(self, state: State) -> None:
        """Build the device's segment under the cap, and the tail at its edge."""
        chain = build_chain(self.conditions.task)
        head, *rest = self.plan.route.legs(len(chain))
        with self.cap.building():
            segment = materialise(chain, head.start, head.stop, state)
            self.cap.track(segment)
        self.runner = SegmentRunner(segment, self.conditions.task, streams=self.streams)
        if len(rest) >= _SPLIT_LEGS:
            raise InvalidRoute(
                f"route {self.plan.route} has {len(rest) + 1} segments; this version "
                "runs at most one cut."
            )
        for leg in rest:
            address = self.plan.edge_addresses[leg.place]
            transport = self.conditions.connect(leg.place, address)
            self.tail = _TailLink(self.plan, leg, self.session(leg.place), transport)

    def train_step(self, inputs: Batch, targets: Tensor) -> None:
        """Do one training step, metered if it is its turn."""
        owners = (self.runner.segment, self.runner.optimizer)
        with self.cap.step((inputs, targets), *owners):
            loss = self._step(inputs, targets)
        self._count(targets, {"loss": loss})
        self.num_steps += 1

    def _step(self, inputs: Batch, targets: Tensor) -> float:
        step = self.num_steps
        if self.tail is None:
            loss, _ = self.runner.finish(
                inputs, targets, step=step, inputs_are_boundary=False
            )
            return float(loss)
        boundary = self.runner.forward(inputs, step=step, inputs_are_boundary=False)
        packed = _packed(boundary)
        del boundary
        stepped = self.tail.train(step, packed, WireTensor.pack(targets))
        del packed  # It shares the boundary's memory.
        self.runner.backward(stepped.gradient.unpack)
        return stepped.loss

    def evaluate_step(self, inputs: Batch, targets: Tensor) -> None:
        """Evaluate one batch, metered if it is its turn."""
        batch = (inputs, targets)
        with self.cap.step(batch, self.runner.segment), torch.no_grad():
            outputs = self.runner.evaluate(inputs)
            if self.tail is None:
                task = self.conditions.task
                values = {"loss": float(task.loss_fn(outputs, targets))}
                if task.metrics_fn is not None:
                    values |= task.metrics_fn(outputs, targets)
            else:
                packed = _packed(outputs if type(outputs) is tuple else (outputs,))
                del outputs
                reply = self.tail.evaluate(packed, WireTensor.pack(targets))
                values = {"loss": reply.loss, **reply.metrics}
        self._count(targets, values)
        self.num_steps += 1

    def seal(self) -> tuple[Receipt, ...]:
        """Finish the session at the edge, if there is one."""
        return () if self.tail is None else (self.tail.seal(self.num_steps),)

    def abandon(self) -> None:
        """Tell the edge to forget this client, if it can still be told."""
        if self.tail is not None:
            try:
                self.tail.abandon()
            except EdgeError:
                pass  # It will be forgotten when the round is released.

    def report(self, *, num_epochs: int) -> StepReport:
        """Sum up what was done and measured."""
        sent, received = (0, 0) if self.tail is None else self.tail.traffic()
        means = {
            name: total / max(self.num_examples, 1)
            for name, total in self._sums.items()
        }
        return StepReport(
            num_examples=self.num_examples // num_epochs,
            num_epochs=num_epochs,
            num_steps=self.num_steps,
            loss=means.pop("loss"),
            peak_bytes=self.cap.peak_bytes,
            sent_bytes=sent,
            received_bytes=received,
            num_threads=torch.get_num_threads(),
            metrics=means,
        )

    def failure(self, error: SmartSplitError) -> StepReport:
        """Sum up what was done before it ended in ``error``."""
        over = isinstance(error, MemoryCapExceeded)
        return replace(
            self.report(num_epochs=1),
            status=Status.OUT_OF_MEMORY if over else Status.EDGE_FAILED,
            message=str(error),
        )

    def _count(self, targets: Tensor, values: Mapping[str, float]) -> None:
        examples = int(targets.shape[0])
        self.num_examples += examples
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value) * examples


def _own_batch(batch: Any) -> tuple[Batch, Tensor]:
    """Take a batch as a loader gives it: inputs in a tensor, a list, or a mapping.

    Raises
    ------
    InvalidTask
        If it is not ``(inputs, targets)``.
    """
    is_pair = isinstance(batch, tuple | list) and len(batch) == _PAIR
    if not is_pair or not isinstance(batch[1], Tensor):
        kind = type(batch[1] if is_pair else batch).__name__
        keys = (
            f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        )
        raise InvalidTask(
            f"the loader yields {'targets in ' if is_pair else ''}a {kind}{keys}; let "
            "it yield (inputs, targets), with the targets as one tensor, for instance "
            "by a collate_fn."
        )
    inputs, targets = batch
    if isinstance(inputs, tuple | list):
        inputs = tuple(inputs)
    elif isinstance(inputs, Mapping):
        inputs = dict(inputs)
    owned: tuple[Batch, Tensor] = tree_map(_own, (inputs, targets))
    return owned


def _packed(boundary: Boundary) -> tuple[WireTensor, ...]:
    return tuple(WireTensor.pack(tensor) for tensor in boundary)


def _own(tensor: Any) -> Tensor:
    """Copy a view of a larger tensor: a batch must not keep the data set alive."""
    if not isinstance(tensor, Tensor):
        raise InvalidTask(
            f"the loader's inputs hold a {type(tensor).__name__} ({tensor!r:.40}); "
            "let it yield tensors only, for instance by a collate_fn."
        )
    if tensor.layout is not torch.strided:
        return tensor
    is_view = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if is_view else tensor


class _TailLink:
    """The client's session at the edge that hosts its tail."""

    def __init__(
        self, plan: ClientPlan, leg: Leg, session: str, transport: wire.Transport
    ) -> None:
        self._transport = wire.CountingTransport(transport)
        self._session = session
        opened = self._transport.send(
            wire.OpenSession(
                session=session,
                place=leg.place,
                round_number=plan.round_number,
                client_key=plan.client_key,
                start=leg.start,
                stop=leg.stop,
                state_digest=plan.state_digest,
                seed=plan.seed,
                num_threads=plan.num_threads,
                token=uuid.uuid4().hex,
            )
        )
        self._incarnation = opened.incarnation

    def train(
        self, step: int, boundary: tuple[WireTensor, ...], targets: WireTensor
    ) -> wire.Stepped:
        return self._transport.send(
            wire.TrainStep(
                session=self._session,
                incarnation=self._incarnation,
                step=step,
                boundary=boundary[0],
                context=boundary[1:],
                targets=targets,
            )
        )

    def evaluate(
        self, boundary: tuple[WireTensor, ...], targets: WireTensor
    ) -> wire.Evaluated:
        return self._transport.send(
            wire.EvaluateStep(
                session=self._session,
                incarnation=self._incarnation,
                boundary=boundary[0],
                context=boundary[1:],
                targets=targets,
            )
        )

    def seal(self, num_steps: int) -> Receipt:
        return self._transport.send(
            wire.Seal(self._session, self._incarnation, num_steps)
        )

    def abandon(self) -> None:
        self._transport.send(wire.Abandon(self._session, self._incarnation))

    def traffic(self) -> tuple[int, int]:
        return self._transport.sent_bytes, self._transport.received_bytes
