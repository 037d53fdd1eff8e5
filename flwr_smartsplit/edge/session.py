"""Session: runs one client's segment at an edge, and each request exactly once.

If the route continues, the session is a client of the next edge: a boundary goes from
edge to edge and never through the device, which may be too small to hold it.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import EdgeClient
from flwr_smartsplit.edge.coding.crossing import Crossing
from flwr_smartsplit.edge.cut_moves import MoveCut, Moved, moved_session
from flwr_smartsplit.edge.message_bytes import checksum
from flwr_smartsplit.edge.replicas import Replica
from flwr_smartsplit.edge.tensors import WireTensor, pack_targets, unpack_targets
from flwr_smartsplit.errors import EdgeError, OutOfOrderStep
from flwr_smartsplit.plan.advisor import Progress, judged
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Boundary, as_boundary
from flwr_smartsplit.train.micro_batches import mean_loss
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.torch_device import CPU, placed
from flwr_smartsplit.train.unit_migration import Make
from flwr_smartsplit.types import Advice

StepRequest = wire.Forward | wire.Backward
Place = tuple[int, int, bool]


class Session:
    """One client's replica of its segment at an edge."""

    def __init__(  # noqa: PLR0913 - what it runs, and in what way it answers
        self,
        opened: wire.OpenSession,
        incarnation: str,  # Identifies this opening
        runner: SegmentRunner,
        onward: EdgeClient | None,  # The route's next edge
        *,
        device: torch.device = CPU,
        replica: Replica | None = None,  # That the runner has in common with others
        answers: bool = False,  # With the outputs of the model, which ends here
    ) -> None:
        self.opened = opened
        self.incarnation = incarnation
        self.runner = runner
        self.onward = onward
        self.start = opened.start
        self.num_examples = 0
        self.lock = threading.Lock()
        self._turn: AbstractContextManager[None] = replica or nullcontext()
        self._answers = answers
        self._inward = Crossing.at(opened, 0, device)
        self._returning = Crossing.at(opened, -1, device)
        self._order = RequestOrder(opened.session)
        self._advisor = Advisor(opened)
        self._num_updated = 0

    @property
    def num_steps(self) -> int:
        """Training steps done."""
        return self._order.num_steps

    def answer(self, request: StepRequest) -> wire.Stepped:
        """Train on a request exactly once, or evaluate it.

        Raises ``OutOfOrderStep`` if a training request is neither the next one nor a
        repetition of the last.
        """
        if isinstance(request, wire.Backward):
            return self._order.answer(request, lambda: self._backward(request))
        if not self.opened.is_trained:
            return self._evaluate(request)
        return self._order.answer(request, lambda: self._forward(request))

    def _forward(self, request: wire.Forward) -> wire.Stepped:
        """Run forward; and backward at once, if an edge computes the loss."""
        self.update(request.norm)
        self.num_examples += request.num_examples
        if self.onward is None and request.targets is not None:
            loss, gradients = self.runner.finish(
                self._came(request),
                self._targets(request.targets),
                step=request.step,
                part=request.part,
                inputs_are_boundary=True,
            )
            stepped = wire.Stepped(values={"loss": float(loss)})
        elif self.onward is None:
            return self._going_back(self._enter(request), request)
        else:
            stepped = self.onward.forward(self._enter(request), request, self.runner)
            if request.targets is None:
                return stepped
            decode = self.onward.outward.decode_gradients
            gradients = self.runner.backward(lambda: decode(stepped.gradients))
        advice = self._advisor.after(request, stepped.values["loss"])
        return self._returned(stepped, gradients, advice)

    def _came(self, request: wire.Forward) -> Boundary:
        entering = self.runner.entering
        return self._inward.decode(request.boundary, gradients=entering)

    def _going_back(self, boundary: Boundary, request: wire.Forward) -> wire.Stepped:
        """Reply with the boundary that returns to the device."""
        sent = self._returning.encode_for(self.runner, boundary, request)
        return wire.Stepped(boundary=sent)

    def _enter(self, request: wire.Forward) -> Boundary:
        return self.runner.forward(
            self._came(request),
            step=request.step,
            part=request.part,
            inputs_are_boundary=True,
        )

    def _backward(self, request: wire.Backward) -> wire.Stepped:
        """Run backward from the gradients of the device or of the next edge."""
        stepped, crossing = wire.Stepped(gradients=request.gradients), self._returning
        if self.onward is not None:
            stepped, crossing = self.onward.pass_on(request), self.onward.outward
        decode = crossing.decode_gradients
        gradients = self.runner.backward(lambda: decode(stepped.gradients))
        return self._returned(stepped, gradients)

    def _returned(
        self,
        stepped: wire.Stepped,
        gradients: tuple[Tensor, ...],
        advice: Advice | None = None,
    ) -> wire.Stepped:
        """Reply with this segment's gradients, and add its norms."""
        return wire.Stepped(
            gradients=self._inward.encode_gradients(gradients),
            values=stepped.values,
            norms={**stepped.norms, **self.runner.gradient_norms()},
            advice=advice,
        )

    def _evaluate(self, request: wire.Forward) -> wire.Stepped:
        """Evaluate a batch to the end of the route, or until it returns."""
        with self._turn:
            outputs = self.runner.evaluate(self._came(request))
        if self.onward is not None:
            return self.onward.forward(as_boundary(outputs), request, self.runner)
        if self._answers:
            return wire.Stepped(outputs=pack_targets(outputs))
        if request.targets is None:
            return self._going_back(as_boundary(outputs), request)
        targets = self._targets(request.targets)
        return wire.Stepped(values=self.runner.assess(outputs, targets))

    def _targets(self, packed: WireTensor | tuple[WireTensor, ...]) -> Any:
        like = self.runner.task.example_targets
        return placed(unpack_targets(packed, like=like), self._inward.device)

    def update(self, norm: float | None) -> None:
        """Do the last step's update, if it waited for the norm of all gradients."""
        waits = self.runner.task.max_gradient_norm is not None
        if not waits or self._num_updated == self.num_steps:
            return
        if norm is None:
            raise EdgeError(
                f"session {self.opened.session}: the task clips gradients by their "
                "common norm, and the message has none. Use one release everywhere."
            )
        self._order.forget_reply()
        self.runner.update(norm)
        self._num_updated = self.num_steps

    def finish(self, norm: float | None) -> None:
        """Do the last update, and free what only steps need."""
        self.update(norm)
        self._order.forget_reply()
        self.runner.release_gradients()

    def move(self, request: MoveCut, chain: Chain, make: Make) -> Moved:
        """Move the session's first unit before the next step, exactly once.

        Raises ``OutOfOrderStep`` as ``answer`` does, or ``RefusedMove`` if an exact
        move is impossible; the session is then unchanged.
        """

        def do() -> Moved:
            self.update(request.norm)
            units = range(self.start, self.opened.stop)
            self.runner, reply = moved_session(
                self.runner, chain, units, request, make=make
            )
            self.start = request.start
            self._advisor.cut_moved()
            return reply

        return self._order.answer_move(request, do)


