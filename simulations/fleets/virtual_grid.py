"""VirtualGrid: a Flower ``Grid`` whose replies arrive at simulated times.

Clients answer when they are asked, in this process or another, and a reply is handed
out once the fleet's clock says that its device would have sent it. So an asynchronous
run has the same bits each time, on any machine, and its seconds are the devices'.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from flwr_smartsplit.flower.serde.records import config_of, plan_from_config
from flwr_smartsplit.flower.serde.replies import reply_from_content
from simulations.experiments.errors import ExperimentError
from simulations.fleets.clock import Clock

SecondsOf = Callable[[Message, Message], float]
"""``seconds_of(request, reply)`` says how long a client took to answer."""


@dataclass(frozen=True, slots=True, order=True)
class _Due:
    """When a reply arrives; of several at once, the one asked for first."""

    seconds: float
    asked: int  # Counted, since message ids are random
    replies: tuple[Message, ...] = field(compare=False)


class VirtualGrid(Grid):
    """Deliver the replies of another grid at simulated times.

    Parameters
    ----------
    inner : Grid
        Where clients answer, such as a ``LocalGrid``.
    seconds_of : Callable[[Message, Message], float]
        How long each answer takes, in simulated seconds, such as ``seconds_by(clock)``.
    """

    def __init__(self, inner: Grid, seconds_of: SecondsOf) -> None:
        self._inner = inner
        self._seconds_of = seconds_of
        self._now = 0.0
        self._num_asked = 0
        self._due: dict[str, _Due] = {}

    def seconds(self) -> float:
        """Return the simulated time, from 0 on."""
        return self._now

    def wait(self, most_seconds: float) -> None:
        """Let time pass until the next reply arrives, or for so many seconds.

        Raises
        ------
        ExperimentError
            If no reply is to come and the time is without end.
        """
        due = min((each.seconds for each in self._due.values()), default=inf)
        until = min(max(due, self._now), self._now + max(most_seconds, 0.0))
        if until == inf:
            raise ExperimentError(
                "no reply is on its way, and the wait has no end: give a timeout."
            )
        self._now = until

    # --- Flower's interface -------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Take part in another run."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._inner.run

    def create_message(  # noqa: PLR0917 - Flower's signature
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, as Flower's deprecated method does."""
        return self._inner.create_message(
            content, message_type, dst_node_id, group_id, ttl
        )

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes that are there."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let every client answer, and keep the replies until their time."""
        ids = []
        for message in messages:
            (key,) = self._inner.push_messages([message])
            replies = tuple(self._inner.pull_messages([key]))
            self._num_asked += 1
            if replies:
                taken = self._seconds_of(message, replies[0])
                self._due[key] = _Due(self._now + taken, self._num_asked, replies)
            ids.append(key)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out the replies that have arrived, in their order, each once."""
        arrived = sorted(
            (self._due[key], key)
            for key in message_ids
            if key in self._due and self._due[key].seconds <= self._now
        )
        return [reply for _, key in arrived for reply in self._due.pop(key).replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, and wait for all that arrives before the timeout."""
        ids = list(self.push_messages(messages))
        until = self._now + (inf if timeout is None else timeout)
        due = [self._due[key].seconds for key in ids if key in self._due]
        in_time = [seconds for seconds in due if seconds <= until]
        silent = timeout is not None and len(in_time) < len(ids)
        self._now = until if silent else max([self._now, *in_time])
        return self.pull_messages(ids)


def seconds_by(clock: Clock) -> SecondsOf:
    """Let training take as long as a fleet's clock says; all else takes no time."""

    def seconds_of(request: Message, reply: Message) -> float:
        plan = plan_from_config(config_of(request.content))
        if plan is None or reply.has_error():
            return 0.0
        return clock.client_seconds(plan, reply_from_content(reply.content).report)

    return seconds_of
