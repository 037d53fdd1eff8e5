"""RunKeys: how a run's strategy proves itself to edges, and signs what clients open.

A client's opening is signed, and not authenticated by who sends it: the edge needs to
know the run, not its clients. Nothing here is ever written to a disk but the public key
and a digest.
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from hmac import compare_digest
from secrets import token_hex
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import opening_in
from flwr_smartsplit.edge.gate.rules import MAX_STATES
from flwr_smartsplit.edge.message_bytes import encode
from flwr_smartsplit.errors import RefusedRequest

_PURPOSE = b"flwr_smartsplit: open a session\0"  # What a signature is for


def secret_digest(access: str) -> bytes:
    """Return what an edge keeps of a secret."""
    return sha256(access.encode(errors="surrogatepass")).digest()


class RunKeys:
    """The strategy's secrets of one run; they stay in its memory."""

    def __init__(self) -> None:
        self.run = token_hex(16)
        self._root = token_hex(32)
        self._key = Ed25519PrivateKey.generate().private_bytes_raw()

    def access(self, address: str) -> str:
        """Return the secret for one edge, which is of no use at another one."""
        own = sha256(f"{self._root} {address}".encode()).hexdigest()
        return f"{self.run}:{own}"

    def hello(
        self, address: str, *, admin: str = "", num_states: int = 2
    ) -> wire.Hello:
        """Make the request that begins this run at an edge."""
        key = Ed25519PrivateKey.from_private_bytes(self._key).public_key()
        return wire.Hello(
            self.run,
            key.public_bytes_raw(),
            secret_digest(self.access(address)),
            num_states=num_states,
            access=admin,
        )

    def sign(self, opening: wire.OpenSession, limits: wire.Limits) -> wire.OpenSigned:
        """Sign an opening, with the most that its session may take."""
        signed = b"".join(encode(replace(opening, limits=limits)))
        key = Ed25519PrivateKey.from_private_bytes(self._key)
        signature = key.sign(_PURPOSE + signed)
        return wire.OpenSigned(self.run, signed, signature)


@dataclass(frozen=True, slots=True)
class Run:
    """What an edge knows of a run: how to recognise its strategy."""

    name: str
    public_key: bytes
    secret_digest: bytes
    num_states: int = 2  # That it may hold at once

    @classmethod
    def of(cls, hello: wire.Hello) -> Self:
        """Note a run that begins, or raise ``RefusedRequest``."""
        is_name = len(hello.run) == 32 and set(hello.run) <= set("0123456789abcdef")  # noqa: PLR2004
        sizes = len(hello.public_key), len(hello.secret_digest)
        if not is_name or sizes != (32, 32):
            raise RefusedRequest(
                f"run {hello.run!r:.40} with a key and a digest of {sizes} bytes: a "
                "name has 32 digits from 0 to f, and both have 32 bytes."
            )
        if not 1 <= hello.num_states <= MAX_STATES:
            raise RefusedRequest(
                f"run {hello.run} wants to hold {hello.num_states} states at once, and "
                f"an edge holds 1 to {MAX_STATES}: lower clients_at_once."
            )
        return cls(hello.run, hello.public_key, hello.secret_digest, hello.num_states)

    def is_access(self, access: str) -> bool:
        """Say whether this is the secret of the run's strategy."""
        return compare_digest(secret_digest(access), self.secret_digest)

    def check_access(self, request: wire.StrategyRequest[object]) -> None:
        """Raise ``RefusedRequest`` unless the run's strategy made a request."""
        if not self.is_access(request.access):
            raise not_for_clients(request)

    def read(self, request: wire.OpenSigned) -> wire.OpenSession:
        """Return what the run's strategy has signed, or raise ``RefusedRequest``."""
        try:
            key = Ed25519PublicKey.from_public_bytes(self.public_key)
            key.verify(request.signature, _PURPOSE + request.opening)
        except (InvalidSignature, ValueError) as error:
            raise RefusedRequest(
                f"the opening was not signed by the strategy of run {self.name}: send "
                "the one in the client's plan, unchanged."
            ) from error
        return opening_in(request)


def not_for_clients(request: object) -> RefusedRequest:
    """Say that a request needs the strategy's secret."""
    return RefusedRequest(
        f"{type(request).__name__} is for the strategy of a run that has begun here, "
        "with its secret: clients open what the strategy has signed, step and seal."
    )
