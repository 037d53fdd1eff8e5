"""RayEdge: an edge as a Ray actor. The only file that imports Ray.

One actor serves many clients: an actor per client was measured to gain nothing.
It asks Ray for no CPU, because Flower fills all of them with clients and would
wait for ever. It never starts or joins a cluster itself: whoever runs the
simulation or the deployment does.
"""

import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, RayError

from flwr_smartsplit.edge.hosts.edge import BytesTransport, Edge, answered
from flwr_smartsplit.edge.message_bytes import Piece
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.errors import EdgeUnreachable
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE, EdgeProfile

_NAMESPACE = "flwr_smartsplit"
# Ray sends arguments of up to 100 KiB inside its message and puts larger ones into
# shared memory, which takes some 4 ms longer there and back. Up to a point, several
# small parts beat one large object (`python -m simulations.benchmarks.step_time`).
_INLINE_BYTES = 96 * 1024
_MOST_BYTES_IN_PARTS = 768 * 1024
_PAUSE_SECONDS = 0.2


def RayEdge(  # noqa: PLR0913 - what an edge offers, and where it runs
    *,
    name: str = EDGE,
    max_concurrency: int = 8,
    spill_dir: str | None = None,
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    flops_per_second: float | None = None,
    resources: Mapping[str, float] | None = None,
    room_patience_seconds: float = 600.0,
    patience_seconds: float = 60.0,
    timeout_seconds: float = 600.0,
) -> Edge:
    """Describe an edge that runs as an actor of the Ray cluster of this process.

    Parameters
    ----------
    name, memory_bytes, disk_bytes, flops_per_second
        As in ``EdgeProfile``.
    room_patience_seconds : float
        How long a client waits for room.
    max_concurrency, spill_dir, resources, patience_seconds, timeout_seconds
        As in ``RayHost``.

    Examples
    --------
    >>> RayEdge(name="berlin").name
    'berlin'
    """
    profile = EdgeProfile(
        name=name,
        memory_bytes=memory_bytes,
        disk_bytes=disk_bytes,
        flops_per_second=flops_per_second,
    )
    host = RayHost(
        max_concurrency=max_concurrency,
        spill_dir=spill_dir,
        resources=resources,
        patience_seconds=patience_seconds,
        timeout_seconds=timeout_seconds,
    )
    return Edge(profile, host, room_patience_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayHost:
    """Run edges as actors.

    Parameters
    ----------
    max_concurrency : int
        Requests served at the same time.
    spill_dir : str, optional
        Parent folder for held states and sealed tails, where the actor runs; the
        temporary folder of that machine by default.
    resources : Mapping[str, float], optional
        Custom resources of Ray that the actor asks for, such as ``{"berlin": 0.001}``:
        it then runs on a machine that offers them.
    patience_seconds : float
        How long to wait for Ray to come up, or for a restarting edge.
    timeout_seconds : float
        How long one request may take.
    """

    max_concurrency: int = 8
    spill_dir: str | None = None
    resources: Mapping[str, float] | None = None
    patience_seconds: float = 60.0
    timeout_seconds: float = 600.0

    def start(self, task: Task, profile: EdgeProfile) -> str:
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
                    f"edge {profile.name!r}: this process has no Ray cluster after "
                    f"{self.patience_seconds:.0f} s. Run under Flower's simulation "
                    "engine, or call ray.init() first."
                )
            time.sleep(_PAUSE_SECONDS)
        address = f"{profile.name}-{uuid.uuid4().hex[:12]}"
        actor: Any = ray.remote(_EdgeActor).options(
            name=address,
            namespace=_NAMESPACE,
            num_cpus=0,
            resources=dict(self.resources or {}),
            max_restarts=-1,
            max_concurrency=self.max_concurrency,
        )
        handle = actor.remote(task, address, profile, self)
        _actors[address] = (handle, _folder(self.spill_dir, address))
        try:
            folder = ray.get(handle.ready.remote(), timeout=self.timeout_seconds)
        except RayError as error:
            self.stop(address)
            asked = dict(self.resources or {})
            raise EdgeUnreachable(
                f"edge {profile.name!r} cannot start: {error}"
                + (f" It asks for {asked} of one machine." if asked else "")
            ) from error
        _actors[address] = (handle, folder)
        return address

    def connect(self, address: str) -> BytesTransport:
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
        return BytesTransport(_Carrier(actor, address, self).carry)

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
class _Carrier:
    """Bring bytes to one actor; requests may be repeated, so it retries."""

    actor: Any
    address: str
    host: RayHost

    def carry(self, pieces: list[Piece]) -> Sequence[Piece]:
        """Deliver a request, also to an edge that is being restarted."""
        deadline = float("inf")
        while True:
            try:
                return self._ask(pieces)
            except ActorUnavailableError as error:
                now = time.monotonic()
                deadline = min(deadline, now + self.host.patience_seconds)
                if now >= deadline:
                    raise self._unreachable(error) from error
                time.sleep(_PAUSE_SECONDS)
            except RayError as error:
                raise self._unreachable(error) from error

    def _ask(self, pieces: list[Piece]) -> Sequence[Piece]:
        """Send as one object, or in parts if that is faster."""
        timeout = self.host.timeout_seconds
        size = sum(map(len, pieces))
        if not _INLINE_BYTES < size <= _MOST_BYTES_IN_PARTS:
            asked = self.actor.handle.remote(_one_object(pieces))
            reply: Any = ray.get(asked, timeout=timeout)
            return [reply] if isinstance(reply, bytes) else reply
        num_parts = size // _INLINE_BYTES + 2
        ask = self.actor.handle_parts.options(num_returns=num_parts)
        parts = ask.remote(*_divide(b"".join(pieces), num_parts))
        return [b"".join(ray.get(parts, timeout=timeout))]

    def _unreachable(self, error: Exception) -> EdgeUnreachable:
        return EdgeUnreachable(
            f"edge {self.address!r} does not answer ({type(error).__name__}): its "
            "unmerged sessions are lost; clients of other edges go on."
        )


