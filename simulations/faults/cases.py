"""The faults, each with its moment, and how a run of three rounds ends with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from signal import SIGKILL, SIGSTOP, SIGTERM
from typing import Any

from simulations.faults.moments import (
    EDGE,
    IN_STEP,
    STRATEGY,
    Action,
    Arm,
    Both,
    JumpClock,
    LimitFiles,
    Order,
    Signal,
    Trap,
)
from simulations.faults.stage import Rules

GOES_ON, LEFT_OUT, ENDS = "nothing is lost", "clients sit out", "the run ends"
"""What a fault may cost, and not more."""
_SHORT: dict[str, Any] = {"patience_seconds": 4.0, "timeout_seconds": 3.0}
_SEVERAL_SECONDS = 6.0  # Longer than a request may take then


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault: what happens when, by what rules, and what it may cost."""

    name: str
    traps: tuple[Trap, ...]
    may: str = GOES_ON
    rules: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    edge_words: tuple[str, ...] = ()
    is_small: bool = False  # Whether it is one of the few for a look

    def stage_rules(self) -> Rules:
        """Return the stage's rules."""
        return Rules(**self.rules)


def _of_client(moment: str, action: Action, nth: int = 1) -> tuple[Trap, ...]:
    return (Trap("b", moment, action, nth),)


def _in_step(action: Action) -> tuple[Trap, ...]:
    """Act in the edge, when a step is computed and not yet answered."""
    armed = Trap("b", "before Forward", Arm(), 2)
    return armed, Trap(EDGE, IN_STEP, action, round_number=0)


def _of_strategy(moment: str, action: Action) -> tuple[Trap, ...]:
    return (Trap(STRATEGY, moment, action),)


# A run that nobody could end is left until its lease is over.
_FORGETS: dict[str, Any] = {"lease_seconds": 20.0, "tidy_seconds": 40.0}
_KILL, _STOP = Signal(EDGE, SIGKILL), Signal(EDGE, SIGSTOP)
_KILL_APP = Signal(STRATEGY, SIGKILL)
_SAVED: dict[str, Any] = {"has_checkpoints": True}
_STEP, _OPEN, _SEAL = "before Forward", "before OpenSigned", "before Seal"
_PROXY: dict[str, Any] = {"has_proxy": True}

