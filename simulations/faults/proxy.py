"""Proxy: a TCP proxy on loopback that cuts, slows and swallows what it carries."""

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread

_CHUNK = 2**14
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Carry bytes between whoever connects and a port of this machine.

    Attributes
    ----------
    bytes_per_second, delay_seconds : float
        How fast each connection is; how late each chunk comes.
    """

    def __init__(self, target: int) -> None:
        self.bytes_per_second = float("inf")
        self.delay_seconds = 0.0
        self.port = 0
        self._target = target
        self._refuses_until = 0.0
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._silent: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._is_ready = Event()
        self._thread = Thread(target=self._serve, name="proxy", daemon=True)
        self._thread.start()
        self._is_ready.wait(10)

    def cut(self, refuses_seconds: float = 0.0) -> None:
        """Reset all connections, and take no new ones for a time."""
        self._refuses_until = time.monotonic() + refuses_seconds
        self._in_loop(self._reset_all)

    def _reset_all(self) -> None:
        for pair in self._pairs:
            for writer in pair:
                _reset(writer)

    def swallow(self) -> None:
        """Carry nothing more on the present connections, and tell neither side."""
        self._in_loop(self._silence_all)

    def _silence_all(self) -> None:
        self._silent.update(writer for pair in self._pairs for writer in pair)

    def close(self) -> None:
        """End it."""
        if not self._thread.is_alive():
            return
        self.cut(float("inf"))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _in_loop(self, act: Callable[[], None]) -> None:
        done = Event()

        def acted() -> None:
            act()
            done.set()

        self._loop.call_soon_threadsafe(acted)
        done.wait(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        start = asyncio.start_server(self._accept, "127.0.0.1", 0)
        server = self._loop.run_until_complete(start)
        self.port = server.sockets[0].getsockname()[1]
        self._is_ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end(server))
        self._loop.close()

    async def _end(self, server: asyncio.Server) -> None:
        server.close()
        await asyncio.sleep(0)  # Who is being accepted gets a task
        while left := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # Sockets close a turn after they are reset

    def _accept(
        self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter
    ) -> None:
        def end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not near_out.is_closing():  # It was silent, or not carried yet
                _reset(near_out)

        task = self._loop.create_task(self._carry(near, near_out))
        self._tasks.add(task)
        task.add_done_callback(end)

    async def _carry(
        self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter
    ) -> None:
        if time.monotonic() < self._refuses_until:
            _reset(near_out)
            return
        try:
            far, far_out = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _reset(near_out)
            return
        pair = near_out, far_out
        self._pairs.add(pair)
        try:
            await asyncio.gather(self._pump(near, far_out), self._pump(far, near_out))
        finally:
            self._pairs.discard(pair)
            if not far_out.is_closing():
                _reset(far_out)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                await asyncio.sleep(self.delay_seconds)
                if writer in self._silent:
                    continue
                await asyncio.sleep(len(data) / self.bytes_per_second)
                writer.write(data)
                await writer.drain()
        if writer not in self._silent:
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a broken one ends: without a goodbye."""
    place = writer.get_extra_info("socket")
    with suppress(OSError):
        place.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
