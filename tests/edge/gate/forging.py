"""Bytes that no honest client writes, and what an edge answers to them."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from zlib import crc32

from flwr_smartsplit.edge import message_bytes
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.gate.gate import EdgeGate
from flwr_smartsplit.edge.hosts.edge import answered
from flwr_smartsplit.edge.message_bytes import decode, encode

PREFIX = message_bytes._PREFIX


def answer_to(gate: EdgeGate, *pieces: Any) -> Any:
    """Send raw bytes; raise what comes back, if that is an error."""
    reply = decode(*answered(gate.handle, *pieces))
    if isinstance(reply, Exception):
        raise reply
    return reply


def forged(request: Any, change: Callable[[Any], None], body: bytes = b"") -> bytes:
    """Write a request whose head is changed, with another body if one is given."""
    data = b"".join(encode(request))
    size = PREFIX.unpack_from(data)[2]
    head, rest = data[PREFIX.size : PREFIX.size + size], data[PREFIX.size + size :]
    tree = json.loads(head)
    change(tree)
    return framed(tree) + (body or rest)


def framed(tree: Any) -> bytes:
    """Write a head with its right size and checksum."""
    head = json.dumps(tree).encode()
    head += b" " * (-(PREFIX.size + len(head)) % 16)
    return PREFIX.pack(b"SmSp", 1, len(head), crc32(head)) + head


def altered(opening: wire.OpenSigned, **changes: Any) -> wire.OpenSigned:
    """Change what the strategy has signed, and keep the signature."""
    request = replace(decode(opening.opening), **changes)
    return replace(opening, opening=b"".join(encode(request)))


def wire_tensor(shape: list[int], strides: list[int], num_bytes: int) -> dict[str, Any]:
    """Write a tensor's head that says what it likes."""
    return {
        "WireTensor": {
            "data": {"array": ["|u1", [num_bytes]]},
            "dtype": "float32",
            "shape": {"tuple": shape},
            "strides": {"tuple": strides},
        }
    }
