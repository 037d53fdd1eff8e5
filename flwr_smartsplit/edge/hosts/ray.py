"""RayEdge: an edge as a Ray actor. The only file that imports Ray.

One actor serves many clients: an actor per client was measured to gain nothing.
It asks Ray for no CPU, because Flower fills all of them with clients and would
wait for ever. It never starts or joins a cluster itself: whoever runs the
simulation or the deployment does.
"""

import pickle
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from flwr_smartsplit.edge.protocol import ReplyT, Request, payload_bytes
from flwr_smartsplit.edge.retry import ask_patiently
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.errors import EdgeUnreachable, SmartSplitError
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE, EdgeProfile

_NAMESPACE = "flwr_smartsplit"
# Ray sends arguments of up to 100 KiB inside its message and puts larger ones into
# shared memory, which takes some 4 ms longer there and back. Up to a point, several
# small parts beat one large object (`python -m simulations.benchmarks.step_time`).
_INLINE_BYTES = 96 * 1024
_MOST_BYTES_IN_PARTS = 768 * 1024
_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RayEdge:
    """An edge that runs as an actor of the Ray cluster this process belongs to.

    Parameters
    ----------
    name : str
        The place's name in routes.
    max_concurrency : int
        Requests served at the same time.
    spill_dir : str, optional
        Parent folder for held states and sealed tails, where the actor runs; the
        temporary folder of that machine by default.
    memory_bytes, disk_bytes : int or None
        What its sessions and sealed tails may take; None means no limit.
    flops_per_second : float or None
        Floating-point operations it does in a second, for one client, for whoever
        plans; None if unknown.
    resources : Mapping[str, float], optional
        Custom resources of Ray that the actor asks for, such as ``{"berlin": 0.001}``:
        it then runs on a machine that offers them.
    room_patience_seconds : float
        How long a client waits for room.
    patience_seconds : float
        How long to wait for Ray to come up, or for a restarting edge.
    timeout_seconds : float
        How long one request may take.

    Examples
    --------
    >>> RayEdge(name="berlin").name
    'berlin'
    """

    name: str = EDGE
    max_concurrency: int = 8
    spill_dir: str | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    flops_per_second: float | None = None
    resources: Mapping[str, float] | None = None
    room_patience_seconds: float = 600.0
    patience_seconds: float = 60.0
    timeout_seconds: float = 600.0

    @property
    def profile(self) -> EdgeProfile:
        """What the edge offers."""
        return EdgeProfile(
            name=self.name,
            memory_bytes=self.memory_bytes,
            disk_bytes=self.disk_bytes,
            flops_per_second=self.flops_per_second,
        )

    def start(self, task: Task) -> str:
        """Start the actor for one run, and return the name it is reached by.

        Raises
        ------
        EdgeUnreachable
            If this process does not get a Ray cluster in time, or the cluster has no
            machine for the actor.
        """
        deadline = time.monotonic() + self.patience_seconds
        while not ray.is_initialized():
            # Flower's simulation brings Ray up in another thread.
            if time.monotonic() > deadline:
                raise EdgeUnreachable(
                    f"edge {self.name!r}: this process has no Ray cluster after "
                    f"{self.patience_seconds:.0f} s. Run under Flower's simulation "
                    "engine, or call ray.init() first."
                )
            time.sleep(_PAUSE_SECONDS)
        address = f"{self.name}-{uuid.uuid4().hex[:12]}"
        actor: Any = ray.remote(_EdgeActor).options(
            name=address,
            namespace=_NAMESPACE,
            num_cpus=0,
            resources=dict(self.resources or {}),
            max_restarts=-1,
            max_concurrency=self.max_concurrency,
        )
        handle = actor.remote(task, address, self)
        _actors[address] = (handle, _folder(self.spill_dir, address))
        try:
            folder = ray.get(handle.ready.remote(), timeout=self.timeout_seconds)
        except RayError as error:
            self.stop(address)
            asked = dict(self.resources or {})
            raise EdgeUnreachable(
                f"edge {self.name!r} cannot start: {error}"
                + (f" It asks for {asked} of one machine." if asked else "")
            ) from error
        _actors[address] = (handle, folder)
        return address

    def connect(self, address: str) -> "RayTransport":
        """Reach the actor by its name.

        Raises
        ------
        EdgeUnreachable
            If this process is outside a Ray cluster, or the actor is gone.
        """
        if not ray.is_initialized():
            raise EdgeUnreachable(
                f"edge {address!r}: this process belongs to no Ray cluster. Call "
                "ray.init(address=...) in it first."
            )
        try:
            actor = ray.get_actor(address, namespace=_NAMESPACE)
        except ValueError as error:
            raise EdgeUnreachable(
                f"edge {address!r} is not running in namespace {_NAMESPACE!r}: {error}"
            ) from error
        return RayTransport(actor, address, self)

    def stop(self, address: str) -> None:
        """End the actor and delete its files."""
        if address not in _actors:
            return
        handle, folder = _actors.pop(address)
        if not ray.is_initialized():  # Its actors went with it.
            shutil.rmtree(folder, ignore_errors=True)
            return
        try:
            ray.get(handle.clean_up.remote(), timeout=self.patience_seconds)
        except RayError:
            # A dead actor cleans nothing; this helps if it was on this machine.
            shutil.rmtree(folder, ignore_errors=True)
        ray.kill(handle, no_restart=True)


