"""SmartSplit: the central manager as a Flower Message-API strategy."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, getLogger
from pathlib import Path
from random import Random
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from flwr_smartsplit.errors import InvalidTask, RefusedReply, SmartSplitError
from flwr_smartsplit.flower.dispatch import Dispatch
from flwr_smartsplit.flower.fleet import Fleet, Member
from flwr_smartsplit.flower.journal import Journal
from flwr_smartsplit.flower.records import (
    from_array_record,
    message_dialect,
    metrics_of,
    to_array_record,
)
from flwr_smartsplit.flower.round_log import RoundLog
from flwr_smartsplit.model.building import build_chain
from flwr_smartsplit.model.costs import profile_chain
from flwr_smartsplit.policy.acceptance import check_evaluation, refusal
from flwr_smartsplit.policy.rounds import plan_round
from flwr_smartsplit.runtime.edge_pool import EdgePool
from flwr_smartsplit.runtime.randomness import derived_seed
from flwr_smartsplit.runtime.settling import settle_round
from flwr_smartsplit.runtime.transport import Edge
from flwr_smartsplit.runtime.wire import state_digest
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import (
    Assignment,
    ChainProfile,
    ClientPlan,
    ClientReply,
    DeviceProfile,
    Failure,
    RoundPlan,
)

_log = getLogger("flwr")
MetricsFn = Callable[[list[RecordDict], str], MetricRecord]


class SmartSplit(Strategy):
    """Federated averaging in which weak devices train only the front of the model.

    Each round it gives every chosen client the deepest route that its memory budget
    allows; an edge trains the rest. With everybody on the whole route this is
    FedAvg. A reconstruction: of SmartSplit (Tian et al., 2024) only the abstract
    is public, and the present policy is a first one.

    Arguments that are not explained here are those of
    ``flwr.serverapp.strategy.FedAvg``.

    Parameters
    ----------
    task : Task
        Model, loss and optimizer, the same as the clients'.
    edges : Sequence[Edge]
        Edges that host tails, such as ``(RayEdge(),)``; none means that only clients
        who can hold the whole model train.
    seed : int
        Root of sampling and of every random stream of the clients.
    num_threads : int
        Torch threads at every place.
    journal : str or Path, optional
        File for one JSON line per client and round.
    clock : Callable[[], float]
        Seconds that only move forward.
    profile_timeout_seconds : float
        How long to wait for clients that are asked who they are.
    weighted_by_key : str
        What the weight is called in metrics; it is the number of examples.

    Attributes
    ----------
    round_plans : list[RoundPlan]
        Every training plan so far.

    References
    ----------
    Tian et al., "Breaking the Memory Wall for Heterogeneous Federated Learning
    via Model Splitting", IEEE TPDS 35(12), 2024, arXiv:2410.11577.
    """

    # longer than 40 lines because FedAvg's arguments are kept
    def __init__(  # noqa: PLR0913
        self,
        task: Task,
        edges: Sequence[Edge] = (),
        *,
        seed: int = 0,
        num_threads: int = 1,
        journal: str | Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsFn | None = None,
        evaluate_metrics_aggr_fn: MetricsFn | None = None,
        profile_timeout_seconds: float = 120.0,
    ) -> None:
        # FedAvg checks and keeps its own arguments, and lends its averages.
        self.fedavg = FedAvg(
            fraction_train=fraction_train,
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            weighted_by_key=weighted_by_key,
            arrayrecord_key=arrayrecord_key,
            configrecord_key=configrecord_key,
            train_metrics_aggr_fn=train_metrics_aggr_fn,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn,
        )
        self.task = task
        self.seed = seed
        self.num_threads = num_threads
        self.round_plans: list[RoundPlan] = []
        self._chain = build_chain(task)
        self._edges = EdgePool(edges, task)
        if edges:
            self._chain.require_cuts()
        self._fleet = Fleet(
            message_dialect(arrayrecord_key, configrecord_key),
            timeout_seconds=profile_timeout_seconds,
        )
        self._rounds = RoundLog(Journal(journal), clock)
        self._clock = clock
        self._profiles: dict[int, ChainProfile] = {}
        self._current: Mapping[str, Any] = {}
        self._digest = ""
        self._dispatch: Dispatch | None = None

    @property
    def failures(self) -> list[Failure]:
        """Every client's part that was not merged so far, and why."""
        return self._rounds.failures

    def summary(self) -> None:
        """Log the strategy's settings, in Flower's shape."""
        _log.log(INFO, "\t├──> Splitting:")
        _log.log(INFO, "\t│\t├──Units: %d", len(self._chain))
        _log.log(INFO, "\t│\t└──Edges: %s", ", ".join(self._edges.names) or "none")
        self.fedavg.summary()

    def start(  # noqa: PLR0913, PLR0917 - Flower's signature
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the strategy as ``Strategy.start`` does, and end the edges after it.

        Raises
        ------
        InvalidTask
            If the initial arrays are not the state of the task's model.
        """
        self._chain.check_state(
            {name: tuple(array.shape) for name, array in initial_arrays.items()}
        )
        try:
            return super().start(
                grid,
                initial_arrays,
                num_rounds,
                timeout,
                train_config,
                evaluate_config,
                evaluate_fn,
            )
        finally:
            self._edges.stop()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Plan the round and send each chosen client its segments and its plan."""
        if self.fedavg.fraction_train == 0.0:
            return []
        return self._configure(server_round, arrays, config, grid, is_train=True)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each chosen client what it needs to evaluate along its route."""
        if self.fedavg.fraction_evaluate == 0.0:
            return []
        return self._configure(server_round, arrays, config, grid, is_train=False)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Settle the round: refuse, commit, drop, merge."""
        dispatch, self._dispatch = self._dispatch, None
        if dispatch is None:
            return None, None
        received = self._clock()
        client_replies, failures = dispatch.read(replies)
        settled = settle_round(
            client_replies,
            round_number=server_round,
            expected=dispatch.expectations(self._chain),
            current=self._current,
            edges=self._edges,
        )
        failures += settled.failures
        state = self._current if settled.state is None else settled.state
        self._edges.release(server_round, state_digest(state))
        self._rounds.write_replies(dispatch, settled.accepted, failures)
        self._rounds.write_round(
            dispatch,
            settled.accepted,
            failures,
            edge_bytes_so_far=self._edges.traffic_bytes(),
            received_seconds=received,
        )
        if settled.state is None:
            return None, None
        return to_array_record(state), self._average(
            settled.accepted, self.fedavg.train_metrics_aggr_fn
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average what the clients measured along their routes."""
        dispatch, self._dispatch = self._dispatch, None
        if dispatch is None:
            return None
        client_replies, failures = dispatch.read(replies)
        accepted: dict[str, ClientReply] = {}
        for reply in sorted(client_replies, key=lambda r: r.client_key):
            try:
                check_evaluation(reply, round_number=server_round)
            except RefusedReply as error:
                failures.append(refusal(reply, error))
            else:
                accepted[reply.client_key] = reply
        self._edges.release(server_round, self._digest)
        self._rounds.write_replies(dispatch, accepted, failures)
        if not accepted:
            return None
        return self._average(accepted, self.fedavg.evaluate_metrics_aggr_fn)

    # --- one phase ----------------------------------------------------------------

    def _configure(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        *,
        is_train: bool,
    ) -> Iterable[Message]:
        started = self._clock()
        self._current = from_array_record(arrays)
        members = self._members(grid, server_round, is_train=is_train)
        self._digest = state_digest(self._current)
        addresses, unready = self._edges.prepare(self._digest, self._current)
        self._rounds.write_failures(unready, server_round, phase="edge")
        plan = self._plan(server_round, members, tuple(addresses), is_train=is_train)
        self._rounds.warn_of_unread(config)
        config["server-round"] = server_round
        self._dispatch = Dispatch(server_round, is_train, started)
        self._rounds.write_plan(
            plan, {k: m.profile for k, m in members.items()}, is_train=is_train
        )
        return [
            self._dispatch.message(
                self._client_plan(assignment, server_round, addresses),
                members[assignment.client_key],
                predicted_peak_bytes=assignment.predicted_peak_bytes,
                chain=self._chain,
                arrays=arrays,
                config=dict(config),
            )
            for assignment in plan.assignments
        ]

    def _client_plan(
        self,
        assignment: Assignment,
        server_round: int,
        addresses: Mapping[str, str],
    ) -> ClientPlan:
        return ClientPlan(
            client_key=assignment.client_key,
            round_number=server_round,
            route=assignment.route,
            seed=self.seed,
            num_threads=self.num_threads,
            budget_bytes=assignment.budget_bytes,
            state_digest=self._digest,
            edge_addresses={e: addresses[e] for e in assignment.route.edges()},
        )

    def _members(
        self, grid: Grid, server_round: int, *, is_train: bool
    ) -> dict[str, Member]:
        """Wait for enough nodes, as FedAvg does, and learn who they are."""
        least = self.fedavg.min_available_nodes
        while len(nodes := list(grid.get_node_ids())) < least:
            _log.log(
                INFO,
                "Waiting for nodes to connect: %d connected (minimum required: %d).",
                len(nodes),
                least,
            )
            time.sleep(1)
        members, failures = self._fleet.members(grid, nodes, ask_again=is_train)
        self._rounds.write_failures(failures, server_round, phase="profile")
        if failures and not members:
            raise SmartSplitError(
                f"none of {len(nodes)} nodes says who it is; the first: "
                f"{failures[0].cause}"
            )
        return members

    def _plan(
        self,
        server_round: int,
        members: Mapping[str, Member],
        edges: Sequence[str],
        *,
        is_train: bool,
    ) -> RoundPlan:
        """Translate FedAvg's arguments into a call of the pure policy."""
        average = self.fedavg
        fraction = average.fraction_train if is_train else average.fraction_evaluate
        least = average.min_train_nodes if is_train else average.min_evaluate_nodes
        fleet = self._priced(server_round, members)
        plan = plan_round(
            fleet,
            self._profiles,
            round_number=server_round,
            num_clients=max(int(len(fleet) * fraction), least),
            edges=edges,
            rng=Random(derived_seed(self.seed, server_round, int(is_train))),
        )
        if is_train:
            self.round_plans.append(plan)
        return plan

    def _priced(
        self, server_round: int, members: Mapping[str, Member]
    ) -> list[DeviceProfile]:
        """List the clients whose batch size works; without any, raise the reason."""
        priced: list[DeviceProfile] = []
        problems: list[InvalidTask] = []
        for key, member in members.items():
            size = member.profile.batch_size
            try:
                if size not in self._profiles:
                    self._profiles[size] = profile_chain(
                        self._chain, batch_size=size, task=self.task
                    )
            except InvalidTask as error:
                problems.append(error)
                failure = Failure(client_key=key, kind="failed", cause=str(error))
                self._rounds.write_failures([failure], server_round, phase="profile")
            else:
                priced.append(member.profile)
        if problems and not priced:
            raise problems[0]
        return priced

    def _average(
        self, accepted: Mapping[str, ClientReply], average: MetricsFn
    ) -> MetricRecord:
        """Average the clients' metrics, in client_key order."""
        key = self.fedavg.weighted_by_key
        contents = [
            RecordDict({"metrics": MetricRecord(metrics_of(reply.report, key))})
            for reply in accepted.values()
        ]
        return average(contents, key)
