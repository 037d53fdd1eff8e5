"""Session: one client's segment at an edge while it trains, step by step.

If the route goes on, the session has a link to the next edge: a boundary goes from
edge to edge and never back through the device, which may be too small to hold it.
"""

import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import EdgeLink, packed, unpacked
from flwr_smartsplit.edge.moving import MoveCut, Moved, checksum, moved_session
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import EdgeError, OutOfOrderStep
from flwr_smartsplit.plan.refine import Progress, advised, changed, updated
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Boundary, as_boundary
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.unit_migration import Make
from flwr_smartsplit.types import Advice

PER_STEP = 2  # A step has two halves in the order of messages: there, and back.


@dataclass
class Session:
    """One client's replica of its segment, and what it was last asked.

    Parameters
    ----------
    opened : OpenSession
        What it was opened with.
    incarnation : str
        Names this opening.
    runner : SegmentRunner
        Trains the segment.
    onward : EdgeLink, optional
        The edge where the route goes on.
    """

    opened: wire.OpenSession
    incarnation: str
    runner: SegmentRunner
    onward: EdgeLink | None
    num_examples: int = 0
    start: int = field(init=False)
    progress: Progress = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _next: int = 0
    _last: int = -1
    _last_checksum: int = 0
    _last_reply: Any = None
    _num_updated: int = 0
    _num_moves: int = 0
    _last_move: tuple[int, Moved] | None = None

    def __post_init__(self) -> None:
        """Begin where the opening says; a move changes it."""
        self.start = self.opened.start
        self.progress = Progress(
            num_examples=self.opened.num_examples,
            importance_before=self.opened.importance,
        )

    @property
    def num_steps(self) -> int:
        """How many steps are done."""
        return self._next // PER_STEP

    def answer(self, request: Any) -> Any:
        """Do what a message of a step asks for, exactly once.

        Raises
        ------
        OutOfOrderStep
            If it is neither the next message nor a repetition of the last.
        """
        place, checksum = _place_of(request), _checksum(request)
        if place == self._last and checksum == self._last_checksum:
            return self._last_reply
        if place != self._next:
            raise self._out_of_order(request, is_changed=place == self._last)
        self._last_reply = None  # Who asks for more has it, and it takes memory.
        self._last_reply = self._do(request)
        self._last_move = None
        self._last, self._last_checksum = place, checksum
        # A step that comes back has two halves, and one message for each.
        self._next += (
            1 if isinstance(request, wire.ForwardStep | wire.BackwardStep) else PER_STEP
        )
        return self._last_reply

    def _out_of_order(self, request: Any, *, is_changed: bool) -> OutOfOrderStep:
        what = "was changed" if is_changed else "came"
        return OutOfOrderStep(
            f"session {self.opened.session}: step {request.step} {what} after "
            f"{self.num_steps} steps, in a {type(request).__name__}. The session is "
            "void: this client sits the round out.",
            step=request.step,
            num_steps=self.num_steps,
        )

    def update(self, norm: float | None) -> None:
        """Do the update of the last step, if it waited for the common norm."""
        waits = self.runner.task.max_gradient_norm is not None
        if not waits or self._num_updated == self.num_steps:
            return
        if norm is None:
            raise EdgeError(
                f"session {self.opened.session}: the task clips gradients by their "
                "common norm, and the message has none. Use one version everywhere."
            )
        self._last_reply = None
        self.runner.update(norm)
        self._num_updated = self.num_steps

    def finish(self, norm: float | None) -> None:
        """Do the last update, and let go of what only steps need."""
        self.update(norm)
        self._last_reply = None
        self.runner.release_gradients()

    def move(self, request: MoveCut, chain: Chain, make: Make) -> Moved:
        """Begin at another unit from the next step on, exactly once.

        Parameters
        ----------
        request : MoveCut
            What is asked.
        chain : Chain
            Whose units they are.
        make : Callable[[Segment], SegmentRunner]
            Makes this session's runners.

        Raises
        ------
        OutOfOrderStep
            If it is neither the next message nor a repetition of the last.
        RefusedMove
            If it cannot be done exactly; the session is as it was.
        """
        code = checksum(request)
        is_next = request.step * PER_STEP == self._next
        if is_next and request.number == self._num_moves - 1 and self._last_move:
            last_code, reply = self._last_move
            if code == last_code:
                return reply
        if not is_next or request.number != self._num_moves:
            is_changed = is_next and request.number == self._num_moves - 1
            raise self._out_of_order(request, is_changed=is_changed)
        self.update(request.norm)
        units = range(self.start, self.opened.stop)
        self.runner, reply = moved_session(
            self.runner, chain, units, request, make=make
        )
        self.start = request.start
        self.progress = changed(self.progress)
        self._num_moves += 1
        self._last_move = code, reply
        return reply

    def evaluate(self, request: wire.EvaluateStep) -> wire.Evaluated:
        """Evaluate one batch to the end of the route."""
        outputs = self.runner.evaluate(unpacked(request))
        if self.onward is not None:
            boundary = packed(as_boundary(outputs))
            values = self.onward.evaluate(boundary, request.targets)
            return wire.Evaluated(values)
        return wire.Evaluated(self.runner.assess(outputs, request.targets.unpack()))

    def evaluate_forward(self, request: wire.EvaluateForward) -> wire.Forwarded:
        """Bring one batch to where the route goes back to the device."""
        boundary = packed(as_boundary(self.runner.evaluate(unpacked(request))))
        if self.onward is not None:
            return self.onward.evaluate_forward(boundary)
        return wire.Forwarded(boundary[0], boundary[1:])

    def _do(self, request: Any) -> Any:
        if isinstance(request, wire.BackwardStep):
            return self._backward(request)
        self.update(request.norm)
        if isinstance(request, wire.ForwardStep):
            return self._forward(request)
        return self._train(request)

    def _advice(self, request: wire.TrainStep, loss: float) -> Advice | None:
        """Judge the client by this step too, and say what it should change."""
        cohort = self.opened.cohort
        if cohort is None:
            return None
        self.progress = updated(
            self.progress,
            cohort,
            loss=loss,
            num_examples=request.targets.shape[0],
            step_seconds=request.step_seconds,
        )
        advice = advised(self.progress, cohort)
        if advice is not None:
            self.progress = changed(self.progress)
        return advice

    def _train(self, request: wire.TrainStep) -> wire.Stepped:
        self.num_examples += request.targets.shape[0]
        if self.onward is None:
            loss, gradients = self.runner.finish(
                unpacked(request),
                request.targets.unpack(),
                step=request.step,
                inputs_are_boundary=True,
            )
            mean_loss, norms = float(loss), self.runner.gradient_norms()
            advice = self._advice(request, mean_loss)
            return wire.Stepped(mean_loss, _packed_gradient(gradients), norms, advice)
        boundary = packed(self._enter(request))
        stepped = self.onward.train(
            request.step, boundary, request.targets, request.norm
        )
        del boundary  # It shares the memory of what was sent.
        gradients = self.runner.backward(lambda: (stepped.gradient.unpack(),))
        norms = {**stepped.norms, **self.runner.gradient_norms()}
        advice = self._advice(request, stepped.loss)
        return wire.Stepped(stepped.loss, _packed_gradient(gradients), norms, advice)

    def _forward(self, request: wire.ForwardStep) -> wire.Forwarded:
        self.num_examples += request.num_examples
        boundary = packed(self._enter(request))
        if self.onward is None:
            return wire.Forwarded(boundary[0], boundary[1:])
        return self.onward.forward(
            request.step, boundary, request.num_examples, request.norm
        )

    def _backward(self, request: wire.BackwardStep) -> wire.Returned:
        gradient, norms = request.gradient, {}
        if self.onward is not None:
            returned = self.onward.backward(request.step, gradient)
            gradient, norms = returned.gradient, dict(returned.norms)
        incoming = self.runner.backward(lambda: (gradient.unpack(),))
        norms |= self.runner.gradient_norms()
        return wire.Returned(_packed_gradient(incoming), norms)

    def _enter(self, request: Any) -> Boundary:
        """Run the segment forward, so that the route can go on."""
        return self.runner.forward(
            unpacked(request), step=request.step, inputs_are_boundary=True
        )


def _packed_gradient(gradients: tuple[Tensor, ...]) -> WireTensor:
    if not gradients:
        raise RuntimeError("the segment gave its boundary no gradient.")
    return WireTensor.pack(gradients[0])


def _place_of(request: Any) -> int:
    """Tell a message's place in the order of its session, in half steps."""
    return int(request.step) * PER_STEP + isinstance(request, wire.BackwardStep)


def _checksum(request: Any) -> int:
    """Tell a repeated message from a changed one."""
    names = ("norm", "num_examples", "stop", "step_seconds")
    values = [getattr(request, name, None) for name in names]
    checksum = zlib.crc32(f"{type(request).__name__} {values}".encode())
    for tensor in _tensors(request):
        checksum = tensor.checksum(checksum)
    return checksum


def _tensors(request: Any) -> Iterator[WireTensor]:
    for each in fields(request):
        value = getattr(request, each.name)
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, WireTensor):
                yield tensor
