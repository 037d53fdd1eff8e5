"""EdgePool: the strategy's connections to all edges of a run."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.client import opening_of
from flwr_smartsplit.edge.gate.rules import kind_of
from flwr_smartsplit.edge.gate.run_keys import RunKeys
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.message_bytes import encode
from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.edge.weighted_mean import Array
from flwr_smartsplit.errors import EdgeError, EdgeUnreachable, RefusedRequest
from flwr_smartsplit.server.global_state import GlobalState
from flwr_smartsplit.server.limits import limits_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.task_digest.facts import (
    facts_digest,
    require_same_task,
    task_facts,
)
from flwr_smartsplit.types import (
    WHOLE,
    ChainProfile,
    ClientPlan,
    DeviceProfile,
    EdgeProfile,
    Failure,
    RoundPlan,
    Variant,
)

_UNLIMITED = wire.Welcome()


@dataclass
class _Link:
    name: str
    address: str
    transport: wire.CountingTransport
    access: str
    started_in: int  # Which phase
    offer: wire.Welcome = _UNLIMITED
    held: str = ""  # The digest of a state that it holds


class EdgePool:
    """Start edges, send them the states they need, commit at them, and stop them."""

    def __init__(
        self, edges: Sequence[Edge], task: Task, *, num_states: int = 2
    ) -> None:
        if not isinstance(edges, list | tuple):
            raise TypeError(f"edges is {edges!r}; give a tuple, such as (RayEdge(),).")
        names = [edge.name for edge in edges]
        if len(set(names)) != len(names):
            raise ValueError(f"edges must have different names, not {names}.")
        for edge in edges:
            unknown = [name for name in edge.profile.links if name not in names]
            if unknown:
                raise ValueError(
                    f"edge {edge.name!r} has a link to {unknown[0]!r}, and the edges "
                    f"are {names}: name one of them, or leave the link out."
                )
        self._edges = {edge.name: edge for edge in edges}
        self._task = task
        self._keys = RunKeys()
        self._num_states = num_states  # That each may have to hold at once
        self._phase = 0
        self._links: dict[str, _Link] = {}
        self._was_ready = False
        self._past_bytes = 0

    @property
    def phase(self) -> int:
        """The phase that was begun last, counted from 1."""
        return self._phase

    @property
    def names(self) -> tuple[str, ...]:
        """The edges' names."""
        return tuple(self._edges)

    def profiles(self, names: Sequence[str]) -> tuple[EdgeProfile, ...]:
        """Return the profiles of some edges, in order.

        What the strategy was not told of a running edge is as the edge says.
        """
        return tuple(map(self._profile, names))

    def _profile(self, name: str) -> EdgeProfile:
        profile: EdgeProfile = self._edges[name].profile
        link = self._links.get(name)
        offer = _UNLIMITED if link is None else link.offer
        if profile.memory_bytes is None:
            profile = replace(profile, memory_bytes=offer.memory_bytes)
        if profile.disk_bytes is None:
            profile = replace(profile, disk_bytes=offer.disk_bytes)
        return profile

    def prepare(self, digest: str) -> tuple[dict[str, str], list[Failure]]:
        """Begin a phase: start edges that do not run; ask who holds its state.

        Returns the addresses of the edges that are ready, by name and in order, and the
        failures of the others, which get no client this round. Raises
        ``EdgeUnreachable`` if no edge was ever ready: the set-up is wrong.
        """
        self._phase += 1
        self._was_ready = self._was_ready or bool(self._links)
        failures = self._tried(self._edges, lambda link: self._ask_held(link, digest))
        return self._addresses(), failures

    def hold(
        self,
        names: Collection[str],
        digest: str,
        state: State,
        *,
        rest: Mapping[str, State] = MappingProxyType({}),
        variant: Variant = WHOLE,
    ) -> tuple[dict[str, str], list[Failure]]:
        """Have some edges hold a variant's state; return what ``prepare`` returns.

        ``rest`` is its frozen part by digest, if there is one. It is sent once. An edge
        that fails is started again; then its address is another one.
        """
        parts = {**rest, digest: state}
        lacking = [n for n, link in self._links.items() if link.held != digest]
        names = [n for n in self._edges if n in names and n in lacking]
        failures = self._tried(
            names, lambda link: self._send_state(link, parts, variant)
        )
        return self._addresses(), failures

    def planned(
        self, state: GlobalState, plan: Callable[[Sequence[str]], RoundPlan]
    ) -> tuple[RoundPlan, dict[str, str], list[Failure]]:
        """Plan a phase with the edges that are ready; have those in use hold its state.

        Without one that fails to hold it, or with its new address, ``plan`` is called
        again. Returns the plan, and what ``prepare`` returns.
        """
        addresses, failures = self.prepare(state.digest)
        rest = {state.rest: state.frozen} if state.rest else {}
        while True:
            made, before = plan(tuple(addresses)), addresses
            used = {e for each in made.assignments for e in each.option.route.edges()}
            held = state.digest, state.changing
            addresses, more = self.hold(used, *held, rest=rest, variant=state.variant)
            failures += more
            if addresses == before:
                return made, addresses, failures

    def _addresses(self) -> dict[str, str]:
        links = self._links
        return {name: links[name].address for name in self._edges if name in links}

    def _tried(
        self, names: Iterable[str], do: Callable[[_Link], None]
    ) -> list[Failure]:
        """Do something at some edges; drop those where it fails after a new start."""
        failures = []
        for name in names:
            try:
                self._do(name, do)
            except EdgeError as error:
                self._drop(name)
                failures.append(
                    Failure(
                        client_key=f"edge {name}", kind="edge_failed", cause=str(error)
                    )
                )
        if failures and not self._links and not self._was_ready:
            causes = " ".join(failure.cause for failure in failures)
            raise EdgeUnreachable(f"no edge could be started: {causes}")
        return failures

    def signed(
        self,
        plan: ClientPlan,
        device: DeviceProfile,
        profile: ChainProfile,
        *,
        is_train: bool,
    ) -> ClientPlan:
        """Sign what a client opens at its edges in this phase, and what it may do.

        ``profile`` is that of its batches. A plan that goes to no edge stays as it is.
        """
        num_units = len(build_chain(self._task).under(plan.variant))
        if not plan.route.edge_legs(num_units):
            return plan
        limits = limits_of(
            plan, device, profile, num_units=num_units, is_train=is_train
        )
        return self.sign(
            plan, limits, is_trained=is_train, batch_size=device.batch_size
        )

    def sign(
        self,
        plan: ClientPlan,
        limits: wire.Limits,
        *,
        is_trained: bool,
        batch_size: int,
        predicts: bool = False,
    ) -> ClientPlan:
        """Sign what a client opens at its edges in this phase, within some limits."""
        limits = replace(limits, phase=self._phase)
        request = opening_of(
            plan,
            plan.route.edge_legs(len(build_chain(self._task).under(plan.variant))),
            is_trained=is_trained,
            token="",
            batch_size=batch_size,
            accumulate=max(self._task.accumulate, plan.accumulate),
            predicts=predicts,
            sign=lambda opening: self._keys.sign(opening, limits),
        )
        return replace(plan, opening=b"".join(encode(request)))

    def commit(
        self,
        place: str,
        round_number: int,
        entries: tuple[wire.Entry, ...],
        alone: Mapping[str, Array] = MappingProxyType({}),
    ) -> wire.Committed:
        """Have one edge merge exactly these sessions.

        ``alone`` are arrays like the means that it shall send instead of sums. Raises
        ``TailLost`` with the sessions that it cannot merge, or another ``EdgeError``.
        """
        if place not in self._links:
            raise EdgeUnreachable(f"edge {place!r} is not running.")
        try:
            request = wire.Commit(round_number, entries, tuple(alone))
            committed = _asked(self._links[place], request)
        except RefusedRequest as error:
            raise EdgeError(
                f"edge {place!r} does not know this run any more: it was started again "
                "on another disk, or heard nothing of the run for its --lease. What "
                "it trained in this round is lost; the next one begins there anew."
            ) from error
        return replace(committed, means=checked_means(place, committed, alone))

    def release(self, round_number: int, keep_digest: str, keep_rest: str = "") -> None:
        """Have the edges delete a round's files; ignore dead edges.

        What was signed so far opens nothing any more.
        """
        phase = self._phase
        self.let_go(wire.Release(round_number, keep_digest, keep_rest, phase=phase))

    def let_go(self, release: wire.Release) -> None:
        """Have the edges delete what is over; ignore dead edges."""
        for link in self._links.values():
            with suppress(EdgeError):
                _asked(link, release)

    def stop(self) -> None:
        """End the run at every edge and stop it, even if another one fails."""
        for link in self._links.values():
            with suppress(EdgeError):
                _asked(link, wire.EndRun())
        with ExitStack() as stack:
            for name in tuple(self._links):
                stack.callback(self._drop, name)
        self._keys = RunKeys()  # What runs later is another run.

    def traffic_bytes(self) -> int:
        """Return the bytes sent between the strategy and its edges so far."""
        return self._past_bytes + sum(map(_traffic_bytes, self._links.values()))

    def _do(self, name: str, do: Callable[[_Link], None]) -> None:
        link = self._links.get(name)
        if link is not None:
            try:
                do(link)
                return
            except EdgeError:
                if link.started_in == self._phase:
                    raise
                self._drop(name)
        address = self._edges[name].start(self._task)
        try:
            transport = wire.CountingTransport(self._edges[name].connect(address))
        except EdgeError:
            self._edges[name].stop(address)
            raise
        access = self._keys.access(address)
        link = _Link(name, address, transport, access, self._phase)
        self._links[name] = link
        secret = self._edges[name].admin_secret
        hello = self._keys.hello(address, admin=secret, num_states=self._num_states)
        link.offer = _asked(link, hello)
        do(link)

    def _ask_held(self, link: _Link, digest: str) -> None:
        held = _asked(link, wire.IsHeld(digest))
        self._compare_task(link, held.task_digest)
        link.held = digest if held.is_held else ""

    def _send_state(
        self, link: _Link, parts: Mapping[str, State], variant: Variant
    ) -> None:
        """Send what the edge does not hold: the rest, if any, and then the state."""
        *rest, digest = parts
        self._ask_held(link, digest)
        if link.held != digest:
            for each in rest:
                self._send_state(link, {each: parts[each]}, variant)
            others = "".join(rest)  # One or none
            _asked(link, wire.HoldState(digest, parts[digest], others, variant))
            link.held = digest

    def _compare_task(self, link: _Link, digest: str) -> None:
        """Raise ``InvalidTask`` if the edge builds another task than this process."""
        if digest != facts_digest(self._facts):
            found = _asked(link, wire.DescribeTask()).facts
            require_same_task(found, self._facts, whose=f"edge {link.name!r}")

    @cached_property
    def _facts(self) -> dict[str, str]:
        return task_facts(self._task, build_chain(self._task).model)

    def _drop(self, name: str) -> None:
        """Stop an edge, if it was started, and keep its byte count."""
        link = self._links.pop(name, None)
        if link is not None:
            self._past_bytes += _traffic_bytes(link)
            self._edges[name].stop(link.address)


