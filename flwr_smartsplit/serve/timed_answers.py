"""TimedAnswers: waits for an edge for a time, and not longer.

What takes longer goes on in its own thread; until it ends, nothing else is asked. So an
edge that hangs holds one thread and one request of a device, however many batches come.
"""

from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from flwr_smartsplit.edge.protocol import ReplyT, Request, Transport
from flwr_smartsplit.errors import EdgeUnreachable

AnswerT = TypeVar("AnswerT")


class TimedAnswers:
    """Ask something in a thread, and wait for the answer up to a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._asking: Thread | None = None

    @property
    def is_waiting(self) -> bool:
        """Say whether something that came too late has still not come."""
        return self._asking is not None and self._asking.is_alive()

    def require_none_late(self) -> None:
        """Raise ``EdgeUnreachable`` while something that came too late is awaited."""
        if self.is_waiting:
            raise EdgeUnreachable(
                "the edge has still not answered a request that it had "
                f"{self._seconds:g} s for: nothing else is asked until it has."
            )

    def of(self, ask: Callable[[], AnswerT]) -> AnswerT:
        """Return the answer; raise its error, or ``EdgeUnreachable`` if it is late."""
        self.require_none_late()
        answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._asking = Thread(target=_ask, args=(ask, answers), daemon=True)
        self._asking.start()
        try:
            answer, error = answers.get(timeout=self._seconds)
        except Empty:
            raise EdgeUnreachable(
                f"the edge did not answer within {self._seconds:g} s: look at its log, "
                "or raise timeout_seconds."
            ) from None
        self._asking.join()
        self._asking = None
        if error is not None:
            raise error
        found: AnswerT = answer
        return found


def _ask(
    ask: Callable[[], Any], answers: "SimpleQueue[tuple[Any, BaseException | None]]"
) -> None:
    try:
        answers.put((ask(), None))
    except BaseException as error:
        answers.put((None, error))


@dataclass(frozen=True, slots=True)
class TimedTransport:
    """Send through another transport, and wait for each answer up to a time."""

    inner: Transport
    answers: TimedAnswers

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Send; raise ``EdgeUnreachable`` if the answer is late."""
        return self.answers.of(lambda: self.inner.send(request))