_actors: dict[str, tuple[Any, Path]] = {}
"""The actors that this process started; Ray ends one with its last handle."""


@dataclass(frozen=True, slots=True)
class RayTransport:
    """Send requests to one actor; requests may be repeated, so it retries."""

    actor: Any
    address: str
    edge: RayEdge

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Deliver the request and return its reply, or raise what the edge raised."""
        patience_seconds = self.edge.room_patience_seconds
        return ask_patiently(lambda: self._sent(request), patience_seconds)

    def _sent(self, request: Request[ReplyT]) -> ReplyT:
        """Deliver the request, also to an edge that is being restarted."""
        deadline = float("inf")
        while True:
            try:
                return self._ask(request)
            except RayTaskError as error:
                is_ours = isinstance(error.cause, SmartSplitError)
                raise error.cause from (None if is_ours else error)
            except ActorUnavailableError as error:
                now = time.monotonic()
                deadline = min(deadline, now + self.edge.patience_seconds)
                if now >= deadline:
                    raise self._unreachable(error) from error
                time.sleep(_PAUSE_SECONDS)
            except RayError as error:
                raise self._unreachable(error) from error

    def _ask(self, request: Request[ReplyT]) -> ReplyT:
        """Send as one object, or in parts if that is faster."""
        timeout = self.edge.timeout_seconds
        reply: ReplyT
        if not _INLINE_BYTES < payload_bytes(request) <= _MOST_BYTES_IN_PARTS:
            reply = ray.get(self.actor.handle.remote(request), timeout=timeout)
            return reply
        data = pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL)
        num_parts = len(data) // _INLINE_BYTES + 2
        ask = self.actor.handle_parts.options(num_returns=num_parts)
        parts = ray.get(ask.remote(*_divide(data, num_parts)), timeout=timeout)
        reply = pickle.loads(b"".join(parts))
        return reply

    def _unreachable(self, error: Exception) -> EdgeUnreachable:
        return EdgeUnreachable(
            f"edge {self.address!r} does not answer ({type(error).__name__}): its "
            "unmerged sessions are lost; clients of other edges go on."
        )


class _EdgeActor:
    """An ``EdgeService`` in a process of its own; each start is an incarnation."""

    def __init__(self, task: Task, address: str, edge: RayEdge) -> None:
        self._folder = _folder(edge.spill_dir, address)
        self._service = EdgeService(
            task,
            spill_dir=self._folder,
            incarnation=uuid.uuid4().hex,
            # An edge that waits for another would keep its own clients waiting.
            connect=lambda place, address: replace(
                edge, name=place, room_patience_seconds=0.0
            ).connect(address),
            profile=edge.profile,
        )

    def ready(self) -> Path:
        return self._folder

    def handle(self, request: Request[ReplyT]) -> ReplyT:
        return self._service.handle(request)

    def handle_parts(self, *parts: bytes) -> tuple[bytes, ...]:
        """Answer a request that came in parts, in as many parts."""
        reply = self._service.handle(pickle.loads(b"".join(parts)))
        data = pickle.dumps(reply, protocol=pickle.HIGHEST_PROTOCOL)
        return _divide(data, len(parts))

    def clean_up(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _folder(parent: str | None, address: str) -> Path:
    """Name the folder of one actor on the machine that this is called on."""
    return Path(parent or tempfile.gettempdir()) / f"smartsplit-{address}"


def _divide(data: bytes, num_parts: int) -> tuple[bytes, ...]:
    """Cut bytes into parts that Ray sends inline; a last one takes what is left."""
    ends = [index * _INLINE_BYTES for index in range(num_parts)]
    return (
        *(data[low:high] for low, high in pairwise(ends)),
        data[ends[-1] :],
    )
