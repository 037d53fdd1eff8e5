"""GrpcEdge: an edge that runs as a service on a network. Only this file imports gRPC.

There is one method, a stream of requests and replies in parts (``parts.py``). A client
has a stream for each session, and a strategy one for each edge. The messages are those
of every host: gRPC carries them, and knows nothing of them.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from math import inf
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import opening_in
from flwr_smartsplit.edge.hosts.addresses import Address
from flwr_smartsplit.edge.hosts.edge import Edge, read_reply
from flwr_smartsplit.edge.hosts.parts import PART_BYTES, divided, joined
from flwr_smartsplit.edge.message_bytes import Piece, encode
from flwr_smartsplit.edge.protocol import ReplyT, Request
from flwr_smartsplit.errors import (
    EdgeError,
    EdgeFull,
    EdgeUnreachable,
    SmartSplitError,
)
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE, EdgeProfile, Link


class _Grpc:
    """gRPC, loaded when it is first used: a device without a split needs none."""

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(import_module("grpc"), name)
        except ModuleNotFoundError as error:
            raise EdgeUnreachable(
                "an edge on a network needs grpcio: pip install 'flwr-smartsplit[edge]'"
            ) from error


grpc: Any = _Grpc()
SERVICE = "smartsplit.Edge"
SECRET = "smartsplit-secret-bin"
METHOD = "Talk"
_PAUSE_SECONDS = 0.2
_FULL_SECONDS = 1.0
_LET_GO_SECONDS = 1.0
_AGAIN_SECONDS = 2.0  # For an edge that was just waited for in vain
_REPLY_BYTES = 2**32  # Of states and sums; a client's steps are bounded by its plan
_HEAD_BYTES = 2**18
OPTIONS = {
    "grpc.max_receive_message_length": PART_BYTES + 64,
    "grpc.max_send_message_length": PART_BYTES + 64,
    # A peer that is stopped, or cut off, is noticed after 50 seconds.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
}
_CLIENT_OPTIONS = {
    **OPTIONS,
    "grpc.use_local_subchannel_pool": 1,  # A connection for each session
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.min_reconnect_backoff_ms": 1_000,
    "grpc.max_reconnect_backoff_ms": 2_000,
    "grpc.enable_retries": 0,
}
_log = logging.getLogger("flwr")
_gave_up: dict[str, float] = {}  # When this process last stopped waiting for an edge


def GrpcEdge(  # noqa: PLR0913 - where it is, who vouches for it, and who we are
    address: str = "",
    *,
    name: str = EDGE,
    root_certificates: str | Path | None = None,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
    insecure: bool = False,
    admin_secret_file: str | Path | None = None,
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    flops_per_second: float | None = None,
    links: Mapping[str, Link] | None = None,
    room_patience_seconds: float = 600.0,
    patience_seconds: float = 60.0,
    timeout_seconds: float = 600.0,
) -> Edge:
    """Describe an edge that ``smartsplit edge`` runs somewhere on the network.

    The strategy needs its address. Clients get address and certificates in their plans;
    they need no edge at all, unless the edge asks for a client certificate.

    Parameters
    ----------
    address : str
        Its host and port, such as ``"edge.example:50051"``; for the strategy.
    name : str
        Its name in routes; the one that it was started with.
    root_certificates : str or Path, optional
        File of the certificate authorities that vouch for it, as PEM. The strategy
        hands them to the clients. Without it, those that each machine trusts.
    certificate, key : str or Path, optional
        This side's own certificate and key, as PEM files, if the edge asks for one.
    insecure : bool
        Without TLS: whoever can listen sees all, and can take part.
    admin_secret_file : str or Path, optional
        File of the secret with which runs begin at the edge; for the strategy.
    memory_bytes, disk_bytes : int, optional
        What the strategy plans with; by default, what the edge says it has.
    flops_per_second : float, optional
        Its speed with one client; unknown by default.
    links : Mapping[str, Link], optional
        Its links to other edges, by their names; what crosses a link of which neither
        edge says anything takes no time.
    room_patience_seconds : float
        How long a client waits while the edge is full.
    patience_seconds : float
        How long to wait for an edge that does not answer, or restarts; not twice in a
        row.
    timeout_seconds : float
        How long one request may take.

    Examples
    --------
    >>> GrpcEdge("edge.example:50051", name="berlin").name
    'berlin'
    """
    if insecure and (root_certificates or certificate or key):
        raise ValueError("insecure=True and certificates: give one of both.")
    if (certificate is None) != (key is None):
        raise ValueError("certificate and key belong together: give both, or neither.")
    roots = None if root_certificates is None else _read(root_certificates)
    host = GrpcHost(
        address=str(Address(address, not insecure, roots)) if address else "",
        certificate=None if certificate is None else _read(certificate),
        key=None if key is None else _read(key),
        patience_seconds=patience_seconds,
        timeout_seconds=timeout_seconds,
    )
    profile = EdgeProfile(
        name=name,
        memory_bytes=memory_bytes,
        disk_bytes=disk_bytes,
        flops_per_second=flops_per_second,
        links=links or {},
    )
    secret = "" if admin_secret_file is None else _read(admin_secret_file).decode()
    return Edge(profile, host, room_patience_seconds, secret.strip())


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcHost:
    """Reach edges on a network; the fields are as in ``GrpcEdge``."""

    address: str = ""  # As text; see ``Address``
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    patience_seconds: float = 60.0
    timeout_seconds: float = 600.0

    def start(self, task: Task, profile: EdgeProfile) -> str:
        """Return the address: the edge runs already, with its own task."""
        del task
        if not self.address:
            raise EdgeUnreachable(
                f"edge {profile.name!r} has no address: give the strategy's GrpcEdge "
                "the host and port where `smartsplit edge` listens."
            )
        address = Address.read(self.address)
        if not address.is_secure and not address.is_loopback:
            _log.warning(
                "edge %r at %s is reached without TLS: whoever can listen sees "
                "boundaries and labels, and can take part.",
                *(profile.name, address.target),
            )
        return self.address

    def connect(self, address: str) -> "GrpcTransport":
        """Reach the edge at an address, when something is sent."""
        return GrpcTransport(Address.read(address), self)

    def stop(self, address: str) -> None:
        """Leave the edge running: it is not ours."""


class _Stream:
    """One stream to an edge: a request, then its reply, and so on."""

    def __init__(self, channel: Any, secret: str, timeout_seconds: float) -> None:
        self._channel = channel
        self._deadline = _Deadline(timeout_seconds)
        self._requests: SimpleQueue[list[Piece] | None] = SimpleQueue()
        self._is_sent = Event()
        talk = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        self._replies = talk(
            _parts_of(self._requests, self._is_sent),
            metadata=((SECRET, secret.encode(errors="surrogatepass")),),
        )
        watch = self._deadline.watch
        Thread(target=watch, args=(self._replies,), daemon=True).start()

    @property
    def is_active(self) -> bool:
        """Say whether the stream goes on, as far as is known here."""
        return bool(self._replies.is_active())

    @property
    def was_late(self) -> bool:
        """Say whether it was broken off because an answer took too long."""
        return self._deadline.has_passed

    def ask(self, pieces: list[Piece], most_bytes: int) -> Piece:
        """Send a request, and wait for its reply."""
        self._deadline.begin()
        self._is_sent.clear()
        self._requests.put(pieces)
        try:
            reply = joined(self._replies, lambda: most_bytes)
        finally:
            # The sending thread still holds the request, which counts as the device's.
            # It lets go of it when all is sent, or soon after the stream has ended.
            while not self._is_sent.wait(_LET_GO_SECONDS) and self.is_active:
                pass
            self._deadline.until = inf
        if reply is None:
            raise _Ended
        return reply

    def close(self) -> None:
        """End the stream, the thread that sends for it, and its connection."""
        self._requests.put(None)
        self._deadline.is_over.set()
        self._channel.close()

    def __del__(self) -> None:
        """Close what nobody uses any more."""
        with suppress(Exception):
            self.close()


@dataclass
class _Deadline:
    """Until when an answer must have come; a thread watches it."""

    seconds: float
    until: float = inf
    has_passed: bool = False
    is_over: Event = field(default_factory=Event)

    def begin(self) -> None:
        """Give the next answer its time."""
        self.until = time.monotonic() + self.seconds

    def watch(self, call: Any) -> None:
        """Break a call off at the deadline. It knows no stream, so streams can end."""
        while not self.is_over.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() > self.until:
                self.has_passed = True
                call.cancel()
                return


class _Ended(Exception):
    """An edge ended a stream without an error, as one that stops does."""


def _parts_of(
    requests: "SimpleQueue[list[Piece] | None]", is_sent: Event
) -> Iterator[bytes]:
    """Yield requests in parts, and say when nothing of one is held here any more."""
    while (pieces := requests.get()) is not None:
        try:
            yield from divided(pieces)
        finally:
            pieces = None
            is_sent.set()


class GrpcTransport:
    """Reach one edge, and again if a stream breaks: requests may be repeated.

    Each secret has a stream of its own, and no stream has two requests at a time.
    """

    def __init__(self, address: Address, host: GrpcHost) -> None:
        self._address = address
        self._host = host
        self._streams: dict[str, _Stream] = {}
        self._step_bytes: dict[str, int] = {}  # Of replies, by incarnation
        self._lock = Lock()

    def send(self, request: Request[ReplyT]) -> ReplyT:
        """Return the edge's reply, or raise what it raised."""
        is_opening = isinstance(request, wire.OpenSession | wire.OpenSigned)
        secret = "" if is_opening else _secret_of(request)
        stream, found = self._delivered(secret, request)
        try:
            reply = read_reply(request, found)
        except SmartSplitError:
            if isinstance(request, _LAST):
                stream.close()
            else:
                self._keep(secret, stream)
            raise
        if isinstance(reply, wire.Opened):
            limits = opening_in(request).limits  # type: ignore[arg-type]
            if limits is not None:
                most = limits.step_bytes + _HEAD_BYTES
                self._step_bytes[reply.incarnation] = most
            self._keep(reply.incarnation, stream)
        elif isinstance(request, _LAST):
            stream.close()
        else:
            self._keep(secret, stream)
        return reply

    def _delivered(self, secret: str, request: Any) -> tuple[_Stream, Piece]:
        """Deliver a request, even to an edge that is restarting."""
        pieces, until = encode(request), inf
        patience_seconds = self._patience_seconds()
        most = _REPLY_BYTES
        if isinstance(request, wire.Forward | wire.Backward):
            most = self._step_bytes.get(secret, most)
        while True:
            stream = self._taken(secret)
            try:
                reply = stream.ask(pieces, most)
                _gave_up.pop(self._address.target, None)
                return stream, reply
            except EdgeError:
                stream.close()
                raise
            except (grpc.RpcError, _Ended) as error:
                stream.close()
                # Its frames hold the request, and it is held by the stream it ended.
                error.__traceback__ = None
                if stream.was_late:
                    raise self._late() from error
                now, cause = time.monotonic(), self._cause(error)
                if until == inf:
                    until = now + patience_seconds
                    shown = self._address.target, cause, patience_seconds
                    _log.warning("Edge at %s: %s. Trying for %.0f s.", *shown)
                if now + _PAUSE_SECONDS > until:
                    _gave_up[self._address.target] = now
                    raise EdgeUnreachable(
                        f"the edge at {self._address.target} does not answer after "
                        f"{patience_seconds:.0f} s ({cause}): start it "
                        "again, or look at its log; clients of other edges go on."
                    ) from error
                time.sleep(_PAUSE_SECONDS)

    def _patience_seconds(self) -> float:
        """Return how long to wait for the edge: not twice in a row."""
        usual = self._host.patience_seconds
        given_up = _gave_up.get(self._address.target, -inf)
        is_again = time.monotonic() - given_up < usual
        return min(usual, _AGAIN_SECONDS) if is_again else usual

    def _taken(self, secret: str) -> _Stream:
        """Take the stream of a secret, or open a new one."""
        with self._lock:
            stream = self._streams.pop(secret, None)
        if stream is not None and stream.is_active:
            return stream
        if stream is not None:
            stream.close()
        return _Stream(self._channel(), secret, self._host.timeout_seconds)

    def _keep(self, secret: str, stream: _Stream) -> None:
        with self._lock:
            if stream.is_active and self._streams.setdefault(secret, stream) is stream:
                return
        stream.close()

    def _channel(self) -> Any:
        target, host = self._address.target, self._host
        if not self._address.is_secure:
            return grpc.insecure_channel(target, options=[*_CLIENT_OPTIONS.items()])
        credentials = grpc.ssl_channel_credentials(
            self._address.roots, host.key, host.certificate
        )
        options = [*_CLIENT_OPTIONS.items()]
        return grpc.secure_channel(target, credentials, options=options)

    def _late(self) -> EdgeUnreachable:
        return EdgeUnreachable(
            f"the edge at {self._address.target} did not answer within "
            f"{self._host.timeout_seconds:g} s: look at its log, or raise "
            "timeout_seconds."
        )

    def _cause(self, error: Any) -> str:
        """Say why a stream broke, or raise if it would break again."""
        if isinstance(error, _Ended):
            return "it ended the connection"
        code, target = error.code(), self._address.target
        details = " ".join(str(error.details()).split())
        text, codes = f"{code.name}: {details:.300}", grpc.StatusCode
        if code is codes.RESOURCE_EXHAUSTED:
            raise EdgeFull(
                f"the edge at {target} has too many connections: ask again later.",
                needed_bytes=0,
                free_bytes=0,
                budget_bytes=0,
                retry_after_seconds=_FULL_SECONDS,
            ) from error
        if code is codes.UNIMPLEMENTED or "SSL_ERROR" in details:
            raise EdgeUnreachable(
                f"what listens at {target} is not the edge ({text}): compare address "
                "and root_certificates with those of `smartsplit edge`."
            ) from error
        return text


_LAST = wire.Hello | wire.Seal | wire.Abandon | wire.EndRun
"""After these, the stream is of no more use."""


def _secret_of(request: Any) -> str:
    secret = getattr(request, "access", "") or getattr(request, "incarnation", "")
    return str(secret)