class Advisor:
    """Compare one client with its cohort after each step, if it has one."""

    def __init__(self, opened: wire.OpenSession) -> None:
        self._cohort = opened.cohort
        self._progress = Progress(
            num_examples=opened.num_examples, importance_before=opened.importance
        )
        self._losses: list[tuple[float, int]] = []  # Of the step's micro-batches.

    def after(self, request: wire.Forward, loss: float) -> Advice | None:
        """Say what the client should change, by this step and those before."""
        if self._cohort is None:
            return None
        self._losses.append((loss, request.num_examples))
        if not request.part.is_last:
            return None
        losses, self._losses = self._losses, []
        self._progress, advice = judged(
            self._progress,
            self._cohort,
            loss=mean_loss(losses),
            num_examples=sum(size for _, size in losses),
            step_seconds=request.step_seconds,
        )
        return advice

    def cut_moved(self) -> None:
        """Wait for new measurements before the next change."""
        self._progress = self._progress.restarted()


class RequestOrder:
    """Do each request of one session once and in order; repeat the reply to the last.

    A micro-batch is one request if the route ends at an edge, and two if it ends on the
    device. A request's place is its step, its micro-batch, and whether it is backward.
    """

    def __init__(self, session: str) -> None:
        self._session = session
        self._next: Place = (0, 0, False)
        self._last: tuple[Place, int] | None = None  # With a checksum.
        self._last_reply = wire.Stepped()
        self._num_moves = 0
        self._last_move: tuple[int, Moved] | None = None

    @property
    def num_steps(self) -> int:
        """Steps done."""
        return self._next[0]

    def answer(
        self, request: StepRequest, do: Callable[[], wire.Stepped]
    ) -> wire.Stepped:
        """Do a step's request, or repeat its reply."""
        is_back = isinstance(request, wire.Backward)
        place = (request.step, request.part.index, is_back)
        code = checksum(request)
        if self._last == (place, code):
            return self._last_reply
        if place != self._next:
            is_changed = self._last is not None and place == self._last[0]
            raise self._out_of_order(request, is_changed=is_changed)
        self.forget_reply()
        self._last_reply = do()
        self._last, self._last_move = (place, code), None
        self._next = _place_after(request)
        return self._last_reply

    def answer_move(self, request: MoveCut, do: Callable[[], Moved]) -> Moved:
        """Do a move between two steps, or repeat its reply."""
        code = checksum(request)
        is_between = self._next == (request.step, 0, False)
        is_last = is_between and request.number == self._num_moves - 1
        if is_last and self._last_move is not None and self._last_move[0] == code:
            return self._last_move[1]
        if not is_between or request.number != self._num_moves:
            raise self._out_of_order(request, is_changed=is_last)
        reply = do()
        self._num_moves += 1
        self._last_move = code, reply
        return reply

    def forget_reply(self) -> None:
        """Free the last reply: whoever sends the next request has received it."""
        self._last, self._last_reply = None, wire.Stepped()

    def _out_of_order(
        self, request: StepRequest | MoveCut, *, is_changed: bool
    ) -> OutOfOrderStep:
        what = "was changed" if is_changed else "came"
        return OutOfOrderStep(
            f"session {self._session}: step {request.step} {what} after "
            f"{self.num_steps} steps, in a {type(request).__name__}. The session is "
            "void: this client sits the round out.",
            step=request.step,
            num_steps=self.num_steps,
        )


def _place_after(request: StepRequest) -> Place:
    step, part = request.step, request.part
    if isinstance(request, wire.Forward) and request.targets is None:
        return (step, part.index, True)
    return (step + 1, 0, False) if part.is_last else (step, part.index + 1, False)
