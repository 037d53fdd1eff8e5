"""SmartSplit: the central manager as a Flower Message-API strategy."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from logging import INFO, WARNING, getLogger
from pathlib import Path

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower import messages
from flwr_smartsplit.flower.inner_strategy import (
    MESSAGE_API,
    check_proximal,
    check_strategy,
    has_server_step,
    message_config,
    overrides,
    sample_size,
    without_fedavgs_log,
)
from flwr_smartsplit.flower.journal.journal import DEFAULT_JOURNAL, OnRow
from flwr_smartsplit.flower.planning import Planning
from flwr_smartsplit.flower.registry import Fleet, Member
from flwr_smartsplit.flower.round_manager import (
    BetweenRounds,
    CentralManager,
    Phase,
    Settings,
    refuse_wrappers,
)
from flwr_smartsplit.flower.serde.records import (
    from_array_record,
    message_dialect,
    to_array_record,
)
from flwr_smartsplit.flower.serde.replies import metrics_of
from flwr_smartsplit.flower.server_optimizer import message_step
from flwr_smartsplit.server.aggregation import Mixing, Replace, ServerStep
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ClientReply, Failure, RoundPlan

_log = getLogger("flwr")


class SmartSplit(Strategy):
    """Let weak devices train only the front of a model, under a strategy of Flower's.

    Each round it gives every chosen client one of the routes that its memory budget
    allows; an edge trains the rest. The clients' mean is exact whatever their routes;
    the inner strategy takes its server step from it. With everybody on the whole route
    this is the inner strategy. A reconstruction: of SmartSplit (Tian et al., 2024)
    only the abstract is public, and the present policy is a first one.

    Parameters
    ----------
    task : Task
        Model, loss and optimizer, the same as the clients'.
    edges : Sequence[Edge]
        Edges that host tails, such as ``(RayEdge(),)``; none means that only clients
        who can hold the whole model train.
    strategy : FedAvg, optional
        Flower's strategy, ``FedAvg()`` by default. Its sampling numbers, record keys,
        metric functions and server step are kept (``FedAdam``, ``FedYogi``,
        ``FedAdagrad``, ``FedAvgM``), and what it writes into a round's config. One that
        must see whole client models is refused.
    planning : Planning
        How clients and routes are chosen.
    mixing : Mixing
        How much the clients' mean counts against the state that it meets.
    server_steps : Sequence[ServerStep]
        What the server adds after the inner strategy's step, in this order.
    seed : int
        Root of sampling and of every random stream of the clients.
    journal : str or Path, optional
        File for one JSON line per client and round; ``{number}`` in its name becomes
        the first number that is free. None writes no file.
    on_row : Sequence[Callable[[Mapping], None]]
        Told each of these lines as a mapping, such as ``TensorBoardRows(folder)``.
    between_rounds : Callable[[int, state, RoundSummary], state or None], optional
        Told each settled round's number, state and summary, before the next begins. A
        state that it returns is the next one.

    References
    ----------
    Tian et al., "Breaking the Memory Wall for Heterogeneous Federated Learning
    via Model Splitting", IEEE TPDS 35(12), 2024, arXiv:2410.11577.
    """

    def __init__(  # noqa: PLR0913 - what can be chosen, one by one
        self,
        task: Task,
        edges: Sequence[Edge] = (),
        *,
        strategy: FedAvg | None = None,
        planning: Planning = Planning(),
        mixing: Mixing = Replace(),
        server_steps: Sequence[ServerStep] = (),
        seed: int = 0,
        journal: str | Path | None = DEFAULT_JOURNAL,
        on_row: Sequence[OnRow] = (),
        between_rounds: BetweenRounds | None = None,
    ) -> None:
        self.strategy = FedAvg() if strategy is None else strategy
        check_strategy(self.strategy, MESSAGE_API)
        check_proximal(self.strategy, task)
        has_step = has_server_step(self.strategy, MESSAGE_API)
        settings = Settings(
            planning=planning,
            mixing=mixing,
            server_steps=tuple(server_steps),
            seed=seed,
            journal=journal,
            on_row=on_row,
            between_rounds=between_rounds,
        )
        self._central = CentralManager(
            task,
            edges,
            settings,
            take_step=partial(message_step, self.strategy) if has_step else None,
        )
        keys = self.strategy.arrayrecord_key, self.strategy.configrecord_key
        self._fleet = Fleet(
            message_dialect(*keys), timeout_seconds=planning.profile_timeout_seconds
        )

    @property
    def failures(self) -> list[Failure]:
        """Every client's part that was not merged so far, and why."""
        return self._central.rounds.failures

    @property
    def round_plans(self) -> list[RoundPlan]:
        """Every training plan so far."""
        return self._central.round_plans

    def summary(self) -> None:
        """Log the strategy's settings, in Flower's shape."""
        self._central.summary()
        self.strategy.summary()

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
        self._central.chain.check_state(
            {name: tuple(array.shape) for name, array in initial_arrays.items()}
        )
        try:
            result = super().start(
                grid,
                initial_arrays,
                num_rounds,
                timeout,
                train_config,
                evaluate_config,
                evaluate_fn,
            )
        finally:
            self.close()
        if not result.arrays and self.strategy.fraction_train > 0:
            _log.log(WARNING, "Nobody trained: the result is the initial model.")
            result.arrays = initial_arrays
        return result

    def close(self) -> None:
        """End the edges; ``start`` does so by itself."""
        self._central.close()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Plan the round and send each chosen client its segments and its plan."""
        refuse_wrappers(self, (Strategy,))
        return self._configure(server_round, arrays, config, grid, is_train=True)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each chosen client what it needs to evaluate along its route."""
        return self._configure(server_round, arrays, config, grid, is_train=False)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Settle the round: refuse, commit, drop, merge, mix, step."""
        dispatch = self._central.take(server_round, is_train=True)
        if dispatch is None:
            return None, None
        read = messages.read(dispatch, replies, self._central.chain)
        settled = self._central.settle(dispatch, *read)
        arrays = None if settled.state is None else to_array_record(settled.state)
        if not settled.accepted:
            return arrays, None
        contents = self._contents(settled.accepted)
        key = self.strategy.weighted_by_key
        return arrays, self.strategy.train_metrics_aggr_fn(contents, key)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the inner strategy average what the clients measured on their routes."""
        dispatch = self._central.take(server_round, is_train=False)
        if dispatch is None:
            return None
        read = messages.read(dispatch, replies, self._central.chain)
        accepted = self._central.assess(dispatch, *read)
        contents = self._contents(accepted)
        if not overrides(self.strategy, "aggregate_evaluate", MESSAGE_API):
            average = self.strategy.evaluate_metrics_aggr_fn
            return (
                average(contents, self.strategy.weighted_by_key) if accepted else None
            )
        kind = MessageType.EVALUATE
        merged = [Message(c, message_type=kind, dst_node_id=0) for c in contents]
        with without_fedavgs_log():
            return self.strategy.aggregate_evaluate(server_round, merged)

    # --- one phase ----------------------------------------------------------------

    def _configure(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        *,
        is_train: bool,
    ) -> list[Message]:
        told = message_config(
            self.strategy, arrays, config, server_round=server_round, is_train=is_train
        )
        if told is None:
            return []
        phase = Phase(
            round_number=server_round,
            is_train=is_train,
            sample_size=partial(sample_size, self.strategy, is_train=is_train),
            config={**told, "server-round": server_round},
        )
        members = self._present(grid, phase)
        dispatch = self._central.begin(
            phase,
            from_array_record(arrays),
            {key: member.profile for key, member in members.items()},
        )
        dispatch.contacts = members
        return messages.written(dispatch, arrays, phase.config)

    def _present(self, grid: Grid, phase: Phase) -> dict[str, Member]:
        """Wait for enough nodes, as FedAvg does, and learn who they are."""
        least = self.strategy.min_available_nodes
        while len(nodes := list(grid.get_node_ids())) < least:
            _log.log(
                INFO,
                "Waiting for nodes to connect: %d connected (minimum required: %d).",
                len(nodes),
                least,
            )
            time.sleep(1)
        members, failures = self._fleet.members(grid, nodes, ask_again=phase.is_train)
        rounds = self._central.rounds
        rounds.write_failures(failures, phase.round_number, phase="profile")
        if failures and not members:
            raise SmartSplitError(
                f"none of {len(nodes)} nodes says who it is; the first: "
                f"{failures[0].cause}"
            )
        return members

    def _contents(self, accepted: Mapping[str, ClientReply]) -> list[RecordDict]:
        """List the clients' metrics as their replies would, in client_key order."""
        key = self.strategy.weighted_by_key
        return [
            RecordDict({"metrics": MetricRecord(metrics_of(reply.report, key))})
            for reply in accepted.values()
        ]