_EDGE_DIES = (
    Case(
        name="edge SIGKILL before a client opens",
        traps=_of_client(_OPEN, _KILL),
        may=LEFT_OUT,
    ),
    Case(
        name="edge SIGKILL before a step",
        traps=_of_client(_STEP, _KILL, 2),
        may=LEFT_OUT,
    ),
    Case(
        name="edge SIGKILL in a step",
        traps=_in_step(_KILL),
        may=LEFT_OUT,
        is_small=True,
    ),
    Case(
        name="edge SIGKILL after a step",
        traps=_of_client("after Forward", _KILL, 3),
        may=LEFT_OUT,
    ),
    Case(
        name="edge SIGKILL after a client's seal",
        traps=_of_client("after Seal", _KILL),
        may=LEFT_OUT,  # Of others, who are in a step
    ),
    Case(
        name="edge SIGKILL before the commit",
        traps=_of_strategy("before Commit", _KILL),
        is_small=True,
    ),
    Case(
        name="edge SIGKILL after the commit",
        traps=_of_strategy("after Commit", _KILL),
    ),
    Case(
        name="edge SIGKILL after the round",
        traps=_of_strategy("after Release", _KILL),
    ),
    Case(
        name="edge SIGKILL before the commit, its disk is lost",
        traps=_of_strategy("before Commit", Both(Order("wipe"), _KILL)),
        may=LEFT_OUT,
    ),
    Case(
        name="edge SIGKILL in a step, and stays away",
        traps=_in_step(_KILL),
        may=LEFT_OUT,
        rules={"edge_back_seconds": None},
        options=_SHORT,
    ),
    Case(
        name="edge SIGKILL before the commit, and stays away",
        traps=_of_strategy("before Commit", _KILL),
        may=LEFT_OUT,
        rules={"edge_back_seconds": None},
        options=_SHORT,
    ),
    Case(
        name="edge SIGKILL in an evaluation",
        traps=_of_client(_STEP, _KILL, 5),
        options={"evaluates": True},
    ),
    Case(
        name="edge SIGTERM in a step: it drains",
        traps=_in_step(Signal(EDGE, SIGTERM)),
    ),
    Case(
        name="edge SIGSTOP in a step, for a second",
        traps=_in_step(_STOP),
        rules={"edge_back_seconds": 1.0},
        is_small=True,
    ),
    Case(
        name="edge SIGSTOP in a step, longer than a request may take",
        traps=_in_step(_STOP),
        may=LEFT_OUT,
        rules={"edge_back_seconds": _SEVERAL_SECONDS},
        options=_SHORT,
    ),
    Case(
        name="edge SIGSTOP before the commit, longer than a request may take",
        traps=_of_strategy("before Commit", _STOP),
        may=LEFT_OUT,
        rules={"edge_back_seconds": _SEVERAL_SECONDS},
        options=_SHORT,
    ),
    Case(
        name="edge SIGSTOP in a step, for good",
        traps=_in_step(_STOP),
        may=LEFT_OUT,
        rules={"edge_back_seconds": None, **_FORGETS},
        options=_SHORT,
    ),
)
_CLIENT_DIES = (
    Case(
        name="client SIGKILL before it opens",
        traps=_of_client(_OPEN, Signal("b", SIGKILL)),
        may=LEFT_OUT,
    ),
    Case(
        name="client SIGKILL between two steps",
        traps=_of_client(_STEP, Signal("b", SIGKILL), 2),
        may=LEFT_OUT,
        is_small=True,
    ),
    Case(
        name="client SIGKILL after its seal",
        traps=_of_client("after Seal", Signal("b", SIGKILL)),
        may=LEFT_OUT,
    ),
    Case(
        name="client SIGSTOP between two steps, for a second",
        traps=_of_client(_STEP, Signal("b", SIGSTOP), 2),
        rules={"client_back_seconds": 1.0},
    ),
    Case(
        name="client SIGSTOP between two steps, longer than Flower waits",
        traps=_of_client(_STEP, Signal("b", SIGSTOP), 2),
        may=LEFT_OUT,
        rules={"client_back_seconds": 8.0},
        options={"reply_seconds": 6.0},
    ),
)
_SAVED_RUN_DIES = tuple(
    Case(
        name=f"ServerApp SIGKILL {when}, and resume",
        traps=traps,
        rules={"strategy_is_back": True, **_FORGETS},
        options=_SAVED,
        is_small=when == "before the commit",
    )
    for when, traps in {
        "in training": _of_client(_STEP, _KILL_APP, 2),
        "before the commit": _of_strategy("before Commit", _KILL_APP),
        "after the commit": _of_strategy("after Commit", _KILL_APP),
        "after the round": _of_strategy("after Release", _KILL_APP),
    }.items()
)
_STRATEGY_DIES = (
    *_SAVED_RUN_DIES,
    Case(
        name="ServerApp SIGKILL in training, without checkpoints",
        traps=_of_client(_STEP, _KILL_APP, 2),
        may=ENDS,
        rules=_FORGETS,
    ),
    Case(
        name="ServerApp SIGSTOP before the commit, for a second",
        traps=_of_strategy("before Commit", Signal(STRATEGY, SIGSTOP)),
        rules={"client_back_seconds": 1.0},
    ),
)
_DISKS = (
    Case(
        name="edge's disk is full at the global state",
        traps=(
            Trap(STRATEGY, "before HoldState", LimitFiles(EDGE, 100), 2, None),
            # The second attempt fails, too; the next one is the next round's.
            Trap(STRATEGY, "before HoldState", LimitFiles(EDGE), 4, None),
        ),
        may=LEFT_OUT,
    ),
    Case(
        name="edge's disk is full at a seal",
        traps=(
            *_of_client(_SEAL, LimitFiles(EDGE, 100)),
            *_of_strategy("before Release", LimitFiles(EDGE)),
        ),
        may=LEFT_OUT,
        is_small=True,
    ),
    Case(
        name="edge with --disk 2KiB",
        traps=(),
        may=LEFT_OUT,
        edge_words=("--disk", "2KiB"),
    ),
    Case(
        name="ServerApp's disk is full at a checkpoint",
        traps=(
            *_of_strategy("after Commit", LimitFiles(STRATEGY, 5000)),
            Trap(STRATEGY, "after Commit", LimitFiles(STRATEGY), round_number=3),
        ),
        options=_SAVED,
    ),
)
_LINKS = (
    Case(
        name="link cut in a step",
        traps=_in_step(Order("cut")),
        rules=_PROXY,
        is_small=True,
    ),
    Case(
        name="link cut in a step, for a second",
        traps=_in_step(Order("cut 1")),
        rules=_PROXY,
    ),
    Case(
        name="link cut in a step, longer than patience",
        traps=_in_step(Order("cut 6")),
        may=LEFT_OUT,
        rules=_PROXY,
        options=_SHORT,
    ),
    Case(
        name="link cut at the commit",
        traps=_of_strategy("before Commit", Order("cut 1")),
        rules=_PROXY,
    ),
    Case(
        name="link slow: 20 kB/s",
        traps=_of_client(_OPEN, Order("bytes_per_second 20000")),
        rules=_PROXY,
    ),
    Case(
        name="link late: 50 ms each way",
        traps=_of_client(_OPEN, Order("delay_seconds 0.05")),
        rules=_PROXY,
    ),
    Case(
        name="link half-open: silent for good, and not closed",
        traps=_of_client(_STEP, Order("swallow"), 2),
        may=LEFT_OUT,
        rules={**_PROXY, "tidy_seconds": 60.0},  # The edge finds out by keepalive
        options=_SHORT,
    ),
    Case(
        name="link half-open, until keepalive finds out",
        traps=_of_client(_STEP, Order("swallow"), 2),
        rules={**_PROXY, "most_seconds": 150.0, "lease_seconds": 600.0},
        options={"timeout_seconds": 100.0, "reply_seconds": 120.0},
        edge_words=("--grace", "60"),
    ),
)
_CLOCKS = tuple(
    Case(name=f"{whose} clock jumps by {hours:+d} h", traps=traps)
    for hours in (25, -25)
    for whose, traps in {
        "edge's": _in_step(JumpClock(3600.0 * hours)),
        "client's": _of_client(_OPEN, JumpClock(3600.0 * hours)),
        "ServerApp's": _of_strategy("before Commit", JumpClock(3600.0 * hours)),
    }.items()
)
CASES = (*_EDGE_DIES, *_CLIENT_DIES, *_STRATEGY_DIES, *_DISKS, *_LINKS, *_CLOCKS)
