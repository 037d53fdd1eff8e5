"""``smartsplit edge``: one edge as a process of its own, with health and metrics."""

import http
import logging
import signal
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import psutil
import typer

from flwr_smartsplit.cli.arguments import BadArgument, parse_bytes
from flwr_smartsplit.cli.specs import TORCHVISION, task_of
from flwr_smartsplit.edge.gate.gate import EdgeGate, Terms
from flwr_smartsplit.edge.gate.run_keys import secret_digest
from flwr_smartsplit.edge.hosts.addresses import is_loopback
from flwr_smartsplit.edge.hosts.door import Door, Patience
from flwr_smartsplit.edge.hosts.grpc import GrpcHost
from flwr_smartsplit.edge.hosts.grpc_server import Certificates, GrpcServer
from flwr_smartsplit.edge.hosts.spill_folders import claim_alone
from flwr_smartsplit.memory.allocator import keep_freed_memory
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.train.torch_device import as_device
from flwr_smartsplit.types import EdgeProfile

CUT_OFF = 1
_LEAST_SECRET = 32
_STOP_SECONDS = 1.0
_log = logging.getLogger("smartsplit.edge")


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeOptions:
    """What the command line says; see ``smartsplit edge --help``."""

    model: str
    name: str
    host: str
    port: int
    tls_certificate: Path | None
    tls_key: Path | None
    client_ca: Path | None
    insecure: bool
    insecure_anywhere: bool
    admin_secret_file: Path | None
    memory: str | None
    disk: str | None
    spill: Path | None
    device: str
    metrics_port: int | None
    metrics_host: str
    max_runs: int
    max_connections: int
    lease: float
    grace: float
    drain: float


def serve(options: EdgeOptions) -> int:
    """Serve until a signal comes; return the exit code."""
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    certificates = _certificates(options)
    secret = _admin_secret(options)
    gate, folder = _gate(options, secret)
    patience = Patience(grace_seconds=options.grace, max_visits=options.max_connections)
    door = Door(gate, name=options.name, patience=patience)
    server = GrpcServer(
        door, host=options.host, port=options.port, certificates=certificates
    )
    ended = _signals()
    if options.metrics_port is not None:
        _serve_metrics(options, door, folder)
    how = ["TLS" if certificates else "no TLS"]
    how += ["client certificates"] if options.client_ca else []
    how += ["admin secret" if secret else "no admin secret"]
    typer.echo(
        f"Edge {options.name!r} is ready at {options.host}:{server.port} "
        f"({', '.join(how)})."
    )
    sys.stdout.flush()
    ended.wait()
    _log.info("Edge %r finishes its open sessions.", options.name)
    left = server.drain(options.drain)
    server.stop(_STOP_SECONDS)
    _log.info("Edge %r ended; %d sessions were cut off.", options.name, left)
    return CUT_OFF if left else 0


def _certificates(options: EdgeOptions) -> Certificates | None:
    """Choose between TLS and none; the user must have said which."""
    certificate, key = options.tls_certificate, options.tls_key
    is_open = options.insecure or options.insecure_anywhere
    if is_open and (certificate or key or options.client_ca):
        raise BadArgument("--insecure and certificates: give one of both.")
    if is_open:
        if not (options.insecure_anywhere or is_loopback(options.host)):
            raise BadArgument(
                f"--insecure at {options.host} lets whoever can listen on the way see "
                "boundaries, labels and secrets: give --tls-certificate and --tls-key, "
                "or --insecure-anywhere if nobody can."
            )
        return None
    if certificate is None or key is None:
        raise BadArgument(
            "TLS needs --tls-certificate and --tls-key; --insecure does without, on "
            "loopback."
        )
    made = Certificates(
        certificate=certificate, key=key, client_roots=options.client_ca
    )
    try:
        made.credentials()
    except OSError as error:
        raise BadArgument(
            f"{error.filename} cannot be read: {error.strerror}."
        ) from error
    return made


