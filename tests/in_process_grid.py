"""A Flower ``Grid`` in this process: client apps answer at once, no Ray, no network.

It behaves as Flower's simulation does: node ids are random, every message is a copy,
an exception in a client becomes an error reply, a client's state is rolled back with
it. Replies of a given node can be lost, come late, come twice, or be altered.
"""

import copy
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.superlink.linkstate.utils import (
    create_message_error_unavailable_ins_message,
)

from simulations.experiments.local_grid import LocalGrid

Fate = Callable[[Message], list[Message]]
"""What is delivered now, given the reply of one client."""


class InProcessGrid(LocalGrid):
    """Deliver messages to client apps in this process, or lose them.

    Parameters
    ----------
    apps : Sequence[ClientApp]
        One per node, in the order of their partition ids.

    Attributes
    ----------
    node_ids : list[int]
        Random in every instance, in the order of the partition ids.
    sent, replied : list[Message]
        Everything that was pushed, and everything that a client answered.
    """

    def __init__(self, apps: Sequence[ClientApp]) -> None:
        self.node_ids = [secrets.randbits(62) + 2 for _ in apps]
        super().__init__(apps, run_id=secrets.randbits(32), node_ids=self.node_ids)
        self.hidden: set[int] = set()
        self.sent: list[Message] = []
        self.replied: list[Message] = []
        self._late: list[Message] = []
        self._fates: dict[tuple[int, str, int], Fate] = {}
        self._num_asked: Counter[tuple[int, str]] = Counter()

    # --- faults -------------------------------------------------------------------

    def lose(self, partition: int, *, nth: int, kind: str = "train") -> None:
        """Lose a node's reply to its nth message of a kind, counted from 1."""
        self._destine(partition, kind, nth, lambda reply: [])

    def delay(self, partition: int, *, nth: int, kind: str = "train") -> None:
        """Deliver a reply with the next round's replies of the same kind."""
        self._destine(partition, kind, nth, self._postpone)

    def duplicate(self, partition: int, *, nth: int, kind: str = "train") -> None:
        """Deliver a reply twice."""
        self._destine(partition, kind, nth, lambda reply: [reply, copy.deepcopy(reply)])

    def fail_at_superlink(
        self, partition: int, *, nth: int, kind: str = "train"
    ) -> None:
        """Replace a reply by an error that the SuperLink makes in its own name."""

        def fate(reply: Message) -> list[Message]:
            asked = reply.metadata.reply_to_message_id
            return [create_message_error_unavailable_ins_message(asked, 1)]

        self._destine(partition, kind, nth, fate)

    def alter(
        self,
        partition: int,
        change: Callable[[RecordDict], None],
        *,
        nth: int,
        kind: str = "train",
    ) -> None:
        """Change a reply's content before it is delivered."""

        def fate(reply: Message) -> list[Message]:
            change(reply.content)
            return [reply]

        self._destine(partition, kind, nth, fate)

    def _destine(self, partition: int, kind: str, nth: int, fate: Fate) -> None:
        self._fates[self.node_ids[partition], kind, nth] = fate

    def _postpone(self, reply: Message) -> list[Message]:
        self._late.append(reply)
        return []

    # --- Flower's interface -------------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes that are there, in an order that means nothing."""
        return sorted(set(self.node_ids) - self.hidden)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, and pull at once; who has not answered by then has timed out."""
        del timeout
        postponed = list(self._late)
        pushed = list(messages)
        replies = list(self.pull_messages(self.push_messages(pushed)))
        kinds = {message.metadata.message_type for message in pushed}
        due = [reply for reply in postponed if reply.metadata.message_type in kinds]
        self._late = [reply for reply in self._late if reply not in due]
        return [*due, *replies]

    def _answers(self, message: Message) -> list[Message]:
        self.sent.append(message)
        asked = message.metadata.dst_node_id, message.metadata.message_type
        self._num_asked[asked] += 1
        (reply,) = super()._answers(message)
        self.replied.append(copy.deepcopy(reply))
        fate = self._fates.get((*asked, self._num_asked[asked]))
        return [reply] if fate is None else fate(reply)
