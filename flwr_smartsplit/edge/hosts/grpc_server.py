"""GrpcServer: lets strategies and clients on a network talk to an edge's gate."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from flwr_smartsplit.edge.hosts.door import Door
from flwr_smartsplit.edge.hosts.grpc import METHOD, OPTIONS, SECRET, SERVICE, grpc
from flwr_smartsplit.edge.hosts.parts import divided, joined
from flwr_smartsplit.edge.message_bytes import encode
from flwr_smartsplit.errors import EdgeError, EdgeUnreachable

_HEALTH = "grpc.health.v1.Health"
_PAUSE_SECONDS = 0.2
_SPARE = 16  # Streams for health checks, and to refuse with a reason
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """The files of a server's TLS, read again at each connection if they change."""

    certificate: Path
    key: Path
    client_roots: Path | None = None  # Those of whom clients must have a certificate

    def credentials(self) -> Any:
        """Make what gRPC needs; raise OSError if a file cannot be read."""
        known = [self._times()]

        def renewed() -> Any:
            with suppress(OSError):
                times = self._times()
                if times != known[0]:
                    read = self._read()
                    known[0] = times
                    return read
            return None

        return grpc.dynamic_ssl_server_credentials(
            self._read(), renewed, self.client_roots is not None
        )

    def _times(self) -> list[int]:
        paths = (self.certificate, self.key, self.client_roots)
        return [path.stat().st_mtime_ns for path in paths if path is not None]

    def _read(self) -> Any:
        roots = self.client_roots
        return grpc.ssl_server_certificate_configuration(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            None if roots is None else roots.read_bytes(),
        )


class GrpcServer:
    """Let whoever has a secret through a door, until it is stopped."""

    def __init__(
        self,
        door: Door,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        certificates: Certificates | None = None,
    ) -> None:
        self._door = door
        self._ended = Event()
        most = door.patience.max_visits + _SPARE
        options = {
            **OPTIONS,
            "grpc.so_reuseport": 0,  # Two edges at one port would share clients
            "grpc.http2.max_ping_strikes": 0,  # As many as keepalive needs
        }
        self._server = grpc.server(
            ThreadPoolExecutor(most, "edge"),
            options=[*options.items()],
            maximum_concurrent_rpcs=most,
        )
        self._server.add_generic_rpc_handlers(self._handlers())
        self.port = self._listening(host, port, certificates)
        self._server.start()
        Thread(target=self._tidy, name="edge door", daemon=True).start()

    def _handlers(self) -> tuple[Any, Any]:
        talk = grpc.stream_stream_rpc_method_handler(self._talk)
        check = grpc.unary_unary_rpc_method_handler(self._check)
        made = grpc.method_handlers_generic_handler
        return made(SERVICE, {METHOD: talk}), made(_HEALTH, {"Check": check})

    def _listening(
        self, host: str, port: int, certificates: Certificates | None
    ) -> int:
        """Listen, and return at which port; 0 takes a free one."""
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if certificates is None:
                return int(self._server.add_insecure_port(place))
            credentials = certificates.credentials()
            return int(self._server.add_secure_port(place, credentials))
        except RuntimeError as error:
            raise EdgeUnreachable(
                f"{place} cannot be listened at: another process does so already, or "
                "this machine has no such address."
            ) from error

    def drain(self, most_seconds: float) -> int:
        """Take no new sessions, and wait for open ones; return how many are left."""
        until = time.monotonic() + most_seconds
        self._door.is_draining = True
        while left := int(self._door.present()["sessions"]):
            if time.monotonic() > until:
                break
            time.sleep(_PAUSE_SECONDS)
        return left

    def stop(self, grace_seconds: float | None = None) -> None:
        """End all connections, after a grace for replies that are on their way."""
        self._ended.set()
        self._server.stop(grace_seconds).wait()

    def _talk(self, parts: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Answer one stream's requests."""
        sent = dict(context.invocation_metadata())
        secret = sent.get(SECRET, b"").decode(errors="surrogatepass")
        caller = context.peer().rpartition(":")[0]
        try:
            visit = self._door.enter(caller, secret, context.cancel)
        except EdgeError as error:
            yield from self._refused(error)
            return
        try:
            while True:
                data = joined(parts, lambda: self._door.most_bytes(visit))
                if data is None:
                    return
                yield from divided(self._door.answer(visit, data))
                del data
        except EdgeError as error:
            yield from self._refused(error)
        except grpc.RpcError:  # The stream broke.
            return
        finally:
            self._door.leave(visit)

    def _refused(self, error: Exception) -> Iterator[bytes]:
        self._door.note(error)
        return divided(encode(error))

    def _check(self, request: bytes, context: Any) -> bytes:
        """Answer as gRPC's health protocol says; messages are protobuf's."""
        if request not in (b"", b"\n" + bytes([len(SERVICE)]) + SERVICE.encode()):
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return b"\x08\x02" if self._door.is_draining else b"\x08\x01"

    def _tidy(self) -> None:
        while not self._ended.wait(1.0):
            try:
                self._door.tick()
            except Exception:
                _log.exception("an edge failed to clean up")
