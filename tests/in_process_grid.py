"""A Flower ``Grid`` in this process: client apps answer at once, no Ray, no network.

It behaves as Flower's simulation does: node ids are random, every message is a copy,
an exception in a client becomes an error reply, a client's state is rolled back with
it. Replies of a given node can be lost, come late, come twice, or be altered.
"""

import copy
import secrets
import traceback
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

try:  # Flower moves its inner modules between releases.
    from flwr.supercore.run import Run
except ModuleNotFoundError:
    from flwr.common.typing import Run
try:
    from flwr.supercore.task_identity import TaskIdentity
except ModuleNotFoundError:
    TaskIdentity = SimpleNamespace()

CLIENT_APP_RAISED_EXCEPTION = 2
Fate = Callable[[Message], list[Message]]
"""What is delivered now, given the reply of one client."""


@dataclass
class Node:
    """One client: its app, and what Flower keeps for it."""

    app: ClientApp
    context: Context
    num_asked: dict[str, int] = field(default_factory=dict)
    fates: dict[tuple[str, int], Fate] = field(default_factory=dict)


class InProcessGrid(Grid):
    """Deliver messages to client apps in this process.

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
        self._run = Run.create_empty(secrets.randbits(32))
        # Flower's ``Message`` reads whose process it is made in.
        TaskIdentity.run_id, TaskIdentity.node_id = self._run.run_id, 1
        TaskIdentity.task_id = 1
        self._nodes: dict[int, Node] = {}
        for partition, app in enumerate(apps):
            node_id = secrets.randbits(62) + 2
            config = {"partition-id": partition, "num-partitions": len(apps)}
            context = Context(self._run.run_id, node_id, config, RecordDict(), {})
            self._nodes[node_id] = Node(app, context)
        self.node_ids = list(self._nodes)
        self.hidden: set[int] = set()
        self.sent: list[Message] = []
        self.replied: list[Message] = []
        self._ready: dict[str, list[Message]] = {}
        self._late: list[Message] = []

    # --- faults -------------------------------------------------------------------

    def lose(self, partition: int, *, nth: int, kind: str = "train") -> None:
        """Lose a node's reply to its nth message of a kind, counted from 1."""
        self._destine(partition, kind, nth, lambda reply: [])

    def delay(self, partition: int, *, nth: int, kind: str = "train") -> None:
        """Deliver a reply with the next round's replies of the same kind."""
        self._destine(partition, kind, nth, self._postpone)

    def duplicate(self, partition: int, *, nth: int, kind: str = "train") -> None:
        """Deliver a reply twice."""
        self._destine(partition, kind, nth, lambda reply: [reply, _copied(reply)])

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
        self._nodes[self.node_ids[partition]].fates[kind, nth] = fate

    def _postpone(self, reply: Message) -> list[Message]:
        self._late.append(reply)
        return []

    # --- Flower's interface -------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Take part in another run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, as Flower's deprecated method does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes that are there, in an order that means nothing."""
        return sorted(set(self.node_ids) - self.hidden)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let every client answer, and keep the replies until they are pulled."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            self.sent.append(message)
            self._ready[message.metadata.message_id] = self._answers(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out replies, each once."""
        return [reply for key in message_ids for reply in self._ready.pop(key, [])]

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
        node = self._nodes[message.metadata.dst_node_id]
        kind = message.metadata.message_type
        node.num_asked[kind] = node.num_asked.get(kind, 0) + 1
        reply = _copied(_handle(node, _copied(message)))
        reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        self.replied.append(_copied(reply))
        fate = node.fates.get((kind, node.num_asked[kind]))
        return [reply] if fate is None else fate(reply)


def _handle(node: Node, message: Message) -> Message:
    """Run a client; its exception is a reply, and its state rolls back."""
    context = copy.deepcopy(node.context)
    try:
        reply = node.app(message, context)
    except Exception:
        reason = traceback.format_exc()
        return Message(Error(CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    node.context = context
    return reply


def _copied(message: Message) -> Message:
    """Share nothing between sender and receiver, as no network would."""
    return copy.deepcopy(message)
