"""Predictor: runs batches along a route, on a device that need not hold the model."""

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.device.step_timer import StepTimer
from flwr_smartsplit.edge.hosts.addresses import is_address
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.grpc import GrpcEdge
from flwr_smartsplit.edge.protocol import Transport
from flwr_smartsplit.errors import EdgeError, EdgeUnreachable, StaleSession
from flwr_smartsplit.memory.cap import CapMode, MemoryCap
from flwr_smartsplit.profile.accelerator_memory import accelerator_overhead
from flwr_smartsplit.profile.forward_memory import dry_forward
from flwr_smartsplit.serve.offer import Offer
from flwr_smartsplit.serve.timed_answers import TimedAnswers, TimedTransport
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.segment import Batch
from flwr_smartsplit.task import Task
from flwr_smartsplit.task_digest.facts import require_same_task, task_facts
from flwr_smartsplit.train.micro_batches import num_examples
from flwr_smartsplit.train.threads import torch_threads
from flwr_smartsplit.train.torch_device import CPU, as_device
from flwr_smartsplit.types import ClientPlan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a predictor returns for a batch."""

    outputs: Any  # The model's, or the fallback's
    cause: str = ""  # Why the fallback answered; "" if the model did

    @property
    def is_fallback(self) -> bool:
        """Whether the fallback answered, and not the model."""
        return bool(self.cause)


class Predictor:
    """Predict with a model of which this device holds what its route has here.

    Outputs are those of the whole model in evaluation mode, bit for bit with the codecs
    ``Raw`` and ``Packed``. It takes one batch at a time.

    Parameters
    ----------
    task : Task
        The one that the offer was made for.
    offer : Offer
        What ``Serving.offer`` made for this device.
    edges : Sequence[Edge]
        The edges that this device can reach, such as ``(RayEdge(),)``; none are needed
        for edges on a network, whose addresses come with the offer.
    fallback : Callable[[Batch], Any], optional
        Answers batches, such as a small model of this device, when an edge does not.
        Without it, such batches raise the edge's error.
    timeout_seconds : float
        How long to wait for each answer of an edge. A batch may wait for two or three:
        the first one, and the first after an edge was lost, open a session before.
    cap_mode : CapMode or str
        Meters some batches (``"sampled"``), all (``"strict"``) or none (``"off"``).
    device : str or torch.device
        Where this device computes: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"auto"``.

    Attributes
    ----------
    num_batches, num_fallbacks : int
        Batches so far, and those that the fallback answered.

    Raises
    ------
    InvalidTask
        If the task is not the offer's.
    MemoryCapExceeded
        If the device's units do not fit the offer's budget.
    """

    def __init__(  # noqa: PLR0913 - where it runs, and what it does without edges
        self,
        task: Task,
        offer: Offer,
        *,
        edges: Sequence[Edge] = (),
        fallback: Callable[[Batch], Any] | None = None,
        timeout_seconds: float = 30.0,
        cap_mode: CapMode | str = CapMode.SAMPLED,
        device: str | torch.device = "cpu",
    ) -> None:
        if not timeout_seconds > 0:
            raise ValueError(
                f"timeout_seconds is {timeout_seconds}: give a number above 0."
            )
        if not isinstance(edges, list | tuple):
            raise TypeError(f"edges is {edges!r}; give a tuple, such as (RayEdge(),).")
        facts = task_facts(task, build_chain(task).model)
        require_same_task(facts, offer.facts, whose="the predictor")
        self.num_batches = self.num_fallbacks = 0
        self._offer = offer
        self._edges = {edge.name: edge for edge in edges}
        self._fallback = fallback
        self._answers = TimedAnswers(timeout_seconds)
        self._is_open = self._has_failed = False
        size = offer.batch_size
        self._like = dry_forward(task, offer.plan.route, batch_size=size).outputs
        self._cap = _cap(task, offer, cap_mode, as_device(device))
        self._runner = _runner(task, offer.plan, self._cap, as_device(device))
        self._runner.build(offer.state)

    @property
    def peak_bytes(self) -> int:
        """The most that this device's tensors took in the batches that were metered."""
        return self._cap.peak_bytes

    def predict(self, inputs: Batch) -> Prediction:
        """Run a batch along the route; let the fallback answer where an edge does not.

        Raises
        ------
        ValueError
            If the batch is larger than the offer's.
        MemoryCapExceeded
            If the device's tensors take more than the offer's budget.
        EdgeError
            If an edge does not answer, and there is no fallback.
        """
        size, most = num_examples(inputs, None), self._offer.batch_size
        if not 1 <= size <= most:
            raise ValueError(
                f"{size} examples in a batch, and the offer is for 1 to {most}: divide "
                "the batch, or ask for an offer with its batch_size."
            )
        self.num_batches += 1
        with torch_threads(self._offer.plan.num_threads):
            try:
                outputs = self._along_the_route(inputs)
            except EdgeError as error:
                return self._without_edges(inputs, error)
        if self._has_failed:
            _log.warning("The edges answer again.")
            self._has_failed = False
        return Prediction(outputs)

    def close(self) -> None:
        """End the sessions at the edges; the offer can be used again."""
        if self._is_open and not self._answers.is_waiting:
            self._runner.abandon()
        self._is_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _along_the_route(self, inputs: Batch) -> Any:
        self._open()
        try:
            return self._runner.predict_step(inputs, like=self._like)
        except StaleSession:  # The edge was started again, or forgot this device.
            self._is_open = False
            self._open()
            return self._runner.predict_step(inputs, like=self._like)

    def _open(self) -> None:
        """Open sessions at the edges, if none are; ask nothing while one hangs."""
        self._answers.require_none_late()
        if not self._is_open:
            size = self._offer.batch_size
            self._runner.enter(self._connect, token=uuid.uuid4().hex, batch_size=size)
            self._is_open = True

    def _without_edges(self, inputs: Batch, error: EdgeError) -> Prediction:
        if not self._answers.is_waiting:  # The next batch tries a new session.
            self._is_open = False
        if self._fallback is None:
            raise error
        if not self._has_failed:
            _log.warning("The fallback answers: %s", error)
            self._has_failed = True
        self.num_fallbacks += 1
        with self._cap.step(("fallback", inputs)):
            outputs = self._fallback(inputs)
        self._cap.meter.forget(outputs)
        return Prediction(outputs, cause=str(error))

    def _connect(self, place: str, address: str) -> Transport:
        edge = self._edges.get(place)
        if edge is None and is_address(address):
            edge = GrpcEdge(name=place)
        if edge is None:
            raise EdgeUnreachable(
                f"the offer's route goes to edge {place!r}, and this predictor was "
                f"given {sorted(self._edges)}: give it that edge."
            )
        return TimedTransport(
            self._answers.of(lambda: edge.connect(address)), self._answers
        )


def _cap(
    task: Task, offer: Offer, mode: CapMode | str, device: torch.device
) -> MemoryCap:
    spare, chain = 0, build_chain(task)
    if device != CPU:
        spare = accelerator_overhead(chain, batch_size=offer.batch_size, task=task)
    return MemoryCap(
        offer.plan.budget_bytes,
        name=f"client {offer.plan.client_key}",
        mode=mode,
        device=device,
        spare_bytes=spare,
    )


def _runner(
    task: Task, plan: ClientPlan, cap: MemoryCap, device: torch.device
) -> RouteRunner:
    timer = StepTimer(plan, clock=time.perf_counter)
    return RouteRunner(plan, task, cap, is_trained=False, timer=timer, device=device)
