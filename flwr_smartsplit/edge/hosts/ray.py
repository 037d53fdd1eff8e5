"""RayEdge: an edge as a Ray actor. Only this file imports Ray.

One actor serves many clients: in measurements, an actor per client was no faster. It
requests no CPU from Ray, because Flower's clients occupy all of them. It neither starts
nor joins a cluster: whoever runs the simulation or the deployment does.

Ray places, finds and restarts the actor. Whoever is on its machine, as in simulations,
talks to it over a Unix socket, which wakes fewer threads; others over Ray.
"""

import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any, BinaryIO

import numpy as np

from flwr_smartsplit.edge.gate.gate import EdgeGate
from flwr_smartsplit.edge.hosts.edge import (
    BytesTransport,
    Edge,
    answered,
    new_address,
)
from flwr_smartsplit.edge.hosts.spill_folders import PREFIX, claim, delete_abandoned
from flwr_smartsplit.edge.hosts.unix_socket import UnixClient, UnixServer
from flwr_smartsplit.edge.message_bytes import Piece
from flwr_smartsplit.errors import EdgeUnreachable
from flwr_smartsplit.memory.allocator import keep_freed_memory
from flwr_smartsplit.task import Task
from flwr_smartsplit.task_digest.torch_settings import (
    apply_torch_settings,
    torch_settings,
)
from flwr_smartsplit.train.torch_device import CPU, as_device
from flwr_smartsplit.types import EDGE, EdgeProfile, Link


