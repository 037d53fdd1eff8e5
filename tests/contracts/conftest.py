"""Every way to an edge that the contracts hold for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flwr_smartsplit import RayEdge
from flwr_smartsplit.edge.hosts.edge import BytesTransport, answered
from flwr_smartsplit.edge.message_bytes import Piece
from flwr_smartsplit.edge.protocol import (
    CountingTransport,
    LocalTransport,
    Transport,
)
from flwr_smartsplit.edge.service import EdgeService
from flwr_smartsplit.memory.meter import unmetered
from tests.edge.hosts.served import Authority, serving
from tests.tasks import TASK


@dataclass(frozen=True)
class Place:
    """A way to an edge, and the folder that edge spills to."""

    transport: Transport
    folder: Path


def through_bytes(handle: Callable[[Any], Any]) -> Transport:
    """Reach an edge in this process as from another one: nothing but bytes cross."""

    def carry(pieces: list[Piece]) -> list[Piece]:
        with unmetered():
            return [b"".join(answered(handle, b"".join(pieces)))]

    return BytesTransport(carry)


@pytest.fixture(scope="module")
def ray_place(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """Start one edge for a test module; starting one takes seconds."""
    parent = tmp_path_factory.mktemp("edge")
    edge = RayEdge(spill_dir=str(parent))
    address = edge.start(TASK)
    yield Place(edge.connect(address), parent / f"smartsplit-{address}")
    edge.stop(address)


@pytest.fixture(scope="module")
def grpc_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Serve one edge to a test module."""
    with serving(tmp_path_factory.mktemp("edge")) as served:
        yield Place(served.connect(), served.folder)


@pytest.fixture(scope="module")
def tls_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Serve one edge that asks its clients for certificates, too."""
    authority = Authority.make(tmp_path_factory.mktemp("certificates"))
    folder = tmp_path_factory.mktemp("edge")
    with serving(folder, authority=authority, asks_clients=True) as served:
        yield Place(served.connect(), served.folder)


WAYS = ["local", "counting", "bytes", "grpc"]
MARKED = {"tls": pytest.mark.slow, "ray": pytest.mark.ray}


@pytest.fixture(params=[*WAYS, *(pytest.param(w, marks=m) for w, m in MARKED.items())])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Reach an edge in each of the ways."""
    if request.param in {"grpc", "tls", "ray"}:
        found: Place = request.getfixturevalue(f"{request.param}_place")
        return found
    service = EdgeService(TASK, spill_dir=tmp_path, incarnation="first life")
    transport: Transport = LocalTransport(service.handle)
    if request.param == "counting":
        transport = CountingTransport(transport)
    if request.param == "bytes":
        transport = through_bytes(service.handle)
    return Place(transport, tmp_path)
