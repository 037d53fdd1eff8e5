"""Edges that are served to loopback by this process, with certificates of their own."""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flwr_smartsplit.edge.gate.gate import EdgeGate, Terms
from flwr_smartsplit.edge.hosts.addresses import Address
from flwr_smartsplit.edge.hosts.door import Door, Patience
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.grpc import GrpcEdge, GrpcHost, GrpcTransport
from flwr_smartsplit.edge.hosts.grpc_server import Certificates, GrpcServer
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import EDGE, EdgeProfile
from tests.tasks import TASK

_PEM = serialization.Encoding.PEM
_PROFILE, _TERMS, _PATIENCE = EdgeProfile(name=EDGE), Terms(), Patience()


@dataclass(frozen=True)
class Authority:
    """A certificate authority, and the files of those it vouches for."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, folder: Path, name: str = "ca") -> "Authority":
        """Make an authority; its certificate is in ``ca.pem``."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _signed(name, key.public_key(), name, key, is_authority=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca.pem").write_bytes(certificate.public_bytes(_PEM))
        return cls(folder, certificate, key)

    @property
    def roots(self) -> Path:
        """The file of its own certificate."""
        return self.folder / "ca.pem"

    def issue(self, name: str) -> tuple[Path, Path]:
        """Vouch for somebody on this machine; return certificate and key."""
        key, issuer = (
            ec.generate_private_key(ec.SECP256R1()),
            _name_of(self.certificate),
        )
        made = _signed(name, key.public_key(), issuer, self.key)
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_bytes(made.public_bytes(_PEM))
        form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        paths[1].write_bytes(key.private_bytes(_PEM, form, plain))
        return paths


def _name_of(certificate: x509.Certificate) -> str:
    (found,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found.value)


def _signed(
    name: str, public: Any, issuer: str, key: Any, *, is_authority: bool = False
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    here = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    now = datetime.now().astimezone()
    return (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(here), critical=False)
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .sign(key, hashes.SHA256())
    )


@dataclass
class Served:
    """An edge that this process serves."""

    gate: EdgeGate
    door: Door
    server: GrpcServer
    folder: Path
    host: GrpcHost
    address: str

    def connect(self) -> GrpcTransport:
        """Reach it, as a client of its own."""
        return self.host.connect(self.address)


# longer than 40 lines because every part of an edge may be chosen
@contextmanager
def serving(
    folder: Path,
    *,
    profile: EdgeProfile = _PROFILE,
    authority: Authority | None = None,
    asks_clients: bool = False,
    terms: Terms = _TERMS,
    patience: Patience = _PATIENCE,
    task: Task = TASK,
    port: int = 0,
    **client: Any,
) -> Iterator[Served]:
    """Serve an edge until the block ends."""
    gate = EdgeGate(
        task,
        spill_dir=folder,
        incarnation=uuid.uuid4().hex,
        connect=lambda _, address: GrpcHost(**client).connect(address),
        profile=profile,
        terms=terms,
    )
    certificates = roots = None
    if authority is not None:
        files = authority.issue("edge")
        trusted = authority.roots if asks_clients else None
        roots = authority.roots.read_bytes()
        certificates = Certificates(
            certificate=files[0], key=files[1], client_roots=trusted
        )
    if asks_clients and authority is not None:
        own, key = authority.issue("client")
        client |= {"certificate": own.read_bytes(), "key": key.read_bytes()}
    door = Door(gate, name=profile.name, patience=patience)
    server = GrpcServer(door, port=port, certificates=certificates)
    address = str(Address(f"localhost:{server.port}", authority is not None, roots))
    try:
        yield Served(gate, door, server, folder, GrpcHost(**client), address)
    finally:
        server.stop()


@dataclass(frozen=True, slots=True)
class ServedHost:
    """Start an edge of its own in this process at each start; reach it by gRPC."""

    reach: GrpcHost = field(default=GrpcHost(patience_seconds=0.0))

    def start(self, task: Task, profile: EdgeProfile) -> str:
        """Serve an edge."""
        folder = Path(tempfile.mkdtemp(prefix="served-"))
        block = serving(folder, task=task, profile=profile)
        served = block.__enter__()
        _started[served.address] = (block, folder)
        return served.address

    def connect(self, address: str) -> GrpcTransport:
        """Reach it."""
        return self.reach.connect(address)

    def stop(self, address: str) -> None:
        """End it."""
        block, folder = _started.pop(address, (None, None))
        if block is not None:
            with suppress(StopIteration):
                block.__exit__(None, None, None)
            shutil.rmtree(folder)


_started: dict[str, Any] = {}


def ServedEdge(**profile: Any) -> Edge:
    """Describe an edge in this process that is reached by gRPC."""
    edge = GrpcEdge(**profile)
    return Edge(edge.profile, ServedHost())
