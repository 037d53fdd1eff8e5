"""CentralManager: plan a round, settle a round. Both strategies are thin around it.

It knows clients by their client_key and states by name; which of Flower's APIs brings
the messages is the strategies' business. So the same replies give the same bits.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, getLogger
from random import Random
from typing import Any

import numpy.typing as npt

from flwr_smartsplit.edge.protocol import Edge
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import InvalidTask, RefusedReply, SmartSplitError
from flwr_smartsplit.flower.journal.journal import Journal
from flwr_smartsplit.flower.journal.round_log import RoundLog
from flwr_smartsplit.flower.observations import cohort_in, observed
from flwr_smartsplit.flower.round_exchange import Dispatch, Sent, device_names, returned
from flwr_smartsplit.flower.serde.records import plain_values
from flwr_smartsplit.flower.server_optimizer import ServerOptimizer
from flwr_smartsplit.flower.settings import Settings, check_settings
from flwr_smartsplit.plan.rounds import Routing, plan_round
from flwr_smartsplit.plan.selection.history import NO_HISTORY
from flwr_smartsplit.plan.selection.selection import select_at_random
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.server.acceptance import check_evaluation, refusal
from flwr_smartsplit.server.aggregation import Settled, settle_round
from flwr_smartsplit.server.edge_pool import EdgePool
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.rng import derived_seed
from flwr_smartsplit.train.unit_migration import kept_units
from flwr_smartsplit.types import (
    Assignment,
    ChainProfile,
    ClientPlan,
    ClientReply,
    Cohort,
    Constraints,
    DeviceProfile,
    Failure,
    RoundPlan,
)

State = Mapping[str, npt.NDArray[Any]]
_log = getLogger("flwr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of one round, as Flower asks for it.

    Parameters
    ----------
    round_number : int
        The round, counted from 1.
    is_train : bool
        Training or evaluation.
    fraction : float
        The share of the clients to choose.
    least : int
        The least number of clients to choose.
    config : Mapping[str, Any]
        What the user tells the clients.
    """

    round_number: int
    is_train: bool
    fraction: float
    least: int
    config: Mapping[str, Any]


