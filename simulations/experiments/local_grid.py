"""LocalGrid: Flower's ``Grid`` in this process, whose clients answer one by one.

A study runs many short rounds, most of whose time would go into carrying messages to
other processes. Strategies and client apps are the same as under Flower's simulation
engine, and so are the bits that come out; a test compares them.
"""

import copy
import time
import traceback
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

CLIENT_APP_RAISED_EXCEPTION = 2
"""Flower's code for it."""

_PAUSE_SECONDS = 0.1
RUN_ID = 1
FIRST_NODE_ID = 2
"""Nodes are numbered by client, so that strategies which draw from them draw the same
in every run; 1 is the server."""


@dataclass
class Node:
    """One client: its app, and what Flower keeps for it."""

    app: ClientApp
    context: Context


class LocalGrid(Grid):
    """Deliver messages to client apps in this process.

    Parameters
    ----------
    apps : Sequence[ClientApp]
        One per client, in the order of their partition ids.
    run_id : int
        The run's number.
    node_ids : Sequence[int], optional
        The clients' nodes, in the same order.
    """

    def __init__(
        self,
        apps: Sequence[ClientApp],
        *,
        run_id: int = RUN_ID,
        node_ids: Sequence[int] | None = None,
    ) -> None:
        self._run = Run.create_empty(run_id)
        # Flower's ``Message`` reads whose process it is made in.
        TaskIdentity.run_id, TaskIdentity.node_id = run_id, 1
        TaskIdentity.task_id = 1
        if node_ids is None:
            node_ids = range(FIRST_NODE_ID, FIRST_NODE_ID + len(apps))
        self._nodes: dict[int, Node] = {}
        for partition, (app, node_id) in enumerate(zip(apps, node_ids, strict=True)):
            context = Context(
                run_id,
                node_id,
                {"partition-id": partition, "num-partitions": len(apps)},
                RecordDict(),
                {},
            )
            self._nodes[node_id] = Node(app, context)
        self._replies: dict[str, list[Message]] = {}

    def set_run(self, run: Run) -> None:
        """Take part in another run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(  # noqa: PLR0917 - Flower's signature
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
        """List the nodes in the order of the clients."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let every client answer, and keep the replies until they are pulled."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            self._replies[message.metadata.message_id] = self._answers(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out replies, each once."""
        return [reply for key in message_ids for reply in self._replies.pop(key, [])]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, and pull at once; nobody is late."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _answers(self, message: Message) -> list[Message]:
        """Run a client; its exception is a reply, and its state rolls back."""
        node = self._nodes[message.metadata.dst_node_id]
        context = copy.deepcopy(node.context)
        try:
            reply = node.app(copy.deepcopy(message), context)
        except Exception:
            error = Error(CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc())
            reply = Message(error, reply_to=message)
        else:
            node.context = context
        reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        return [copy.deepcopy(reply)]


def awaited_nodes(grid: Grid, num_clients: int) -> list[int]:
    """Wait until a grid, of whatever kind, has so many nodes; return their ids."""
    while len(nodes := list(grid.get_node_ids())) < num_clients:
        time.sleep(_PAUSE_SECONDS)
    return nodes