class _EdgeActor:
    """An ``EdgeService`` in a process of its own; each start is an incarnation."""

    def __init__(
        self, task: Task, address: str, profile: EdgeProfile, host: RayHost
    ) -> None:
        self._folder = _folder(host.spill_dir, address)
        self._service = EdgeService(
            task,
            spill_dir=self._folder,
            incarnation=uuid.uuid4().hex,
            connect=lambda _, address: host.connect(address),
            profile=profile,
        )

    def ready(self) -> Path:
        return self._folder

    def handle(self, request: Any) -> Any:
        pieces = [request] if isinstance(request, bytes) else request
        return _one_object(answered(self._service.handle, *pieces))

    def handle_parts(self, *parts: bytes) -> tuple[bytes, ...]:
        """Answer a request that came in parts, in as many parts."""
        reply = answered(self._service.handle, b"".join(parts))
        return _divide(b"".join(reply), len(parts))

    def clean_up(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _folder(parent: str | None, address: str) -> Path:
    """Name the folder of one actor on the machine that this is called on."""
    return Path(parent or tempfile.gettempdir()) / f"smartsplit-{address}"


def _one_object(pieces: list[Piece]) -> Any:
    """Join what Ray sends inline; else let it put the arrays into shared memory."""
    if sum(map(len, pieces)) <= _INLINE_BYTES:
        return b"".join(pieces)
    return [p if isinstance(p, bytes) else np.frombuffer(p, np.uint8) for p in pieces]


def _divide(data: bytes, num_parts: int) -> tuple[bytes, ...]:
    """Cut bytes into parts that Ray sends inline; a last one takes what is left."""
    ends = [index * _INLINE_BYTES for index in range(num_parts)]
    return (
        *(data[low:high] for low, high in pairwise(ends)),
        data[ends[-1] :],
    )