def _admin_secret(options: EdgeOptions) -> str:
    """Read the secret; without one, whoever comes first owns the edge."""
    path = options.admin_secret_file
    if path is None:
        if options.insecure and is_loopback(options.host):
            return ""
        raise BadArgument(
            "--admin-secret-file is missing: without a secret, whoever reaches the "
            "edge first begins a run at it. Make one: openssl rand -hex 32 > FILE"
        )
    try:
        secret = path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise BadArgument(f"--admin-secret-file {path}: {error}.") from error
    if len(secret) < _LEAST_SECRET:
        raise BadArgument(
            f"--admin-secret-file {path} has {len(secret)} characters, and at least "
            f"{_LEAST_SECRET} are needed: openssl rand -hex 32 > {path}"
        )
    return secret


def _gate(options: EdgeOptions, secret: str) -> tuple[EdgeGate, Path]:
    """Build the edge, in a folder that outlives it."""
    if options.model.startswith(TORCHVISION):
        raise BadArgument(
            f"MODEL {options.model!r}: an edge needs the very task of the strategy; "
            "name a function that returns it."
        )
    profile = EdgeProfile(
        name=options.name,
        memory_bytes=_size(options.memory, "--memory"),
        disk_bytes=_size(options.disk, "--disk"),
    )
    device = as_device(options.device)
    task = task_of(options.model)
    build_chain(task).require_cuts()
    folder = _claimed(options)
    # Its certificate is also what it shows to the next edge of a route.
    certificate, key = options.tls_certificate, options.tls_key
    onward = GrpcHost(
        certificate=None if certificate is None else certificate.read_bytes(),
        key=None if key is None else key.read_bytes(),
        patience_seconds=10.0,
    )
    gate = EdgeGate(
        task,
        spill_dir=folder,
        incarnation=uuid.uuid4().hex,
        connect=lambda _, address: onward.connect(address),
        profile=profile,
        device=device,
        terms=Terms(
            admin_digest=secret_digest(secret) if secret else None,
            max_runs=options.max_runs,
            lease_seconds=options.lease,
        ),
    )
    return gate, folder


def _claimed(options: EdgeOptions) -> Path:
    """Make the edge's folder, and keep it until the process ends."""
    folder = options.spill or _states() / options.name.replace("/", "-")
    try:
        lock = claim_alone(folder)
    except OSError as error:
        raise BadArgument(f"--spill {folder} cannot be used: {error}.") from error
    if lock is None:
        raise BadArgument(f"--spill {folder} is another edge's: give each its own.")
    _locks.append(lock)
    return folder


def _states() -> Path:
    return Path.home() / ".local/state/smartsplit"


def _size(text: str | None, option: str) -> int | None:
    return None if text is None else parse_bytes(text, option)


_locks: list[object] = []  # Held until the process ends


def _signals() -> Event:
    """Note the first SIGTERM or Ctrl-C; a second one ends the process at once."""
    ended = Event()

    def note(number: int, _: object) -> None:
        ended.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return ended


def _serve_metrics(options: EdgeOptions, door: Door, folder: Path) -> None:
    def metrics() -> str:
        process = psutil.Process()
        present = {
            **door.present(),
            "memory_bytes": process.memory_info().rss,
            "spill_bytes": _size_of(folder),
        }
        return door.counts.text(present)

    def health() -> str | None:
        return None if door.is_draining else "ready\n"

    pages: dict[str, Callable[[], str | None]] = {
        "/metrics": metrics,
        "/healthz": health,
    }

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            page = pages.get(self.path)
            text = page() if page is not None else None
            status = http.HTTPStatus.OK
            if text is None:
                status = http.HTTPStatus.SERVICE_UNAVAILABLE
                status = status if page else http.HTTPStatus.NOT_FOUND
            body = (text or status.phrase).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: scrapers come every few seconds."""

    place = (options.metrics_host, options.metrics_port or 0)
    try:
        web = ThreadingHTTPServer(place, Handler)
    except OSError as error:
        raise BadArgument(f"--metrics-port {place[1]}: {error.strerror}.") from error
    _log.info("Metrics: http://%s:%d/metrics", *web.server_address[:2])
    Thread(target=web.serve_forever, name="metrics", daemon=True).start()


def _size_of(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size
