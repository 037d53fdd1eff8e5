"""A stranger at every open port of ``examples/deployment``, with TLS and keys.

It has no secret, but the authority's certificate, which is public. It sends bytes that
are no message, asks for each path that Flower's services have over HTTP, and calls each
method that Flower has over gRPC; of the edge, also what strategies and clients ask.
"""

import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib import import_module, resources
from importlib.metadata import version
from pathlib import Path
from ssl import create_default_context
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2
from rich.table import Table

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.gate.run_keys import RunKeys
from flwr_smartsplit.edge.hosts.addresses import Address
from flwr_smartsplit.edge.hosts.grpc import METHOD, SERVICE, GrpcHost
from flwr_smartsplit.edge.hosts.parts import HEADER, divided
from flwr_smartsplit.edge.message_bytes import decode
from flwr_smartsplit.errors import EdgeError, RefusedMessage, RefusedRequest
from simulations.faults.deployment import launched

_SECONDS = 5.0
_NO_MESSAGES = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "4 KiB of 0xff": b"\xff" * 4096,
    "a TLS record that never ends": b"\x16\x03\x01\xff\xff" + b"\0" * 64,
}
_METHOD = re.compile(r"channel\.\w+\(\s*'(/flwr\.[^']+)'")
_ROUTERS = (
    "superlink.routers.control.router",
    "superlink.routers.fleet.router",
    "supercore.routers.runtime.router",
    "supercore.routers.runtime.responses",
)
_HEADERS = {
    "content-type": "application/protobuf",
    "flwr-package-name": "flwr",
    "flwr-package-version": version("flwr"),
    "flwr-component-name": "SuperNode",
}
FLOWERS_OWN = ("/v1/control/", "/v1/runtime/acquire-task")
"""What a SuperLink without accounts does for everybody: Flower's, not ours."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """What came of one try at one port."""

    process: str
    port: int
    address: str
    what: str
    answer: str
    is_let_in: bool


def tries(deployment: Any, roots: bytes) -> Iterator[Try]:
    """Try everything at every port that the deployment's processes listen at."""
    for name, process in deployment.processes:
        for place in psutil.Process(process.pid).net_connections("inet"):
            if place.status != psutil.CONN_LISTEN:
                continue
            port = place.laddr.port
            made = partial(Try, process=name, port=port, address=place.laddr.ip)
            for what, data in _NO_MESSAGES.items():
                answer = f"{_answered(port, data)} bytes"
                yield made(what=what, answer=answer, is_let_in=False)
            for what, answer, is_let_in in _calls(port, roots, name):
                yield made(what=what, answer=answer, is_let_in=is_let_in)


def _answered(port: int, data: bytes) -> int:
    """Send bytes; return how many come back before the end, or a time without any."""
    size = 0
    with socket.create_connection(("127.0.0.1", port), timeout=_SECONDS) as one:
        one.settimeout(1.0)
        try:
            one.sendall(data)
            while part := one.recv(4096):
                size += len(part)
        except OSError:
            pass
    return size


def _calls(port: int, roots: bytes, process: str) -> Iterator[tuple[str, str, bool]]:
    """Call what there is, in the clear and by TLS."""
    options = [("grpc.ssl_target_name_override", "localhost")]
    trust = grpc.ssl_channel_credentials(roots)
    channels = {
        "": grpc.secure_channel(f"127.0.0.1:{port}", trust, options),
        "in the clear: ": grpc.insecure_channel(f"127.0.0.1:{port}"),
    }
    for how, channel in channels.items():
        with channel:
            for method in _flowers_methods():
                answer, came = _called(channel, method)
                yield f"{how}{method}", answer, came
            for path in _flowers_paths():
                answer, came = _posted(port, path, roots if not how else None)
                yield f"{how}{path}", answer, came
            check = health_pb2.HealthCheckRequest().SerializeToString()
            answer, _ = _called(channel, "/grpc.health.v1.Health/Check", check)
            yield f"{how}health", answer, False  # Whoever asks may know it.
            if process == "edge":
                yield from _talks(channel, how)
    if process == "edge":
        yield from requests_without_secrets(Address(f"localhost:{port}", True, roots))


def _flowers_methods() -> Iterator[str]:
    """List the methods of Flower's services."""
    for file in sorted(resources.files("flwr.proto").iterdir(), key=str):
        if file.name.endswith("_pb2_grpc.py"):
            yield from _METHOD.findall(file.read_text("utf-8"))


