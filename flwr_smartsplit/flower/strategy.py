"""SmartSplit: the central manager as a Flower Message-API strategy."""

from collections.abc import Callable, Iterable
from functools import partial

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower import messages
from flwr_smartsplit.flower.inner_strategy import (
    MESSAGE_API,
    message_config,
    overrides,
    refuse_wrappers,
    sample_size,
    without_fedavgs_log,
)
from flwr_smartsplit.flower.message_strategy import MessageStrategy, given
from flwr_smartsplit.flower.rounds.exchange import Phase
from flwr_smartsplit.flower.serde.records import (
    from_array_record,
    to_array_record,
)

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class SmartSplit(MessageStrategy):
    """Let weak devices train only the front of a model, under a Flower strategy.

    Each round it gives every chosen client one of the routes that its memory budget
    allows; an edge trains the rest. The clients' mean is exact whatever their routes,
    and the inner strategy's server step follows it. If every client trains the whole
    model, this is the inner strategy. It is a reconstruction: of SmartSplit (Tian et
    al., 2024), only the abstract is public.

    Parameters
    ----------
    task : Task
        Model, loss and optimizer, the same as the clients'.
    edges : Sequence[Edge]
        Such as ``(RayEdge(),)``; without any, only whole models are trained.
    strategy : FedAvg, optional
        The inner strategy, ``FedAvg()`` by default. It keeps its sampling numbers,
        record keys, metric functions, round config and server step (``FedAdam`` and
        the like). One that needs single clients' whole models is refused.
    planning : Planning
        How clients and routes are chosen.
    codec : Codec, tuple[Codec, ...] or Callable[[CodecRequest], ...], optional
        How tensors cross the cuts: ``Raw()``, ``Packed()``, ``Float16()``,
        ``BFloat16()``, ``Integer()``, ``TopK()``; several, of which each client gets
        the one that makes its round shortest; or a function of device, link and route
        that returns either, such as ``codec_by_rate({1e6: Packed(), 0: Integer()})``.
        By default ``Packed`` where that saves time, else ``Raw``: both are exact.
    mixing : Mixing
        How much the clients' mean counts against the present state.
    server_steps : Sequence[ServerStep]
        What the server adds after the inner strategy's step, in this order, such as
        ``Momentum()`` and ``ServerData(loader)``.
    seed : int
        Seed of the sampling and of the clients' random streams.
    journal : str or Path, optional
        File for one JSON line per client and round; ``{number}`` in its name becomes
        the first free number. None writes no file.
    on_row : Sequence[Callable[[Mapping], None]]
        Called with each of these lines, such as ``TensorBoardRows(folder)``.
    between_rounds : Callable[[int, state, RoundSummary], state or None], optional
        Called after each training round; a state that it returns replaces the round's.
        If it has a method ``first_state(state)``, as a ``PruneSchedule`` has, that
        makes the state of round 1 of the initial one.
    verify : "once", "always" or False
        Before a task is first trained, train two steps beside the stock module, and
        raise ``NotExact`` at any difference: once per task, version and machine; in
        every run; or never. Clients that can hold the whole model do so, too.
    checkpoints : Checkpoints, optional
        Where the run is saved, and resumed after it was killed, bit for bit.
    client_keys : "bound", "node-name" or "claimed"
        Who may call itself by a client_key, where SuperNodes are registered by name:
        the node, by its public key, that did so first in the run; only the node whose
        name it is; or anybody. Who may not is left out, as a failure.

    References
    ----------
    Tian et al., "Breaking the Memory Wall for Heterogeneous Federated Learning
    via Model Splitting", IEEE TPDS 35(12), 2024, arXiv:2410.11577.
    """

    def _set_up(self, profile_timeout_seconds: float) -> None:
        super()._set_up(profile_timeout_seconds)
        self._arrays = ArrayRecord()
        self._evaluate_fn: EvaluateFn | None = None

    def start(  # noqa: PLR0913, PLR0917 - Flower's signature
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the strategy as ``Strategy.start`` does, and end the edges after it.

        Raises
        ------
        InvalidTask
            If the initial arrays are not the state of the task's model.
        SmartSplitError
            If the newest checkpoint is of a run with other settings, or of a round
            after the last.
        SmartSplitError
            At the end, if no round merged anything; its ``result`` has what there is.
        """
        self._central.chain.check_state(
            {n: (tuple(a.shape), a.dtype) for n, a in initial_arrays.items()}
        )
        num_planned = len(self.round_plans)
        configs = {"train_config": train_config, "evaluate_config": evaluate_config}
        self._evaluate_fn = evaluate_fn
        first = partial(from_array_record, initial_arrays)
        taken_up = self._take_up(
            num_rounds, first, **{k: given(c) for k, c in configs.items()}
        )
        if taken_up is not None:
            initial_arrays = to_array_record(taken_up)
        self._arrays = initial_arrays
        try:
            result = super().start(
                grid,
                initial_arrays,
                num_rounds,
                timeout,
                train_config,
                evaluate_config,
                None if evaluate_fn is None else self._evaluate,
            )
        finally:
            self._record.end()
            self.close()
        has_trained = len(self.round_plans) > num_planned or self._record.done > 0
        if not result.arrays and has_trained:
            raise SmartSplitError(self._central.why_nothing_merged(), result=result)
        return result

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
        self._arrays = arrays
        return self._configure(server_round, arrays, config, grid, is_train=False)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Settle the round: refuse, commit, drop, merge, mix, step."""
        if self._record.has(server_round):
            is_last = server_round == self._record.done and self._central.has_merged
            metrics = self._record.result("train", server_round)
            return self._arrays if is_last else None, metrics
        dispatch = self._central.take(server_round, is_train=True)
        if dispatch is None:
            return None, None
        settled = self._central.settle(dispatch, *self._read(dispatch, replies))
        arrays = None if settled.state is None else to_array_record(settled.state)
        if not settled.accepted:
            return arrays, None
        average, key = (
            self.strategy.train_metrics_aggr_fn,
            self.strategy.weighted_by_key,
        )
        metrics = messages.averaged(average, settled.accepted, key)
        return arrays, self._record.note("train", server_round, metrics)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the inner strategy average what the clients measured on their routes."""
        if self._record.has(server_round):
            found: MetricRecord | None = self._record.result("evaluate", server_round)
            return found
        metrics = self._averaged(server_round, replies)
        self._record.note("evaluate", server_round, metrics)
        if self._evaluate_fn is None:
            self._end_round(server_round)
        return metrics

    def _evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate as the user's function does, or answer what it said then."""
        metrics: MetricRecord | None
        if self._record.has(server_round):
            metrics = self._record.result("server", server_round)
            return metrics
        assert self._evaluate_fn is not None
        metrics = self._evaluate_fn(server_round, arrays)
        self._record.note("server", server_round, metrics)
        if server_round > 0:
            self._end_round(server_round)
        return metrics

    def _end_round(self, server_round: int) -> None:
        self._record.end_round(server_round, partial(from_array_record, self._arrays))

    # --- one phase ----------------------------------------------------------------

    def _averaged(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        dispatch = self._central.take(server_round, is_train=False)
        if dispatch is None:
            return None
        accepted = self._central.assess(dispatch, *self._read(dispatch, replies))
        key = self.strategy.weighted_by_key
        if not overrides(self.strategy, "aggregate_evaluate", MESSAGE_API):
            average = self.strategy.evaluate_metrics_aggr_fn
            return messages.averaged(average, accepted, key) if accepted else None
        contents, kind = messages.contents_of(accepted, key), MessageType.EVALUATE
        merged = [Message(c, message_type=kind, dst_node_id=0) for c in contents]
        with without_fedavgs_log():
            return self.strategy.aggregate_evaluate(server_round, merged)

    def _configure(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        *,
        is_train: bool,
    ) -> list[Message]:
        if self._record.has(server_round):
            return []
        self._record.follow(config, is_train=is_train)
        base = message_config(
            self.strategy, arrays, config, server_round=server_round, is_train=is_train
        )
        if base is None:
            return []
        phase = Phase(
            round_number=server_round,
            is_train=is_train,
            sample_size=partial(sample_size, self.strategy, is_train=is_train),
            config={**base, "server-round": server_round},
        )
        nodes = self._nodes(grid)
        found = self._fleet.members(grid, nodes, ask_again=is_train)
        state = from_array_record(arrays)
        dispatch = self._begin(phase, state, *found, asked=f"{len(nodes)} nodes")
        return messages.written(dispatch, arrays, phase.config)
