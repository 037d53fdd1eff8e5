"""Edges that die and transports that misbehave: more implementations of the seams."""

import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.edge.state_store import StateStore
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import EdgeError, EdgeUnreachable
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE, EdgeProfile, Receipt

Deliver = Callable[[Any], Any]
Hook = Callable[[Any, Deliver], Any]
"""``hook(request, deliver)`` answers a request, by delivering it or not."""


@dataclass(frozen=True)
class HookedTransport:
    """Let a hook decide what becomes of each request to another transport."""

    inner: wire.Transport
    hook: Hook

    def send(self, request: wire.Request[wire.ReplyT]) -> wire.ReplyT:
        """Answer through the hook."""
        reply: wire.ReplyT = self.hook(request, self.inner.send)
        return reply


def deliver_all(request: Any, deliver: Deliver) -> Any:
    """Do nothing special."""
    return deliver(request)


class MortalEdge:
    """An edge in this process that can be killed and restarted at any moment.

    It has no gate, so that tests may ask it anything.

    Parameters
    ----------
    folder : Path
        Its spill folder, which outlives it.
    name : str
        The place's name in routes.
    hook : Hook
        Stands between everybody and the edge.
    """

    def __init__(
        self, folder: Path, *, name: str = EDGE, hook: Hook = deliver_all
    ) -> None:
        self.name = name
        self.profile = EdgeProfile(name=name)
        self.admin_secret = ""
        self.folder = folder
        self.hook = hook
        self.neighbours: dict[str, MortalEdge] = {}
        self.num_starts = 0
        self.requests: list[Any] = []
        self._task: Task | None = None
        self._service: EdgeService | None = None
        self._address = ""

    def start(self, task: Task) -> str:
        """Start at a new address."""
        self._task = task
        self._address = f"{self.name}-{uuid.uuid4().hex[:8]}"
        self.restart()
        return self._address

    def connect(self, address: str) -> wire.Transport:
        """Reach the edge, whichever life it is in."""
        if address != self._address:
            raise EdgeUnreachable(f"no edge at {address!r}.")
        local = wire.LocalTransport(self._handle)
        return HookedTransport(local, self._ask_hook)

    def stop(self, address: str) -> None:
        """End the edge and delete its files."""
        if address == self._address:
            self.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """Lose everything that is in memory, and answer nobody."""
        self._service = None

    def restart(self) -> None:
        """Begin a new life with whatever lies in the spill folder."""
        assert self._task is not None
        self.num_starts += 1
        self._service = EdgeService(
            self._task,
            spill_dir=self.folder,
            incarnation=f"life {self.num_starts}",
            connect=lambda place, address: self.neighbours[place].connect(address),
        )

    def _ask_hook(self, request: Any, deliver: Deliver) -> Any:
        return self.hook(request, deliver)

    def _handle(self, request: Any) -> Any:
        if isinstance(request, wire.Hello):
            return wire.Welcome()
        if isinstance(request, wire.EndRun):
            return None
        self.requests.append(_without_payload(request))
        if self._service is None:
            raise EdgeUnreachable(f"edge {self.name!r} is dead.")
        return self._service.handle(request)


def _without_payload(request: Any) -> Any:
    """Leave tensors out: to remember them would keep the device's memory in use."""
    parts: dict[str, Any] = {}
    if isinstance(request, wire.Forward):
        parts["boundary"] = ()
        if request.targets is not None:
            empty = torch.empty(request.num_examples, 0)
            parts["targets"] = WireTensor.pack(empty)
    if isinstance(request, wire.Backward):
        parts["gradients"] = ()
    if isinstance(request, MoveCut):
        parts["units"] = None
    return replace(request, **parts)


def tail_files(folder: Path, session: str = "") -> list[Path]:
    """List the sealed tails of one session, or of all."""
    if session:
        path = StateStore(folder)._tail_path(session)
        return [path] if path.exists() else []
    return sorted(folder.glob("*.tail.*"))


def lost_reply(kind: type, then: Callable[[], None]) -> Hook:
    """Lose the first reply to a kind of request; ``then`` happens; it is repeated.

    This is what a transport does that waits for a restarting edge.
    """
    lost: list[Any] = []

    def hook(request: Any, deliver: Deliver) -> Any:
        if isinstance(request, kind) and not lost:
            lost.append(deliver(request))
            then()
        return deliver(request)

    return hook


def poisoned_steps(session: str) -> Hook:
    """Give one session's tail values that are not numbers; its device sees zeros."""

    def hook(request: Any, deliver: Deliver) -> Any:
        if not isinstance(request, wire.Forward) or request.session != session:
            return deliver(request)
        boundary = request.boundary[0].unpack()
        poison = WireTensor.pack(torch.full_like(boundary, float("nan")))
        reply = deliver(replace(request, boundary=(poison,)))
        zeros = WireTensor.pack(torch.zeros_like(boundary))
        return replace(reply, gradients=(zeros,))

    return hook


def forged_seal(session: str, receipt: Receipt, *, delivers: bool) -> Hook:
    """Hand out a receipt that the edge never wrote.

    Parameters
    ----------
    session : str
        Whose seal is forged.
    receipt : Receipt
        What the device is given.
    delivers : bool
        Whether the edge hears of the request; its refusal is kept from the device.
    """

    def hook(request: Any, deliver: Deliver) -> Any:
        if not isinstance(request, wire.Seal) or request.session != session:
            return deliver(request)
        if delivers:
            try:
                deliver(request)
            except EdgeError:
                pass
        return (replace(receipt, num_steps=request.num_steps),)

    return hook


def both(one: Hook, other: Hook) -> Hook:
    """Let a request pass one hook, then another."""
    return lambda request, deliver: one(request, lambda r: other(r, deliver))
