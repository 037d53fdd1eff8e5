"""Mutated messages: each is refused, or is a message that the gate answers."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from flwr_smartsplit.edge import message_bytes
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.cut_moves import MoveCut
from flwr_smartsplit.edge.message_bytes import decode, encode
from flwr_smartsplit.errors import RefusedMessage, SmartSplitError
from flwr_smartsplit.memory.process import process_bytes
from tests.edge.gate.federation import DIGEST, STATE, Federation
from tests.edge.gate.forging import PREFIX, answer_to
from tests.edge.gate.test_forged_requests import honest_units

_clients = itertools.count(10)
PIECES = (b"0", b"-1", b"1e9", b"null", b"true", b'"x"', b"[]", b"{}", b"99999999999")
MOST_GROWTH_BYTES = 200 * 2**20


def messages(federation: Federation) -> list[bytes]:
    """Write one message of each kind that may reach an edge."""
    thief, strategy = federation.thief, federation.strategy
    requests: list[Any] = [
        thief.opening,
        decode(thief.opening.opening),
        thief.forward(),
        thief.backward(),
        MoveCut(
            session=thief.name,
            incarnation=thief.incarnation,
            step=1,
            number=0,
            start=1,
            units=honest_units(),
        ),
        wire.Seal(thief.name, thief.incarnation, 10**6),  # It is not sealed.
        wire.HoldState(DIGEST, STATE),
        wire.Commit(1, (wire.Entry(thief.name, "d", 1),)),
        wire.Release(1, DIGEST),
        wire.IsHeld(DIGEST),
        wire.DescribeTask(),
        strategy.keys.hello("another address"),
    ]
    return [b"".join(encode(request)) for request in requests]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Change bytes, numbers or the length; mostly behind a right checksum."""
    size = PREFIX.unpack_from(data)[2]
    head = bytearray(data[PREFIX.size : PREFIX.size + size])
    body = bytearray(data[PREFIX.size + size :])
    for _ in range(chance.randint(1, 3)):
        match chance.randrange(6):
            case 0:
                head[chance.randrange(len(head))] = chance.randrange(256)
            case 1:  # Another value where a value ends.
                ends = [i for i, c in enumerate(head) if c in b",]}:"]
                at = chance.choice(ends) if ends else 0
                head[at:at] = chance.choice(PIECES)
            case 2:  # Another digit.
                digits = [i for i, c in enumerate(head) if c in b"0123456789"]
                if digits:
                    head[chance.choice(digits)] = chance.choice(b"0123456789")
            case 3 if body:
                body[chance.randrange(len(body))] = chance.randrange(256)
            case 4:
                del body[chance.randrange(len(body) + 1) :]
            case _:
                low = chance.randrange(len(head))
                del head[low : low + chance.randint(1, 8)]
    if chance.random() < 0.1:
        return data[: PREFIX.size] + bytes(head) + bytes(body)
    head += b" " * (-(PREFIX.size + len(head)) % 16)
    return PREFIX.pack(b"SmSp", 1, len(head), crc32(head)) + bytes(head) + bytes(body)


@dataclass
class Findings:
    """What became of the messages."""

    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: list[tuple[str, bytes]] = field(default_factory=list)


def run(federation: Federation, num_messages: int, *, seed: int = 0) -> Findings:
    """Send mutated messages; whatever is neither answered nor refused is a crash."""
    found = Findings()
    for data in _drawn(federation, num_messages, seed):
        try:
            decode(data)
        except RefusedMessage:
            found.outcomes["no message"] += 1
            continue
        except BaseException as error:
            found.crashes.append((repr(error), data))
            continue
        try:
            answer_to(federation.gate, data)
            found.outcomes["answered"] += 1
        except SmartSplitError as error:
            found.outcomes[type(error).__name__] += 1
        except BaseException as error:
            found.crashes.append((repr(error), data))
    return found


def _drawn(federation: Federation, number: int, seed: int) -> Iterator[bytes]:
    """Draw messages; the thief opens a new session when it has lost one."""
    chance = random.Random(seed)
    for index in range(number):
        if index % 50 == 0:
            client, thief = next(_clients), federation.thief
            thief.opening = federation.strategy.signed(client)
            thief.name, thief.num_steps = f"1.0/c{client}/edge", 0
            thief.open().step()
            known = messages(federation)
        yield mutated(chance.choice(known), chance)


@pytest.mark.parametrize(
    "num_messages", [2_000, pytest.param(100_000, marks=pytest.mark.slow)]
)
def test_a_mutated_message_is_refused_or_answered(
    tmp_path: Path, num_messages: int
) -> None:
    """Nothing crashes, memory stays, the victim is unharmed, and nobody gets in."""
    federation = Federation.start(tmp_path)
    run(federation, 200, seed=1)
    before = process_bytes("VmRSS") or 0
    found = run(federation, num_messages)
    assert found.crashes == []
    assert found.outcomes.total() == num_messages
    for kind in ("no message", "answered", "RefusedRequest", "StaleSession"):
        assert found.outcomes[kind] > 0, found.outcomes
    assert (process_bytes("VmRSS") or 0) - before < MOST_GROWTH_BYTES
    federation.check_unharmed()
    assert list(federation.gate._runs) == [federation.strategy.keys.run]


def test_the_fuzz_sees_a_decoder_that_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: one that does not look before it builds."""
    federation = Federation.start(tmp_path)
    monkeypatch.setattr(message_bytes, "_refuse_if", lambda *_: None)
    assert run(federation, 300).crashes