class _Ray:
    """Ray, loaded when it is first used: a device without a split needs none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module("ray"), name)


ray: Any = _Ray()
_NAMESPACE = "flwr_smartsplit"
# Ray sends arguments of up to 100 KiB inside its message and puts larger ones into
# shared memory, which adds about 4 ms per round trip. Up to a size, several small parts
# are faster than one large object (`python -m simulations.benchmarks.step_time`).
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
    links: Mapping[str, Link] | None = None,
    resources: Mapping[str, float] | None = None,
    device: str = "cpu",
    num_gpus: float = 0,
    room_patience_seconds: float = 600.0,
    patience_seconds: float = 60.0,
    timeout_seconds: float = 600.0,
) -> Edge:
    """Describe an edge that runs as an actor in this process's Ray cluster.

    Parameters
    ----------
    name : str
        Its name in routes.
    max_concurrency : int
        Requests served at the same time.
    spill_dir : str, optional
        Parent folder, on the actor's machine, for held states and sealed tails; that
        machine's temporary folder by default.
    memory_bytes : int, optional
        Memory for all sessions together; unlimited by default.
    disk_bytes : int, optional
        Disk for sealed tails; unlimited by default.
    flops_per_second : float, optional
        Its speed with one client; unknown by default.
    links : Mapping[str, Link], optional
        Its links to other edges, by their names; what crosses a link of which neither
        edge says anything takes no time.
    resources : Mapping[str, float], optional
        Custom Ray resources that the actor needs, such as ``{"berlin": 0.001}``; it
        runs on a machine that has them.
    device : str
        Where its segments train: ``"cpu"`` or ``"cuda"``.
    num_gpus : float
        The share of one GPU that the actor takes from Ray, at most 1. Ray shows an
        actor without a share no GPU. A share is not a limit of memory:
        ``memory_bytes`` is.
    room_patience_seconds : float
        How long a client waits while the edge is full.
    patience_seconds : float
        How long to wait for Ray to start, or for an edge to restart.
    timeout_seconds : float
        How long one request may take.

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
        links=links or {},
    )
    host = RayHost(
        max_concurrency=max_concurrency,
        spill_dir=spill_dir,
        resources=resources,
        device=device,
        num_gpus=num_gpus,
        patience_seconds=patience_seconds,
        timeout_seconds=timeout_seconds,
    )
    return Edge(profile, host, room_patience_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayHost:
    """Run edges as actors; the fields are as in ``RayEdge``."""

    max_concurrency: int = 8
    spill_dir: str | None = None
    resources: Mapping[str, float] | None = None
    device: str = "cpu"
    num_gpus: float = 0
    patience_seconds: float = 60.0
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if not 0 <= self.num_gpus <= 1:
            raise ValueError(
                f"num_gpus is {self.num_gpus}: an edge computes on one device; give 0 "
                "to 1, and one edge for each GPU."
            )
        if (self.num_gpus > 0) != (self.device != "cpu"):
            raise ValueError(
                f"device={self.device!r} with num_gpus={self.num_gpus}: Ray shows an "
                "edge only the GPU that it has a share of; give both, such as "
                "device='cuda', num_gpus=0.5, or neither."
            )

    def start(self, task: Task, profile: EdgeProfile) -> str:
        """Start the actor for one run; return its name.

        Raises ``EdgeUnreachable`` if this process has no Ray cluster in time, or the
        cluster no machine for the actor.
        """
        deadline = time.monotonic() + self.patience_seconds
        while not ray.is_initialized():
            # Flower's simulation starts Ray in another thread.
            if time.monotonic() > deadline:
                raise EdgeUnreachable(
                    f"edge {profile.name!r}: this process has no Ray cluster after "
                    f"{self.patience_seconds:.0f} s. Run under Flower's simulation "
                    "engine, or call ray.init() first."
                )
            time.sleep(_PAUSE_SECONDS)
        address = new_address(profile.name)
        resources = dict(self.resources or {})
        actor: Any = ray.remote(_EdgeActor).options(
            name=address,
            namespace=_NAMESPACE,
            num_cpus=0,
            num_gpus=self.num_gpus,
            resources=resources,
            max_restarts=-1,
            max_concurrency=self.max_concurrency,
        )
        handle = actor.remote(task, address, profile, self, torch_settings())
        folder = _folder(self.spill_dir, address)
        _actors[address] = (handle, folder)
        try:
            folder = ray.get(handle.ready.remote(), timeout=self.timeout_seconds)
        except ray.exceptions.RayError as error:
            self.stop(address)
            needs = resources | ({"GPU": self.num_gpus} if self.num_gpus else {})
            asked = f" It asks for {needs} of one machine." if needs else ""
            raise EdgeUnreachable(
                f"edge {profile.name!r} cannot start: {error}{asked}"
            ) from error
        _actors[address] = (handle, folder)
        if folder.is_dir():  # On this machine; the actor may restart in it.
            _locks[address] = claim(folder)
        return address

    def connect(self, address: str) -> BytesTransport:
        """Reach the actor by its name, or raise ``EdgeUnreachable``."""
        if not ray.is_initialized():
            raise EdgeUnreachable(
                f"edge {address!r}: this process belongs to no Ray cluster. Call "
                "ray.init(address=...) in it first."
            )
        near = UnixClient(_socket(_folder(self.spill_dir, address)))
        return BytesTransport(_Carrier(_actor(address), near, address, self).carry)

    def stop(self, address: str) -> None:
        """Stop the actor and delete its files."""
        if address not in _actors:
            return
        handle, folder = _actors.pop(address)
        if address in _locks:
            _locks.pop(address).close()
        if not ray.is_initialized():  # The actor ended with the cluster.
            shutil.rmtree(folder, ignore_errors=True)
            return
        try:
            ray.get(handle.clean_up.remote(), timeout=self.patience_seconds)
        except ray.exceptions.RayError:
            # A dead actor deletes nothing; this does, if it was on this machine.
            shutil.rmtree(folder, ignore_errors=True)
        ray.kill(handle, no_restart=True)


_actors: dict[str, tuple[Any, Path]] = {}
"""The actors that this process started; Ray ends one with its last handle."""
_locks: dict[str, BinaryIO] = {}


@dataclass(frozen=True, slots=True)
class _Carrier:
    """Send bytes to one actor, and retry: requests may be repeated."""

    actor: Any
    near: UnixClient
    address: str
    host: RayHost

    def carry(self, pieces: list[Piece]) -> Sequence[Piece]:
        """Deliver a request, even to an edge that is restarting."""
        timeout, deadline = self.host.timeout_seconds, float("inf")
        try:
            return [self.near.ask(pieces, timeout_seconds=timeout)]
        except TimeoutError as error:
            raise self._lost(error) from error
        except OSError:
            pass  # It is on another machine, or its process has ended.
        while True:
            try:
                return self._ask(pieces)
            except ray.exceptions.RayError as error:
                now, lost = time.monotonic(), ray.exceptions.ActorUnavailableError
                deadline = min(deadline, now + self.host.patience_seconds)
                if not isinstance(error, lost) or now >= deadline:
                    raise self._lost(error) from error
                time.sleep(_PAUSE_SECONDS)

    def _lost(self, error: Exception) -> EdgeUnreachable:
        return EdgeUnreachable(
            f"edge {self.address!r} does not answer ({type(error).__name__}): its "
            "unmerged sessions are lost; clients of other edges go on."
        )

    def _ask(self, pieces: list[Piece]) -> Sequence[Piece]:
        """Send one object, or several parts if that is faster."""
        timeout = self.host.timeout_seconds
        size = sum(map(len, pieces))
        if not _INLINE_BYTES < size <= _MOST_BYTES_IN_PARTS:
            asked = self.actor.handle.remote(_one_object(pieces))
            reply: Any = ray.get(asked, timeout=timeout)
            return reply if isinstance(reply, list) else [reply]
        num_parts = size // _INLINE_BYTES + 2
        ask = self.actor.handle_parts.options(num_returns=num_parts)
        parts = ask.remote(*_divide(b"".join(pieces), num_parts))
        return [_joined(ray.get(parts, timeout=timeout))]


class _EdgeActor:
    """An ``EdgeGate`` in its own process; each start is a new incarnation."""

    def __init__(  # noqa: PLR0917 - Ray passes them on
        self,
        task: Task,
        address: str,
        profile: EdgeProfile,
        host: RayHost,
        settings: Mapping[str, Any],  # Of torch, in the strategy's process
    ) -> None:
        keep_freed_memory()
        apply_torch_settings(settings)
        device = as_device(host.device)
        self._folder = _folder(host.spill_dir, address)
        delete_abandoned(self._folder.parent)
        self._lock = claim(self._folder)
        self._gate = EdgeGate(
            task,
            spill_dir=self._folder,
            incarnation=uuid.uuid4().hex,
            connect=lambda _, address: host.connect(address),
            profile=profile,
            device=device,
        )
        self._turns = BoundedSemaphore(host.max_concurrency)
        self._near: UnixServer | None = None
        if device == CPU:  # On a GPU, each thread that computes keeps memory there.
            answer = partial(answered, self._gate.handle)
            with suppress(OSError):  # Else who is near asks over Ray, as others do.
                near = _socket(self._folder)
                self._near = UnixServer(near, answer, turns=self._turns)

    def ready(self) -> Path:
        return self._folder

    def handle(self, request: Any) -> Any:
        pieces = request if isinstance(request, list) else [request]
        with self._turns:
            return _one_object(answered(self._gate.handle, *pieces))

    def handle_parts(self, *parts: bytes) -> tuple[bytes, ...]:
        """Answer a request in parts by as many parts."""
        with self._turns:
            reply = answered(self._gate.handle, _joined(parts))
        return _divide(b"".join(reply), len(parts))

    def clean_up(self) -> None:
        if self._near is not None:
            self._near.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _actor(address: str) -> Any:
    try:
        return ray.get_actor(address, namespace=_NAMESPACE)
    except ValueError as error:
        raise EdgeUnreachable(
            f"edge {address!r} is not running in namespace {_NAMESPACE!r}: {error}"
        ) from error


def _socket(folder: Path) -> Path:
    return folder / "socket"


def _folder(parent: str | None, address: str) -> Path:
    return Path(parent or tempfile.gettempdir()) / f"{PREFIX}{address}"


def _one_object(pieces: list[Piece]) -> Any:
    """Join a small message; Ray puts a larger one's arrays into shared memory."""
    if sum(map(len, pieces)) <= _INLINE_BYTES:
        return b"".join(pieces)
    return [p if isinstance(p, bytes) else np.frombuffer(p, np.uint8) for p in pieces]


def _joined(parts: Sequence[Any]) -> Any:
    """Join bytes; whoever decodes them refuses anything else."""
    are_bytes = all(isinstance(part, bytes) for part in parts)
    return b"".join(parts) if are_bytes else list(parts)


def _divide(data: bytes, num_parts: int) -> tuple[bytes, ...]:
    """Divide bytes into parts that Ray sends inline; the last one takes the rest."""
    ends = [index * _INLINE_BYTES for index in range(num_parts)]
    return (*(data[low:high] for low, high in pairwise(ends)), data[ends[-1] :])
