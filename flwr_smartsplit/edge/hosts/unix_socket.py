"""Bytes between two processes of one machine and user, over a Unix socket.

A message is its length, in 8 bytes, and then its bytes. On one machine this takes a
fraction of what Ray or gRPC take: no thread wakes up but the two that talk.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from stat import S_ISDIR
from struct import Struct
from threading import Lock, Thread
from typing import Any

import numpy as np

from flwr_smartsplit.edge.message_bytes import Piece

_LENGTH = Struct("<Q")
_PAUSE_SECONDS = 0.05
_JOINED_BYTES = 2**16  # Below it, one system call is faster than no copy.
_family = getattr(socket, "AF_UNIX", None)  # Windows has none.


class UnixServer:
    """Answer the messages that come to a socket, each connection in a thread."""

    def __init__(
        self,
        path: Path,
        answer: Callable[[Piece], Iterable[Piece]],
        *,
        turns: AbstractContextManager[Any],  # Entered around each answer
    ) -> None:
        """Begin to listen.

        Raises ``OSError`` where there are no such sockets, the path is too long, or
        others may write into its folder.
        """
        if _family is None:
            raise OSError("this system has no Unix sockets.")
        _require_own(path.parent)
        self._path = path
        self._answer = answer
        self._turns = turns
        self._lock = Lock()
        self._open: set[socket.socket] | None = set()  # None: it was closed.
        self._listening = socket.socket(_family, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)  # Of a process that was killed.
            self._listening.bind(str(path))
            path.chmod(0o600)
            self._listening.settimeout(None)
            self._listening.listen()
        except BaseException:
            self._listening.close()
            raise
        Thread(target=self._accept, name=f"accept {path.name}", daemon=True).start()

    def close(self) -> None:
        """End all connections, and take no new ones."""
        with self._lock:
            ends, self._open = [self._listening, *(self._open or ())], None
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # It wakes who waits there.
        self._listening.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        """Take connections; where the system has no room for one, try again."""
        while self._open is not None:
            connection = None
            try:
                connection, _ = self._listening.accept()
                connection.settimeout(None)
                Thread(target=self._serve, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError):
                if connection is not None:
                    connection.close()  # Its client asks in another way.
                time.sleep(_PAUSE_SECONDS)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            with self._lock:
                if self._open is None:
                    return
                self._open.add(connection)
            try:
                while True:
                    message = _received(connection)
                    with self._turns:
                        reply = self._answer(message)
                    del message
                    _send(connection, reply)
                    del reply
            except OSError:
                pass  # The other end has gone.
            finally:
                with self._lock:
                    if self._open is not None:
                        self._open.discard(connection)


class UnixClient:
    """Ask a ``UnixServer``; threads do not wait for each other.

    Its connections end with it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._idle: list[socket.socket] = []

    def ask(self, pieces: Iterable[Piece], *, timeout_seconds: float) -> Piece:
        """Send a message, and return the reply.

        Raises ``OSError`` if there is no server here, or the connection breaks; then
        the message may have been answered. ``TimeoutError``, if nothing comes for so
        long, is one of them.
        """
        connection = self._connection(timeout_seconds)
        try:
            _send(connection, pieces)
            reply = _received(connection)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)
        return reply

    def __del__(self) -> None:
        """Close the connections."""
        for connection in self._idle:
            connection.close()

    def _connection(self, timeout_seconds: float) -> socket.socket:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        if _family is None:
            raise OSError("this system has no Unix sockets.")
        _require_own(self._path.parent)
        connection = socket.socket(_family, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_seconds)
            connection.connect(str(self._path))
        except BaseException:
            connection.close()
            raise
        return connection


def _require_own(folder: Path) -> None:
    """Raise ``OSError`` if another user could put a socket there."""
    found = folder.lstat()
    is_private = S_ISDIR(found.st_mode) and not found.st_mode & 0o077
    if not is_private or found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} is not a folder of this user alone.")


def _send(connection: socket.socket, pieces: Iterable[Piece]) -> None:
    pieces = list(pieces)
    size = sum(map(len, pieces))
    pieces = [_LENGTH.pack(size), *pieces]
    if size <= _JOINED_BYTES:
        connection.sendall(b"".join(pieces))
        return
    for piece in pieces:
        connection.sendall(piece)


def _received(connection: socket.socket) -> Piece:
    """Receive a message, or raise ``OSError`` if the other end has gone."""
    (size,) = _LENGTH.unpack(_filled(connection, _LENGTH.size))
    return _filled(connection, size)


def _filled(connection: socket.socket, size: int) -> memoryview:
    """Receive so many bytes into memory that nobody fills with zeros first."""
    data = np.empty(size, np.uint8).data
    rest = data
    while rest:
        count = connection.recv_into(rest)
        if not count:
            raise ConnectionResetError("the other end has closed the connection.")
        rest = rest[count:]
    return data
