"""Settle a round: check replies, commit tails, merge; then mix and step on the server.

Whatever fails, the mean is that of exactly the clients that were accepted everywhere.
Both strategies call these functions, so the same replies give the same bits.
"""

from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from flwr_smartsplit.edge.protocol import Committed, Entry, State
from flwr_smartsplit.edge.regions import Part, check_sums, merge_parts
from flwr_smartsplit.edge.weighted_mean import add_states, add_sums, merge
from flwr_smartsplit.errors import EdgeError, RefusedReply, SmartSplitError, TailLost
from flwr_smartsplit.server.acceptance import check_reply, refusal
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import (
    WHOLE,
    ClientReply,
    Expectation,
    Failure,
    Regions,
    StepReport,
    Variant,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """How a round ended."""

    state: State | None  # The weighted mean, unmixed; None if no client was accepted
    accepted: Mapping[str, ClientReply]  # Merged, in client_key order
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSummary:
    """The results of a settled round, for whoever acts on its state.

    Parameters
    ----------
    round_number : int
        The round, counted from 1.
    staleness : int
        Number of global states newer than the one that these clients started from; 0 if
        every round waits for its clients.
    reports : Mapping[str, StepReport]
        The merged clients' measurements, in client_key order.
    failures : tuple[Failure, ...]
        The clients and edges that failed.
    config : Mapping[str, Any]
        What the clients were told of the round, such as its number and learning rate.
    label_counts : Mapping[str, tuple[int, ...] or None]
        Examples of each class, of all clients that were there, merged or not, by
        client_key; None where a client does not share them.
    """

    round_number: int
    staleness: int = 0
    reports: Mapping[str, StepReport]
    failures: tuple[Failure, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    label_counts: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)


BetweenRounds = Callable[[int, State, RoundSummary], State | None]
"""Called with each settled round's number, state and summary; may replace the state."""


class Mixing(Protocol):
    """How the clients' mean is mixed into the current global state."""

    def mix(self, current: State, mean: State, summary: RoundSummary) -> State:
        """Return the next state, with the names and shapes of ``current``.

        Parameters
        ----------
        current, mean : Mapping[str, ndarray]
            The newest global state, and the clients' mean.
        summary : RoundSummary
            Facts about the mean, such as its staleness.
        """


@runtime_checkable
class WeighedMixing(Mixing, Protocol):
    """A mixing by one number, which the journal then has."""

    def weight(self, summary: RoundSummary) -> float:
        """Return how much the mean counts, from 0 (nothing) to 1 (all)."""


@dataclass(frozen=True, slots=True)
class Replace:
    """The mean replaces the state: federated averaging."""

    def mix(self, current: State, mean: State, summary: RoundSummary) -> State:
        """Return the mean."""
        del current, summary
        return mean


class ServerStep(Protocol):
    """What the server does with a merged and mixed state, such as an optimizer step."""

    def step(self, before: State, after: State, summary: RoundSummary) -> State:
        """Return the next state, with the names and shapes of ``before``.

        Parameters
        ----------
        before, after : Mapping[str, ndarray]
            The global state before the merge, and now.
        summary : RoundSummary
            What was merged.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStart:
    """A training round that is about to begin, for steps that prepare for it.

    Parameters
    ----------
    round_number : int
        The round, counted from 1, with which a run begins.
    task : Task
        What the clients train.
    seed : int
        Root of the run's random streams.
    state : Mapping[str, ndarray]
        The global state that the clients begin with.
    parameter_names : frozenset[str]
        Which arrays are parameters; the others are buffers.
    variant : Variant
        What of the task's model the state is of: less than all, once it is pruned.
    label_counts : Mapping[str, tuple[int, ...] or None]
        Examples of each class, of all clients that are there, by client_key; None
        where a client does not share them.
    """

    round_number: int
    task: Task
    seed: int
    state: State
    parameter_names: frozenset[str]
    variant: Variant = WHOLE
    label_counts: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)


@runtime_checkable
class Prepared(Protocol):
    """A server step, or a rule of variants, that is told of each round to train."""

    def prepare(self, start: RoundStart) -> None:
        """Prepare for a round, before anything is sent.

        Raise a ``SmartSplitError`` if it cannot work. A step that stands in
        ``server_steps`` twice is told once.
        """


def prepare(told: Sequence[object], start: RoundStart) -> None:
    """Tell those that want to know of a round that is about to begin."""
    for each in {id(one): one for one in told}.values():
        if isinstance(each, Prepared):
            each.prepare(start)


def cut_steps(server_steps: Sequence[ServerStep], regions: Regions) -> None:
    """Tell the steps that remember arrays that the model has become smaller.

    Such a step has ``cut(regions)``, and goes on with these values of its arrays.
    """
    for each in {id(step): step for step in server_steps}.values():
        if hasattr(each, "cut"):
            each.cut(regions)


def next_state(
    current: State,
    mean: State,
    summary: RoundSummary,
    *,
    mixing: Mixing,
    server_steps: Sequence[ServerStep],
    fixed: Collection[str] = (),
) -> State:
    """Mix the clients' mean into the current state, then take the server's steps.

    Arrays that ``fixed`` names stay as they are: no step's momentum moves them.
    """
    state = state_like(current, mixing.mix(current, mean, summary), maker=mixing)
    for each in server_steps:
        state = state_like(current, each.step(current, state, summary), maker=each)
    return {**state, **{name: current[name] for name in fixed}}


def state_like(current: State, state: State, *, maker: object) -> State:
    """Cast a state to the current dtypes; refuse other names or shapes."""
    had, has = (
        {name: np.shape(array) for name, array in each.items()}
        for each in (current, state)
    )
    wrong = sorted(n for n in had.keys() | has.keys() if had.get(n) != has.get(n))
    if wrong:
        name = wrong[0]
        raise SmartSplitError(
            f"{maker!r} returns a state in which {len(wrong)} arrays are not the "
            f"model's, such as {name!r}: {has.get(name, 'missing')} instead of "
            f"{had.get(name, 'nothing')}. Return every name of the given state."
        )
    return {n: np.asarray(state[n], dtype=array.dtype) for n, array in current.items()}


def settle_round(
    replies: Iterable[ClientReply],
    *,
    round_number: int,
    expected: Mapping[str, Expectation],  # What each chosen client had to send
    current: State,  # The global state, whose untrained values are kept
    edges: EdgePool,  # They hold the sealed tails
) -> Settled:
    """Merge a round's replies, in any order, into their weighted mean."""
    accepted: dict[str, ClientReply] = {}
    failures: list[Failure] = []
    for reply in replies:
        try:
            check_reply(
                reply,
                round_number=round_number,
                expected=expected,
                accepted=accepted,
                current=current,
            )
        except RefusedReply as error:
            failures.append(refusal(reply, error))
        else:
            accepted[reply.client_key] = reply
    accepted = dict(sorted(accepted.items()))
    asked = {key: (expected[key].variant, expected[key].regions) for key in accepted}
    committed, dropped = _commit(accepted, round_number, current, edges, asked=asked)
    failures += dropped
    for failure in dropped:
        del accepted[failure.client_key]
    if not accepted:
        return Settled(state=None, accepted={}, failures=tuple(failures))
    mean = _mean(accepted, committed, current, expected)
    return Settled(state=mean, accepted=accepted, failures=tuple(failures))


def _mean(
    accepted: Mapping[str, ClientReply],
    committed: Sequence[tuple[Variant, Committed]],
    current: State,
    expected: Mapping[str, Expectation],
) -> State:
    """Merge the states of devices and edges, by variant where there are several."""
    asked = {expected[key].variant: expected[key].regions for key in accepted}
    parts: list[Part] = []
    for variant, regions in asked.items():
        device_sums = add_states(
            (reply.state, reply.report.num_examples)
            for key, reply in accepted.items()
            if expected[key].variant == variant
        )
        tails = (each.sums for which, each in committed if which == variant)
        parts.append((add_sums([device_sums, *tails]), regions))
    means = ChainMap(*(dict(each.means) for _, each in committed))
    if len(asked) == 1 and not parts[0][1]:  # They trained all of the state.
        return merge(current, parts[0][0], means)
    return {**merge_parts(current, parts), **means}


def _commit(
    accepted: Mapping[str, ClientReply],
    round_number: int,
    current: State,
    edges: EdgePool,
    *,
    asked: Mapping[str, tuple[Variant, Regions]],  # What each client trained
) -> tuple[list[tuple[Variant, Committed]], list[Failure]]:
    """Commit at every edge; drop a client everywhere if one edge cannot commit it.

    An edge is asked once for each variant: it adds arrays of one shape.
    """
    remaining = dict(accepted)
    dropped: list[Failure] = []
    variants, regions = {k: v for k, (v, _) in asked.items()}, dict(asked.values())
    while True:
        committed: list[tuple[Variant, Committed]] = []
        owner = _owners(remaining, variants, regions)
        lost: dict[str, str] = {}
        for at, entries in _entries_by_place(remaining, variants).items():
            place, variant = at
            alone = {name: current[name] for name in owner if owner[name] == at}
            given = tuple(entries.values())
            try:
                found = edges.commit(place, round_number, given, alone)
                weight = sum(entry.weight for entry in given)
                check_sums(found.sums, current, regions[variant], most_weight=weight)
                committed.append((variant, found))
            except TailLost as error:
                named = [k for k, e in entries.items() if e.session in error.sessions]
                lost |= dict.fromkeys(named or entries, str(error))
            except EdgeError as error:
                lost |= dict.fromkeys(entries, str(error))
        if not lost:
            return committed, dropped
        for key, cause in lost.items():
            report = remaining.pop(key).report
            failure = {"client_key": key, "kind": "edge_failed", "cause": cause}
            dropped.append(Failure(**failure, report=report))


_Place = tuple[str, Variant]
"""An edge, and what it trained a part of."""


def _owners(
    replies: Mapping[str, ClientReply],
    variants: Mapping[str, Variant],
    regions: Mapping[Variant, Regions],
) -> dict[str, _Place | None]:
    """Name the one edge that sums all of a name; None if others or a device add to it.

    Of a smaller variant, it sums only a part of the global array.
    """
    owners: dict[str, _Place | None] = {}
    for key, reply in replies.items():
        variant = variants[key]
        owners |= dict.fromkeys(reply.state)
        for receipt in reply.receipts:
            mine = None if regions[variant] else (receipt.place, variant)
            for name in receipt.names:
                owners[name] = mine if owners.setdefault(name, mine) == mine else None
    return owners


def _entries_by_place(
    replies: Mapping[str, ClientReply], variants: Mapping[str, Variant]
) -> dict[_Place, dict[str, Entry]]:
    """List each edge's sealed sessions by client_key, in client_key order."""
    places: dict[_Place, dict[str, Entry]] = {}
    for key, reply in replies.items():
        for receipt in reply.receipts:
            at = receipt.place, variants[key]
            places.setdefault(at, {})[key] = Entry(
                receipt.session, receipt.digest, reply.report.num_examples
            )
    return places
