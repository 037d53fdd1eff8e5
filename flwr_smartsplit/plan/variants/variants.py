"""Variants: what a device is offered to train in a round, the most wanted first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from flwr_smartsplit.types import WHOLE, ChannelGroup, DeviceProfile, Variant


def _unknown(*_: Any) -> float | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRequest:
    """What a rule may know when it offers variants to one device.

    Parameters
    ----------
    device : DeviceProfile
        The device, with its budget and what it tells of itself.
    round_number : int
        The round, counted from 1.
    groups : tuple[ChannelGroup, ...]
        The channels of the model that may be left out, in the model's order; none for a
        rule of steps.
    units : Mapping[str, tuple[str, ...]]
        The chain's units in order, with the parameters that each one trains.
    memory : Any
        What the rule has learned so far; None before it has, and for rules that do not.
    seconds_of : Callable[[Variant], float | None]
        Predicts how long a round with a variant takes the device on its own, in
        seconds; None if nobody knows its speed.
    """

    device: DeviceProfile
    round_number: int
    groups: tuple[ChannelGroup, ...]
    units: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    memory: Any = None
    seconds_of: Callable[[Variant], float | None] = _unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOutcome:
    """How one client's part of a training round ended.

    Parameters
    ----------
    variant : Variant
        What it trained.
    num_examples : int
        Its weight in the mean.
    loss : float
        Mean over its examples.
    seconds : float, optional
        How long it took, or was predicted to take; None if nobody knows.
    metrics : Mapping[str, float]
        What it reported besides, such as ``fisher``.
    """

    variant: Variant
    num_examples: int
    loss: float
    seconds: float | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOutcome:
    """How a training round ended, for a rule that learns from it.

    Parameters
    ----------
    round_number : int
        The round, counted from 1.
    clients : Mapping[str, ClientOutcome]
        Those merged, in client_key order; at least one.
    state : Mapping[str, ndarray]
        The global state after the merge and the server's steps.
    groups : tuple[ChannelGroup, ...]
        The channels of the model that may be left out; none for a rule of steps.
    units : Mapping[str, tuple[str, ...]]
        The chain's units in order, with the parameters that each one trains.
    memory : Any
        What the rule returned the last time; None at first.
    seconds_of : Callable[[str, Variant], float | None]
        Predicts for one of the clients what ``VariantRequest.seconds_of`` does.
    """

    round_number: int
    clients: Mapping[str, ClientOutcome]
    state: Mapping[str, npt.NDArray[Any]]
    groups: tuple[ChannelGroup, ...]
    units: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    memory: Any = None
    seconds_of: Callable[[str, Variant], float | None] = _unknown


class Variants(Protocol):
    """Offers each device variants of the global model in each round.

    A rule stays as it was given. One that learns has a second method,
    ``learned(outcome: RoundOutcome) -> memory``, called after each training round in
    which somebody was merged. What it returns is in every later request: plain values
    and arrays, which checkpoints hold. One with a third method, ``base(memory)``, says
    with it what is left of the model for good, as ``PruneAt`` does. Clients report how
    large their gradients were, in the metric ``fisher``, where a rule has a true
    attribute ``wants_fisher``.

    A rule that trains a model in steps has ``steps(units) -> variants``: all that it
    will ever offer, for a chain with these unit names. They are checked before the
    first round. In a round, all devices are offered the same one.

    One with ``shown(memory) -> numbers`` adds these by name to the rounds' rows in the
    journal.
    """

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Return at least one variant, the most wanted first.

        A device trains the first of them under which any route fits it.
        """


def learns(rule: Variants) -> bool:
    """Say whether a rule is to be told how rounds end."""
    return hasattr(rule, "learned")


def check_rounds(rule: Variants, num_rounds: int | None) -> None:
    """Raise ``ValueError`` for a rule that would act after a run's last round."""
    number = getattr(rule, "round", 0) if hasattr(rule, "base") else 0
    if num_rounds is not None and number > num_rounds:
        raise ValueError(
            f"{rule!r:.80} acts at the end of round {number}, and the run has "
            f"{num_rounds} rounds: give an earlier round, or more rounds."
        )


def wants_fisher(rule: Variants) -> bool:
    """Say whether a rule asks clients how large their gradients were."""
    return bool(getattr(rule, "wants_fisher", False))


def shown_of(rule: Variants, memory: Any) -> Mapping[str, float]:
    """Say what a rule adds to a round's row in the journal."""
    show: Any = getattr(rule, "shown", None)
    return {} if show is None else show(memory)


def steps_of(rule: Variants, units: Sequence[str]) -> tuple[Variant, ...]:
    """List the steps of a rule that has some; none for others."""
    find: Any = getattr(rule, "steps", None)
    return () if find is None else tuple(find(tuple(units)))


@dataclass(frozen=True, slots=True)
class Whole:
    """Everybody trains the whole model."""

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Return the whole model."""
        del request
        return (WHOLE,)