def _flowers_paths() -> Iterator[str]:
    """List the paths of Flower's services over HTTP, which are as new as flwr 1.42."""
    for name in _ROUTERS:
        with suppress(ImportError):
            for route in import_module(f"flwr.{name}").router.routes:
                yield route.path


def _posted(port: int, path: str, roots: bytes | None) -> tuple[str, bool]:
    """Ask for a path, with nothing; return the status, and whether it was done."""
    made: HTTPConnection = HTTPConnection("localhost", port, timeout=_SECONDS)
    if roots is not None:
        trust = create_default_context(cadata=roots.decode())
        made = HTTPSConnection("localhost", port, timeout=_SECONDS, context=trust)
    with closing(made):
        try:
            made.request("POST", path, b"", _HEADERS)
            answer = made.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, HTTPException) as error:
            return type(error).__name__, False
    return f"{answer.status} {text:.60}", answer.status == HTTPStatus.OK


def _called(channel: Any, method: str, data: bytes = b"") -> tuple[str, bool]:
    """Call a method; return its code, and whether it did what was asked."""
    try:
        # A stream's first answer looks the same on the wire.
        answer = next(
            channel.unary_stream(method)(data, timeout=_SECONDS, wait_for_ready=False)
        )
    except StopIteration:
        return "OK, nothing", True
    except grpc.RpcError as error:
        return error.code().name, False
    return f"OK, {len(answer)} bytes", True


def _talks(channel: Any, how: str) -> Iterator[tuple[str, str, bool]]:
    """Send the edge what is no request."""
    for what, parts in {
        "a part that says 1 TiB": [HEADER.pack(b"SmSpPart", 2**40)],
        "a pickle": [*divided([b"\x80\x04cos\nsystem\n."])],
        "no part": [b"hello"],
    }.items():
        talk = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        try:
            reply = b"".join(talk(iter(parts), timeout=_SECONDS))
        except grpc.RpcError as error:
            yield f"{how}{what}", error.code().name, False
            continue
        answer = decode(reply[HEADER.size :])
        is_refused = isinstance(answer, RefusedMessage)
        yield f"{how}{what}", type(answer).__name__, not is_refused


def requests_without_secrets(address: Address) -> Iterator[tuple[str, str, bool]]:
    """Send the edge requests of a strategy or a client, without their secrets."""
    keys = RunKeys()
    text = str(address)
    requests: dict[str, Any] = {
        "begin a run, secret guessed": keys.hello(text, admin="guess" * 10),
        "begin a run, no secret": keys.hello(text),
        "ask for a state": wire.IsHeld("0" * 64),
        "end the run": wire.EndRun(),
        "hold a state": wire.HoldState("0" * 64, {}),
    }
    for what, request in requests.items():
        try:
            answer: Any = GrpcHost(patience_seconds=0.0).connect(text).send(request)
        except RefusedRequest as error:
            yield what, f"refused: {' '.join(str(error).split())[:60]}", False
        except EdgeError as error:
            yield what, type(error).__name__, False
        else:
            yield what, type(answer).__name__, True


def at_the_example() -> tuple[list[Try], bool]:
    """Start the example with TLS and keys, try, and say whether it then still runs."""
    with tempfile.TemporaryDirectory(prefix="stranger-") as folder:
        with launched(Path(folder, "deployment"), is_secure=True) as deployment:
            roots = Path(deployment.folder, "ca.pem").read_bytes()
            found = [*tries(deployment, roots)]
            return found, deployment.run(["num-server-rounds=1"])


def problems(found: list[Try]) -> list[str]:
    """Name what a stranger got, but for what Flower gives to everybody."""
    return [
        f"{each.process}: {each.what}: {each.answer}"
        for each in found
        if each.is_let_in and not _is_flowers(each)
    ]


def _is_flowers(each: Try) -> bool:
    return any(path in each.what for path in FLOWERS_OWN)


def shown(found: list[Try]) -> Table:
    """Lay it out by port, for people."""
    table = Table("process", "listens at", box=None)
    for name in ("tries", "refused", "let in"):
        table.add_column(name, justify="right")
    table.add_column("what")
    for port in dict.fromkeys(each.port for each in found):
        mine = [each for each in found if each.port == port]
        inside = [each for each in mine if each.is_let_in]
        flowers = [each for each in inside if _is_flowers(each)]
        others = [each.what for each in inside if each not in flowers]
        what = [f"{len(flowers)} that Flower gives to all"] if flowers else []
        table.add_row(
            mine[0].process,
            mine[0].address,
            str(len(mine)),
            str(len(mine) - len(inside)),
            str(len(inside)),
            "\n".join(what + others) or "nothing",
        )
    return table
