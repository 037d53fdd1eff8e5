"""The proxy does to connections what it says."""

import gc
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress

import pytest

from simulations.faults.proxy import Proxy


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Stand before a server that sends everything back."""
    server = socket.create_server(("127.0.0.1", 0))

    def echo(one: socket.socket) -> None:
        with one, suppress(OSError):
            while data := one.recv(4096):
                one.sendall(data)

    def serve() -> None:
        while True:
            try:
                one, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(one,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    made = Proxy(server.getsockname()[1])
    yield made
    made.close()
    server.close()


def connected(proxy: Proxy) -> socket.socket:
    """Connect, and show that it works."""
    made = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
    made.sendall(b"hello")
    assert made.recv(5) == b"hello"
    return made


def test_it_cuts_and_refuses_for_a_time(proxy: Proxy) -> None:
    """As a broken link: by a reset."""
    with connected(proxy) as one:
        proxy.cut(0.5)
        with pytest.raises(ConnectionResetError):
            one.recv(1)
    with pytest.raises(ConnectionResetError):
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as early:
            early.recv(1)
    time.sleep(0.5)
    connected(proxy).close()


def test_it_is_slow_and_late(proxy: Proxy) -> None:
    """Both ways, each."""
    with connected(proxy) as one:
        proxy.bytes_per_second, proxy.delay_seconds = 10_000.0, 0.1
        start = time.monotonic()
        one.sendall(bytes(1000))
        size = 0
        while size < 1000:
            size += len(one.recv(1000))
        assert 0.4 <= time.monotonic() - start < 2.0


def test_it_goes_silent_without_a_word(proxy: Proxy) -> None:
    """New connections are served."""
    with connected(proxy) as one:
        proxy.swallow()
        one.sendall(b"hello")
        one.settimeout(0.3)
        with pytest.raises(TimeoutError):
            one.recv(1)
        connected(proxy).close()


def test_it_closes_what_it_opened(proxy: Proxy) -> None:
    """Whatever state its connections are in, also while others come."""
    silent, used = connected(proxy), connected(proxy)
    proxy.swallow()
    silent.close()
    late: list[socket.socket] = []

    def come() -> None:
        with suppress(ConnectionRefusedError):
            while True:
                with suppress(ConnectionResetError):
                    late.append(socket.create_connection(("127.0.0.1", proxy.port)))

    coming = threading.Thread(target=come)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ResourceWarning)
        coming.start()
        proxy.close()
        coming.join(10)
        gc.collect()
    assert [str(each.message) for each in found] == []
    for one in (used, *late):
        one.close()


def test_it_closes_what_was_silent_when_both_sides_left() -> None:
    """Nobody was told then, and nobody asks again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = Proxy(server.getsockname()[1])
        with socket.create_connection(("127.0.0.1", proxy.port)) as near:
            far, _ = server.accept()
            near.sendall(b"hello")
            assert far.recv(5) == b"hello"
            proxy.swallow()
            far.close()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", ResourceWarning)
            time.sleep(0.2)
            proxy.close()
            gc.collect()
    assert [str(each.message) for each in found] == []