class CentralManager:
    """Give each chosen client its route, and merge what comes back.

    Parameters
    ----------
    task : Task
        Model, loss and optimizer, the same as the clients'.
    edges : Sequence[Edge]
        Edges that host tails.
    settings : Settings
        All else.
    """

    def __init__(self, task: Task, edges: Sequence[Edge], settings: Settings) -> None:
        check_settings(settings)
        self.task = task
        self.settings = settings
        self.chain = build_chain(task)
        self.edges = EdgePool(edges, task)
        self.rounds = RoundLog(
            Journal(settings.journal, settings.on_row), settings.clock
        )
        self.round_plans: list[RoundPlan] = []
        self.history = NO_HISTORY
        if edges:
            self.chain.require_cuts()
        self._constraints = Constraints(
            min_device_units=settings.min_device_units,
            recompute=settings.recompute,
            kept_units=kept_units(self.chain, task),
        )
        self._profiles: dict[int, ChainProfile] = {}
        self._current: State = {}
        self._digest = ""
        self._dispatch: Dispatch | None = None
        self._optimizer: ServerOptimizer | None = None
        if settings.server_optimizer is not None:
            trained = frozenset(n for n, _ in self.chain.model.named_parameters())
            self._optimizer = ServerOptimizer(settings.server_optimizer, trained)

    def summary(self) -> None:
        """Log the settings, in Flower's shape."""
        _log.log(INFO, "\t├──> Splitting:")
        _log.log(INFO, "\t│\t├──Units: %d", len(self.chain))
        _log.log(INFO, "\t│\t└──Edges: %s", ", ".join(self.edges.names) or "none")

    def begin(
        self, phase: Phase, state: State, clients: Mapping[str, DeviceProfile]
    ) -> Dispatch:
        """Plan a phase: who is sent what.

        Parameters
        ----------
        phase : Phase
            What Flower asks for.
        state : Mapping[str, ndarray]
            The global state.
        clients : Mapping[str, DeviceProfile]
            Who is there, by client_key.
        """
        started = self.settings.clock()
        self._current, self._digest = state, state_digest(state)
        addresses, unready = self.edges.prepare(self._digest, state)
        self.rounds.write_failures(unready, phase.round_number, phase="edge")
        plan = self._plan(phase, clients, tuple(addresses))
        if self.task.schedule_fn is None:
            self.rounds.warn_of_unread(phase.config)
        self.rounds.write_plan(plan, clients, is_train=phase.is_train)
        dispatch = Dispatch(phase.round_number, phase.is_train, started)
        cohort = None
        if phase.is_train and self.settings.refine:
            cohort = cohort_in(
                plan.assignments,
                clients,
                self.history,
                edges=self.edges.profiles(tuple(addresses)),
            )
        for assignment in plan.assignments:
            key = assignment.client_key
            client_plan = self._client_plan(
                assignment, phase, clients[key], addresses=addresses, cohort=cohort
            )
            names = device_names(client_plan, self.chain)
            dispatch.sent[key] = Sent(
                client_plan,
                names,
                returned(names, self.task.is_local),
                assignment,
                self._profiles[clients[key].batch_size],
            )
        self._dispatch = dispatch
        return dispatch

    def take(self) -> Dispatch | None:
        """Return what went out in the running phase, once."""
        dispatch, self._dispatch = self._dispatch, None
        return dispatch

    def settle(
        self,
        dispatch: Dispatch,
        replies: Iterable[ClientReply],
        failures: Sequence[Failure],
    ) -> Settled:
        """End a training phase: refuse, commit, drop, merge, step."""
        received = self.settings.clock()
        replies = list(replies)
        settled = settle_round(
            replies,
            round_number=dispatch.round_number,
            expected=dispatch.expectations(self.chain, replies),
            current=self._current,
            edges=self.edges,
            step=self._step(dispatch.round_number),
        )
        failures = [*failures, *settled.failures]
        self.history = self.history.after(
            observed(dispatch, settled.accepted, self.settings.client_seconds)
        )
        if self.edges.names:
            state = self._current if settled.state is None else settled.state
            self.edges.release(dispatch.round_number, state_digest(state))
        self._write(dispatch, settled.accepted, failures, received)
        return settled

    def assess(
        self,
        dispatch: Dispatch,
        replies: Iterable[ClientReply],
        failures: Sequence[Failure],
    ) -> dict[str, ClientReply]:
        """End an evaluation phase; return what counts, in client_key order."""
        received = self.settings.clock()
        accepted: dict[str, ClientReply] = {}
        failures = list(failures)
        for reply in sorted(replies, key=lambda r: r.client_key):
            try:
                check_evaluation(reply, round_number=dispatch.round_number)
            except RefusedReply as error:
                failures.append(refusal(reply, error))
            else:
                accepted[reply.client_key] = reply
        self.edges.release(dispatch.round_number, self._digest)
        self._write(dispatch, accepted, failures, received)
        return accepted

    def _write(
        self,
        dispatch: Dispatch,
        accepted: Mapping[str, ClientReply],
        failures: list[Failure],
        received_seconds: float,
    ) -> None:
        """Log and write down how a phase ended."""
        self.rounds.write_replies(dispatch, accepted, failures)
        self.rounds.write_round(
            dispatch,
            accepted,
            failures,
            edge_bytes_so_far=self.edges.traffic_bytes(),
            received_seconds=received_seconds,
        )

    # --- planning -----------------------------------------------------------------

    def _plan(
        self, phase: Phase, clients: Mapping[str, DeviceProfile], edges: Sequence[str]
    ) -> RoundPlan:
        """Translate FedAvg's arguments into a call of the pure policy."""
        fleet = self._priced(phase.round_number, clients)
        seed = derived_seed(self.settings.seed, phase.round_number, int(phase.is_train))
        plan = plan_round(
            fleet,
            self._profiles,
            round_number=phase.round_number,
            num_clients=max(int(len(fleet) * phase.fraction), phase.least),
            routing=Routing(
                edges=self.edges.profiles(edges),
                select=self.settings.select if phase.is_train else select_at_random,
                choose_route=self.settings.choose_route,
                constraints=self._constraints,
            ),
            rng=Random(seed),
            history=self.history,
        )
        if phase.is_train:
            self.round_plans.append(plan)
        return plan

    def _priced(
        self, round_number: int, clients: Mapping[str, DeviceProfile]
    ) -> list[DeviceProfile]:
        """List the clients whose batch size works; without any, raise the reason."""
        priced: list[DeviceProfile] = []
        problems: list[InvalidTask] = []
        for key, client in clients.items():
            size = client.batch_size
            try:
                if size not in self._profiles:
                    self._profiles[size] = profile_chain(
                        self.chain, batch_size=size, task=self.task
                    )
            except InvalidTask as error:
                problems.append(error)
                failure = Failure(client_key=key, kind="failed", cause=str(error))
                self.rounds.write_failures([failure], round_number, phase="profile")
            else:
                priced.append(client)
        if problems and not priced:
            raise problems[0]
        return priced

    def _client_plan(
        self,
        assignment: Assignment,
        phase: Phase,
        device: DeviceProfile,
        *,
        addresses: Mapping[str, str],
        cohort: Cohort | None,
    ) -> ClientPlan:
        option = assignment.option
        return ClientPlan(
            client_key=assignment.client_key,
            round_number=phase.round_number,
            route=option.route,
            seed=self.settings.seed,
            num_threads=self.settings.num_threads,
            budget_bytes=assignment.budget_bytes,
            recompute=option.recompute,
            predicted_peak_bytes=option.peak_bytes,
            variant=option.variant,
            codecs=option.codecs,
            accumulate=option.accumulate,
            state_digest=self._digest,
            edge_addresses={e: addresses[e] for e in option.route.edges()},
            config=plain_values(phase.config),
            cohort=None if cohort is None else cohort.for_steps(device.num_steps),
            importance=self.history.importance.get(device.client_key, 0.0),
            num_examples=device.num_examples,
            constraints=self._constraints,
        )

    def _step(self, round_number: int) -> Callable[[State, State], State] | None:
        """Return what follows the merge, if anything does."""
        optimizer = self._optimizer
        if optimizer is None:
            return None
        return lambda before, mean: optimizer.step(round_number, before, mean)


def refuse_wrappers(strategy: object, kinds: tuple[type, ...]) -> None:
    """Refuse to be driven by another strategy, such as differential privacy's.

    Such wrappers clip and noise whole models of single clients, which are nowhere
    whole when they are split; what they promise would silently not hold.

    Raises
    ------
    SmartSplitError
        If the method that calls this was called by another strategy.
    """
    owner = sys._getframe(2).f_locals.get("self")
    if isinstance(owner, kinds) and owner is not strategy:
        raise SmartSplitError(
            f"{type(owner).__name__} drives {type(strategy).__name__}: strategies that "
            "wrap others, as for differential privacy, change the whole models of "
            "single clients, and those are nowhere whole when they are split. Run it "
            "unwrapped."
        )
