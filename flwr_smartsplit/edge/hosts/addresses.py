"""The address of an edge on a network, as the plan brings it to devices: plain text.

``grpcs://edge.example:50051`` is reached by TLS, with the certificate authorities that
the system trusts, or those that follow a ``#`` in base64. ``grpc://`` is not encrypted.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Self

from flwr_smartsplit.errors import EdgeUnreachable

_TARGET = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/#\[\]]+):([0-9]{1,5})")
_LOOPBACK = re.compile(r"localhost|127(\.[0-9]+){3}|\[?::1\]?")
_SCHEMES = {"grpc": False, "grpcs": True}


@dataclass(frozen=True, slots=True)
class Address:
    """Where an edge listens, and who vouches for it."""

    target: str  # host:port
    is_secure: bool
    roots: bytes | None = None  # PEM; those of the system if None

    def __post_init__(self) -> None:
        match = _TARGET.fullmatch(self.target)
        if match is None or not 0 < int(match[2]) < 2**16:
            raise EdgeUnreachable(
                f"{self.target!r:.200} is no address of an edge: write host:port, such "
                "as edge.example:50051 or [::1]:50051."
            )

    @classmethod
    def read(cls, text: str) -> Self:
        """Read an address, or raise ``EdgeUnreachable``."""
        scheme, _, rest = text.partition("://")
        target, _, roots = rest.partition("#")
        if scheme not in _SCHEMES:
            raise EdgeUnreachable(
                f"{text!r:.200} is not the address of an edge on a network, which "
                "begins with grpc:// or grpcs://: give strategy and clients the same "
                "edges."
            )
        try:
            pem = base64.b64decode(roots, validate=True)
        except (binascii.Error, ValueError) as error:
            raise EdgeUnreachable(
                f"the certificates in the address of {target!r:.200} are damaged."
            ) from error
        return cls(target, _SCHEMES[scheme], pem or None)

    def __str__(self) -> str:
        """Write the address."""
        scheme = "grpcs" if self.is_secure else "grpc"
        roots = base64.b64encode(self.roots or b"").decode()
        return f"{scheme}://{self.target}" + (f"#{roots}" if roots else "")

    @property
    def is_loopback(self) -> bool:
        """Say whether only this machine can listen to what is sent there."""
        return is_loopback(self.target.rpartition(":")[0])


def is_address(text: str) -> bool:
    """Say whether a text is the address of an edge on a network, maybe a wrong one."""
    return text.partition("://")[0] in _SCHEMES


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine, seen from itself only."""
    return _LOOPBACK.fullmatch(host) is not None
