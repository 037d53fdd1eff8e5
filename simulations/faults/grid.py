"""ProcessGrid: Flower's ``Grid`` whose nodes are processes, which can be killed.

A node runs its client for one message at a time, beside the others. If its process
dies, the strategy is told so, as the SuperLink tells it, and another one takes the
next message. What comes after the timeout is lost.
"""

import copy
import traceback
import uuid
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from simulations.experiments.local_grid import (
    CLIENT_APP_RAISED_EXCEPTION,
    RUN_ID,
    LocalGrid,
)
from simulations.faults import moments

_MOST_LIVES = 3
_MODULES = ["flwr.serverapp", "simulations.faults.warm"]

MakeApp = Callable[[moments.Here], ClientApp]
"""Makes a node's app, in its process."""


def processes() -> Any:
    """Return how processes are started: from one that has loaded all modules."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    return context


@dataclass(frozen=True, slots=True)
class Station:
    """What a node runs, and where."""

    here: moments.Here
    make_app: MakeApp


@dataclass
class _Process:
    """The process of a node: the first that lives of a few that were forked early.

    Later, this process has threads, and must not be forked any more.
    """

    station: Station
    waiting: list[tuple[Any, Connection]]
    lock: Lock = field(default_factory=Lock)

    def ask(self, message: Message, context: Context) -> tuple[Message, Context]:
        """Hand a message to the process; raise EOFError if it dies."""
        with self.lock:
            while not self.waiting[0][0].is_alive():
                self._end_first()
            process, pipe = self.waiting[0]
            here = self.station.here
            moments.write_pid(here.folder, here.who, process.pid)
            pipe.send((message, context))
            reply: tuple[Message, Context] = pipe.recv()
            return reply

    def stop(self) -> None:
        """End all."""
        while self.waiting:
            self._end_first()

    def kill(self) -> None:
        """Kill the one that may be at work."""
        self.waiting[0][0].kill()

    def _end_first(self) -> None:
        process, pipe = self.waiting.pop(0)
        pipe.close()
        process.kill()
        process.join()
        process.close()


def _forked(stations: Sequence[Station]) -> list[_Process]:
    """Fork each node's processes."""
    fork = get_context("fork")
    pipes = [[fork.Pipe() for _ in range(_MOST_LIVES)] for _ in stations]
    made = []
    for station, own in zip(stations, pipes, strict=True):
        waiting = []
        for near, far in own:
            others = {end for row in pipes for pair in row for end in pair} - {far}
            process = fork.Process(target=_serve, args=(station, far, others))
            process.start()
            waiting.append((process, near))
        made.append(_Process(station, waiting))
    for _, far in (pair for row in pipes for pair in row):
        far.close()
    return made


class ProcessGrid(LocalGrid):
    """Deliver messages to processes.

    Parameters
    ----------
    stations : Sequence[Station]
        One per node, in the order of their partition ids.
    absent : Set[tuple[str, int]]
        Who answers no training message of which round, without any fault.
    """

    def __init__(
        self, stations: Sequence[Station], *, absent: Set[tuple[str, int]] = frozenset()
    ) -> None:
        super().__init__([ClientApp() for _ in stations])
        self._processes = dict(zip(self._nodes, _forked(stations), strict=True))
        self._absent = absent
        self._pool = ThreadPoolExecutor(2 * len(stations), "node")
        self._asked: dict[str, Future[Message]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the nodes."""
        ids = []
        for message in messages:
            key = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = key
            self._asked[key] = self._pool.submit(self._answer, copy.deepcopy(message))
            ids.append(key)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out the replies that are there, each once."""
        done = [key for key in message_ids if self._asked[key].done()]
        return [self._asked.pop(key).result() for key in done]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, wait, and forget what comes too late."""
        ids = list(self.push_messages(messages))
        wait([self._asked[key] for key in ids], timeout)
        replies = list(self.pull_messages(ids))
        for key in ids:
            self._asked.pop(key, None)
        return replies

    def close(self) -> None:
        """End the nodes."""
        for each in self._processes.values():
            each.kill()
        self._pool.shutdown(cancel_futures=True)
        for each in self._processes.values():
            each.stop()

    def _answer(self, message: Message) -> Message:
        to = message.metadata.dst_node_id
        node, process = self._nodes[to], self._processes[to]
        asked = process.station.here.who, _round_of(message)
        if message.metadata.message_type == MessageType.TRAIN and asked in self._absent:
            error = Error(CLIENT_APP_RAISED_EXCEPTION, "absent")
            return self._stamped(Message(error, reply_to=message))
        try:
            reply, node.context = process.ask(message, node.context)
        except (EOFError, OSError):
            # Flower says so 51 seconds later.
            error = Error(ErrorCode.CLIENT_APP_CRASHED, "ClientApp stopped responding.")
            reply = Message(error, reply_to=message)
        return self._stamped(reply)

    @staticmethod
    def _stamped(reply: Message) -> Message:
        reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        return reply


def _round_of(message: Message) -> int:
    """Find a training message's round, wherever its API writes it."""
    records = message.content.values()
    for record in (each for each in records if isinstance(each, ConfigRecord)):
        for name in ("server-round", "smartsplit.round"):
            if isinstance(found := record.get(name), int):
                return found
    return 0


def _serve(station: Station, pipe: Connection, others: Set[Connection]) -> None:
    """Be a node until the pipe closes, whose other end only the strategy has."""
    for other in others:
        other.close()
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = RUN_ID
    app = station.make_app(station.here)
    while True:
        try:
            message, context = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            kept = copy.deepcopy(context)
            reply = app(message, context)
        except Exception:
            error = Error(CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc())
            reply, context = Message(error, reply_to=message), kept
        try:
            pipe.send((reply, context))
        except OSError:
            return
