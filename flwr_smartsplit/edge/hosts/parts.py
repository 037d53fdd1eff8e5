"""A message in parts of a bounded size, each small enough for a network's buffers.

The first part says how large the whole is. Whoever receives it compares that with what
the sender may send before it takes memory for the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from struct import Struct

import numpy as np

from flwr_smartsplit.edge.message_bytes import Piece
from flwr_smartsplit.errors import RefusedMessage, bytes_text

PART_BYTES = 2**20
HEADER = Struct("<8sQ")  # As long as the alignment of a message's arrays
_MAGIC = b"SmSpPart"


def divided(pieces: Sequence[Piece]) -> Iterator[bytes]:
    """Divide a message; each part is made when it is asked for."""
    part: list[Piece] = [HEADER.pack(_MAGIC, sum(map(len, pieces)))]
    room = PART_BYTES
    for piece in pieces:
        view = memoryview(piece)
        while len(view) > room:
            yield b"".join([*part, view[:room]])
            part, view, room = [], view[room:], PART_BYTES
        part.append(view)
        room -= len(view)
    yield b"".join(part)


def joined(parts: Iterator[bytes], most_bytes: Callable[[], int]) -> Piece | None:
    """Receive the next message, or None if nothing more comes.

    Raises ``RefusedMessage`` if it is larger than allowed, or not as it says.
    """
    first = next(parts, None)
    if first is None:
        return None
    magic, size = HEADER.unpack_from(first.ljust(HEADER.size, b"\0"))
    if magic != _MAGIC:
        raise RefusedMessage(
            f"a message's first part begins with {_MAGIC!r}, not {magic!r}: use one "
            "release of flwr_smartsplit everywhere."
        )
    if size > (most := most_bytes()):
        raise RefusedMessage(
            f"a message of {bytes_text(size)}, where {bytes_text(most)} are allowed: "
            "nothing of it was read. Open first what the strategy has signed; give "
            "the client its true batch_size, and the task example_inputs of the usual "
            "size."
        )
    body = memoryview(first)[HEADER.size :]
    if len(body) == size:
        return body
    whole, filled = np.empty(size, np.uint8).data, 0
    while True:
        if not 0 < len(body) <= size - filled:
            raise RefusedMessage(
                f"a part of {len(body)} bytes, where {size - filled} are left."
            )
        whole[filled : filled + len(body)] = body
        filled += len(body)
        if filled == size:
            return whole
        body = memoryview(next(parts, b""))