def _asked(link: _Link, request: wire.StrategyRequest[wire.ReplyT]) -> wire.ReplyT:
    """Send a request; turn other errors of the edge into an ``EdgeError``."""
    if not isinstance(request, wire.Hello):
        request = replace(request, access=link.access)
    try:
        return link.transport.send(request)
    except (MemoryError, OSError, RuntimeError) as error:
        raise EdgeError(
            f"edge {link.name!r} fails at {type(request).__name__} "
            f"({type(error).__name__}: {error}): its clients sit the round out."
        ) from error


def checked_means(
    place: str, committed: wire.Committed, alone: Mapping[str, Array]
) -> dict[str, Array]:
    """Return an edge's means, to be written to, if they are those it was asked for."""
    means, both = committed.means, committed.sums.keys() & alone.keys()
    if both or {n: kind_of(a) for n, a in means.items()} != {
        n: kind_of(a) for n, a in alone.items()
    }:
        raise EdgeError(
            f"edge {place!r} merged other names, shapes or dtypes than the "
            f"{len(alone)} that it alone had to merge: use one release of "
            "flwr_smartsplit and one task everywhere."
        )
    return {n: np.require(a, requirements=["A", "W"]) for n, a in means.items()}


def _traffic_bytes(link: _Link) -> int:
    return link.transport.sent_bytes + link.transport.received_bytes
