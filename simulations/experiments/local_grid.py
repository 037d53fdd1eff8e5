"""LocalGrid: Flower's ``Grid`` in this process, whose clients answer one by one.

A study runs many short rounds, most of whose time would go into carrying messages to
other processes. Strategies and client apps are the same as under Flower's simulation
engine, and so are the bits that come out; a test compares them.
"""

import copy
import traceback
import uuid
from collections.abc import Iterable
from typing import final

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

CLIENT_APP_RAISED_EXCEPTION = 2
"""Flower's code for it."""

RUN_ID = 1
FIRST_NODE_ID = 2
"""Nodes are numbered by client, so that strategies which draw from them draw the same
in every run; 1 is the server."""


@final
class LocalGrid(Grid):
    """Deliver messages to a client app in this process."""

    def __init__(self, app: ClientApp, num_clients: int) -> None:
        self._app = app
        self._run = Run.create_empty(RUN_ID)
        # Flower's ``Message`` reads whose process it is made in.
        TaskIdentity.run_id, TaskIdentity.node_id = RUN_ID, 1
        TaskIdentity.task_id = 1
        self._contexts = {
            FIRST_NODE_ID + client: Context(
                RUN_ID,
                FIRST_NODE_ID + client,
                {"partition-id": client, "num-partitions": num_clients},
                RecordDict(),
                {},
            )
            for client in range(num_clients)
        }
        self._replies: dict[str, Message] = {}

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
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let every client answer, and keep the replies until they are pulled."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            self._replies[message.metadata.message_id] = self._answer(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out replies, each once."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, and pull at once; nobody is late."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        """Run a client; its exception is a reply, and its state rolls back."""
        node = message.metadata.dst_node_id
        context = copy.deepcopy(self._contexts[node])
        received = copy.deepcopy(message)
        try:
            reply = self._app(received, context)
        except Exception:
            error = Error(CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc())
            reply = Message(error, reply_to=message)
        else:
            self._contexts[node] = context
        reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        return copy.deepcopy(reply)
