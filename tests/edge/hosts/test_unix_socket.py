"""Bytes between two processes of one machine: whole, in turn, and never for others."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import numpy as np
import pytest

from flwr_smartsplit.edge.hosts import unix_socket
from flwr_smartsplit.edge.hosts.unix_socket import UnixClient, UnixServer

SECONDS = 20.0
SIZES = [0, 1, 65_535, 65_536, 65_537, 1_000_003, 9_000_000]


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a path that is short enough."""
    return Path(tmp_path_factory.mktemp("s")) / "socket"


@pytest.fixture
def server(path: Path) -> Iterator[UnixServer]:
    """Send each message back, in two pieces."""
    with_halves = UnixServer(path, halves, turns=BoundedSemaphore(2))
    yield with_halves
    with_halves.close()


def halves(message: Any) -> list[Any]:
    """Divide a message."""
    middle = len(message) // 3
    return [message[:middle], message[middle:]]


def drawn(size: int) -> bytes:
    """Draw bytes, so that a part in the wrong place is seen."""
    return np.random.default_rng(size).bytes(size)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("size", SIZES)
def test_a_message_comes_back_whole(path: Path, size: int) -> None:
    """Whatever its size, and however many pieces it has; one after the other."""
    client, data = UnixClient(path), drawn(size)
    for pieces in ([data], [data[:7], memoryview(data)[7:]], [b"", data]):
        assert bytes(client.ask(pieces, timeout_seconds=SECONDS)) == data


@pytest.mark.usefixtures("server")
def test_a_length_that_is_one_too_small_is_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the other end takes the last byte for the next message."""
    monkeypatch.setattr(unix_socket, "len", lambda x: max(0, len(x) - 1), raising=False)
    client = UnixClient(path)
    with pytest.raises((AssertionError, OSError)):
        assert bytes(client.ask([drawn(100)], timeout_seconds=0.5)) == drawn(100)


def test_threads_share_a_client_and_wait_for_the_servers_turns(path: Path) -> None:
    """Each gets its own reply; no more are answered at once than the server says."""
    inside, most, lock = [0], [0], threading.Lock()
    both = threading.Barrier(2, timeout=SECONDS)

    def answer(message: Any) -> list[Any]:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        both.wait()  # Two are inside, or this never ends.
        with lock:
            inside[0] -= 1
        return [message]

    server, client = (
        UnixServer(path, answer, turns=BoundedSemaphore(2)),
        UnixClient(path),
    )
    found: dict[int, bytes] = {}

    def ask(index: int) -> None:
        reply = client.ask([bytes([index])], timeout_seconds=SECONDS)
        found[index] = bytes(reply)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    server.close()
    assert found == {index: bytes([index]) for index in range(6)}
    assert most == [2]


def test_a_slow_answer_is_a_timeout_and_its_connection_is_not_used_again(
    path: Path,
) -> None:
    """Else the next message would get the late reply."""
    late = threading.Event()

    def answer(message: Any) -> list[Any]:
        if bytes(message) == b"slow":
            late.wait(SECONDS)
        return [message]

    server, client = (
        UnixServer(path, answer, turns=BoundedSemaphore(2)),
        UnixClient(path),
    )
    with pytest.raises(TimeoutError):
        client.ask([b"slow"], timeout_seconds=0.1)
    late.set()
    assert bytes(client.ask([b"next"], timeout_seconds=SECONDS)) == b"next"
    server.close()


def test_there_may_be_no_server(path: Path, server: UnixServer) -> None:
    """Before it listens, after it ended, and where a process was killed."""
    with pytest.raises(OSError, match="No such file"):
        UnixClient(path.with_name("other")).ask([b""], timeout_seconds=SECONDS)
    client = UnixClient(path)
    client.ask([b"abc"], timeout_seconds=SECONDS)
    server.close()
    with pytest.raises(OSError, match=r"closed|Broken"):  # In the same connection
        client.ask([b"abc"], timeout_seconds=SECONDS)
    with pytest.raises(OSError, match="No such file"):
        UnixClient(path).ask([b""], timeout_seconds=SECONDS)
    path.touch()  # As a process that was killed leaves it
    with pytest.raises(OSError, match="refused"):
        UnixClient(path).ask([b""], timeout_seconds=SECONDS)
    other = UnixServer(
        path, halves, turns=BoundedSemaphore(1)
    )  # Where the old one's file lies
    assert bytes(UnixClient(path).ask([b"abc"], timeout_seconds=SECONDS)) == b"abc"
    other.close()


def test_a_server_that_ends_in_the_middle_of_an_answer_is_an_error(path: Path) -> None:
    """Half a reply is none."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(100)
            connection.sendall(unix_socket._LENGTH.pack(10) + b"half")

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(ConnectionResetError, match="closed"):
        UnixClient(path).ask([b"x"], timeout_seconds=SECONDS)
    thread.join(SECONDS)
    listening.close()


@pytest.mark.usefixtures("server")
def test_nobody_else_may_be_where_the_socket_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write into its folder could put another one there."""
    assert path.stat().st_mode & 0o777 == 0o600
    path.parent.chmod(0o770)
    refused = pytest.raises(PermissionError, match="not a folder of this user alone")
    with refused:
        UnixClient(path).ask([b""], timeout_seconds=SECONDS)
    with refused:
        UnixServer(path, halves, turns=BoundedSemaphore(1))
    path.parent.chmod(0o700)
    link = path.parent.with_name("link")
    link.symlink_to(path.parent)
    with refused:
        UnixClient(link / path.name).ask([b""], timeout_seconds=SECONDS)
    link.unlink()
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with refused:
        UnixClient(path).ask([b""], timeout_seconds=SECONDS)


def test_a_connection_that_finds_no_room_is_closed_and_others_are_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the system has no thread for the first, and no socket for the second."""
    starts, start = [0], threading.Thread.start

    def fails(thread: threading.Thread) -> None:
        if thread._target is not None and thread._target.__name__ == "_serve":
            starts[0] += 1
            if starts[0] <= 2:
                raise (RuntimeError, OSError)[starts[0] - 1]("no room")
        start(thread)

    server = UnixServer(path, halves, turns=BoundedSemaphore(1))
    monkeypatch.setattr(threading.Thread, "start", fails)
    for _ in range(2):
        with pytest.raises(OSError, match=r"closed|reset|Broken"):
            UnixClient(path).ask([b"abc"], timeout_seconds=SECONDS)
    assert bytes(UnixClient(path).ask([b"abc"], timeout_seconds=SECONDS)) == b"abc"
    server.close()


def test_a_path_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    """An edge goes on without; see ``test_ray.py``."""
    with pytest.raises(OSError, match="too long"):
        UnixServer(tmp_path / ("x" * 120), halves, turns=BoundedSemaphore(1))


def test_connections_end_with_their_client(path: Path, server: UnixServer) -> None:
    """One is kept between two messages, and none after."""
    client = UnixClient(path)
    for _ in range(3):
        client.ask([b"abc"], timeout_seconds=SECONDS)
    (kept,) = client._idle
    del client
    assert kept.fileno() == -1
    server.close()
