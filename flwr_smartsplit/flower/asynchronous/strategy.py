"""AsyncSmartSplit: SmartSplit without rounds that wait for the slowest client."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Literal, NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower import messages
from flwr_smartsplit.flower.asynchronous.grid_time import ClockTime, Time
from flwr_smartsplit.flower.asynchronous.loop import AsyncLoop
from flwr_smartsplit.flower.asynchronous.pace import Pace
from flwr_smartsplit.flower.checkpoints.checkpoints import Checkpoints
from flwr_smartsplit.flower.inner_strategy import message_config
from flwr_smartsplit.flower.journal.journal import DEFAULT_JOURNAL, OnRow
from flwr_smartsplit.flower.message_strategy import MessageStrategy, given
from flwr_smartsplit.flower.planning import Planning
from flwr_smartsplit.flower.registry import ClientKeys
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from flwr_smartsplit.flower.strategy import EvaluateFn
from flwr_smartsplit.plan.codec_choice import CodecChoice
from flwr_smartsplit.server.aggregation import BetweenRounds, Mixing, ServerStep
from flwr_smartsplit.server.mixing.staleness import DynamicStaleness
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ClientReply

BY_STALENESS = DynamicStaleness()
_log = getLogger("flwr")


class AsyncSmartSplit(MessageStrategy):
    """Merge clients' replies as they come, whatever part of the model each trained.

    ``clients_at_once`` clients train at any time. A reply is merged when
    ``merge_every`` of them are there, with a weight that ``mixing`` gives by their
    staleness, and idle clients then begin with the new state. Clients, edges, routes
    and plans are ``SmartSplit``'s. With all clients at once, ``merge_every`` of all and
    ``Replace()``, a run is ``SmartSplit``'s, bit for bit.

    A *round* is as much work as a synchronous one: ``clients_at_once`` replies. So
    ``num_rounds``, ``evaluate_fn``, ``server-round`` in configs and ``Result`` have
    Flower's meaning; server steps, ``between_rounds`` and rules of variants count
    merges.

    Parameters
    ----------
    task : Task
        Model, loss and optimizer, the same as the clients'.
    edges : Sequence[Edge]
        Such as ``(RayEdge(),)``; each holds up to ``clients_at_once + 1`` states.
    clients_at_once : int
        How many clients train, or have replied and wait for the merge.
    merge_every : int
        Replies of one merge: 1 as in FedAsync and FedASMU, more for a buffer.
    mixing : Mixing
        How much the replies' mean counts: ``DynamicStaleness()`` (FedASMU),
        ``PolynomialStaleness()`` (FedAsync), ``Replace()`` (rounds).
    max_staleness : int, optional
        A reply that began more merges ago is left out; None keeps all.
    max_share : float, optional
        No client gives more than this share of the last ``10 * clients_at_once``
        replies: it is not asked until others have caught up.
    poll_seconds : float
        How often a grid is asked for replies that has no time of its own.
    strategy : FedAvg, optional
        The inner strategy, as ``SmartSplit`` has it, without its sampling: by default
        ``FedAvg(fraction_evaluate=0.0)``.
    checkpoints : Checkpoints, optional
        Not taken yet: what is in flight is not saved.
    planning : Planning
        How clients and routes are chosen, among those that are idle.
    codec : Codec, tuple[Codec, ...] or Callable[[CodecRequest], ...], optional
        How tensors cross the cuts, as in ``SmartSplit``.
    server_steps : Sequence[ServerStep]
        What the server adds after each merge.
    seed : int
        Seed of the sampling and of the clients' random streams.
    journal : str or Path, optional
        File for JSON lines, as in ``SmartSplit``, with versions and staleness.
    on_row : Sequence[Callable[[Mapping], None]]
        Called with each of these lines.
    between_rounds : Callable[[int, state, RoundSummary], state or None], optional
        Called after each merge, with its number; a state that it returns is the next.
    verify : "once", "always" or False
        When chain and stock module are compared, as in ``SmartSplit``.
    client_keys : "bound", "node-name" or "claimed"
        Who may call itself by a client_key, as in ``SmartSplit``.

    Raises
    ------
    ValueError
        If a number is out of range, or something is asked for that rounds need:
        evaluation by clients, sampling by fraction, an advisor, checkpoints.

    References
    ----------
    .. [1] Liu et al., "FedASMU", AAAI 2024, arXiv:2312.05770.
    .. [2] Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", arXiv:1903.03934.
    .. [3] Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation",
       AISTATS 2022, arXiv:2106.06639.
    """

    # longer than 40 lines because each argument is named twice
    def __init__(  # noqa: PLR0913 - what can be chosen, one by one
        self,
        task: Task,
        edges: Sequence[Edge] = (),
        *,
        clients_at_once: int,
        merge_every: int = 1,
        mixing: Mixing = BY_STALENESS,
        max_staleness: int | None = None,
        max_share: float | None = None,
        poll_seconds: float = 0.1,
        strategy: FedAvg | None = None,
        planning: Planning = Planning(),
        codec: CodecChoice = None,
        server_steps: Sequence[ServerStep] = (),
        seed: int = 0,
        journal: str | Path | None = DEFAULT_JOURNAL,
        on_row: Sequence[OnRow] = (),
        between_rounds: BetweenRounds | None = None,
        verify: Literal["once", "always", False] = "once",
        checkpoints: Checkpoints | None = None,
        client_keys: ClientKeys = "bound",
    ) -> None:
        self._pace = Pace(
            clients_at_once=clients_at_once,
            merge_every=merge_every,
            max_staleness=max_staleness,
            max_share=max_share,
            poll_seconds=poll_seconds,
        )
        inner = FedAvg(fraction_evaluate=0.0) if strategy is None else strategy
        _refuse_rounds(inner, planning, checkpoints)
        self._num_states = self._pace.clients_at_once + 1
        super().__init__(
            task,
            edges,
            strategy=inner,
            planning=planning,
            codec=codec,
            mixing=mixing,
            server_steps=server_steps,
            seed=seed,
            journal=journal,
            on_row=on_row,
            between_rounds=between_rounds,
            verify=verify,
            client_keys=client_keys,
        )

    def _set_up(self, profile_timeout_seconds: float) -> None:
        super()._set_up(profile_timeout_seconds)
        self._central.rounds.round_of = self._pace.round_of

    def summary(self) -> None:
        """Log the strategy's settings in Flower's format."""
        super().summary()
        _log.log(INFO, "\t└──> %s", self._pace)

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
        """Run for as many replies as so many synchronous rounds would have.

        ``timeout`` is in seconds, and for one client's answer: then its place is free.
        A grid with ``seconds()`` and ``wait(most_seconds)`` of its own is the clock.

        Raises
        ------
        InvalidTask
            If the initial arrays are not the state of the task's model.
        SmartSplitError
            At the end, if no merge changed anything; its ``result`` has what there is.
        """
        _log.log(INFO, "Starting %s strategy:", type(self).__name__)
        self.summary()
        configs = {"train_config": train_config, "evaluate_config": evaluate_config}
        loop = self._loop(grid, initial_arrays, num_rounds, timeout, **configs)
        result = Result()
        self._warn_of_steps()
        config = ConfigRecord() if train_config is None else train_config
        try:
            _evaluate(evaluate_fn, 0, loop.arrays, result)
            for number in range(1, num_rounds + 1):
                _log.log(INFO, "[ROUND %s/%s]", number, num_rounds)
                self._train(loop, number, config, result)
                _evaluate(evaluate_fn, number, loop.arrays, result)
        finally:
            self.close()
        if not result.arrays and num_rounds > 0:
            raise SmartSplitError(self._central.why_nothing_merged(), result=result)
        return result

    def _train(
        self, loop: AsyncLoop, number: int, config: ConfigRecord, result: Result
    ) -> None:
        """Go on until the work of a round is merged; note what came of it."""
        base = message_config(
            self.strategy, loop.arrays, config, server_round=number, is_train=True
        )
        assert base is not None  # It trains in every round: see _refuse_rounds.
        loop.config = {**base, "server-round": number}
        accepted: dict[str, ClientReply] = {}
        while loop.version < self._pace.merges_by(number):
            settled = loop.next_merge()
            if settled.state is not None:
                result.arrays = loop.arrays
            for key, reply in settled.accepted.items():
                accepted[f"{loop.version}/{key}"] = replace(reply, state={})
        if accepted:
            average = self.strategy.train_metrics_aggr_fn
            key = self.strategy.weighted_by_key
            metrics = messages.averaged(average, accepted, key)
            result.train_metrics_clientapp[number] = metrics

    def _loop(
        self,
        grid: Grid,
        arrays: ArrayRecord,
        num_rounds: int,
        timeout: float,
        **configs: ConfigRecord | None,
    ) -> AsyncLoop:
        """Check the initial arrays, and make what asks and merges."""
        self._central.chain.check_state(
            {n: (tuple(a.shape), a.dtype) for n, a in arrays.items()}
        )
        first = self._take_up(
            num_rounds,
            partial(from_array_record, arrays),
            **{name: given(config) for name, config in configs.items()},
        )
        return AsyncLoop(
            strategy=self,
            grid=grid,
            time=grid if isinstance(grid, Time) else self._clock_time(),
            pace=self._pace,
            timeout=timeout,
            arrays=arrays if first is None else to_array_record(first),
        )

    def _clock_time(self) -> ClockTime:
        clock = self._given[2].planning.clock
        return ClockTime(clock=clock, poll_seconds=self._pace.poll_seconds)

    def _warn_of_steps(self) -> None:
        steps, pace = self._central.server_steps, self._pace
        if steps and pace.merge_every < pace.clients_at_once:
            _log.log(
                WARNING,
                "%s server steps are taken at each merge, of %s replies: a smaller "
                "rate than that of rounds of %s may be needed.",
                len(steps),
                pace.merge_every,
                pace.clients_at_once,
            )

    # --- Flower's rounds, which this has not --------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Raise: a round is not asked for as a whole."""
        _refuse_to_be_driven()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Raise: clients do not evaluate."""
        _refuse_to_be_driven()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Raise: a round is not settled as a whole."""
        _refuse_to_be_driven()

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Raise: clients do not evaluate."""
        _refuse_to_be_driven()


def _refuse_rounds(
    strategy: FedAvg, planning: Planning, checkpoints: Checkpoints | None
) -> None:
    """Raise ValueError for what an asynchronous run cannot keep."""
    if getattr(strategy, "fraction_evaluate", 0.0) != 0.0:
        raise ValueError(
            f"the inner strategy has fraction_evaluate={strategy.fraction_evaluate}, "
            "and clients that train cannot evaluate beside it: give "
            "fraction_evaluate=0.0, and an evaluate_fn to start()."
        )
    if getattr(strategy, "fraction_train", 1.0) != 1.0:
        raise ValueError(
            f"the inner strategy has fraction_train={strategy.fraction_train}, and "
            "clients_at_once says how many train: leave the fraction at 1.0."
        )
    if planning.advisor is not None:
        raise ValueError(
            "planning has an advisor, which compares the clients of one round, and "
            "here each begins alone: leave it out, or use SmartSplit."
        )
    if hasattr(planning.variants, "base") or hasattr(planning.variants, "steps"):
        raise ValueError(
            f"planning has variants={planning.variants!r:.60}, which change what is "
            "trained from round to round, and clients that began before would send "
            "what was: use SmartSplit."
        )
    if checkpoints is not None:
        raise ValueError(
            "checkpoints do not hold what is in flight, so a resumed run would not be "
            "the same: leave them out, or use SmartSplit."
        )


def _refuse_to_be_driven() -> NoReturn:
    raise SmartSplitError(
        "AsyncSmartSplit runs by its own start(), since it has no rounds that another "
        "loop or a wrapping strategy could drive: call start, unwrapped."
    )


def _evaluate(
    evaluate_fn: EvaluateFn | None, number: int, arrays: ArrayRecord, result: Result
) -> None:
    metrics = None if evaluate_fn is None else evaluate_fn(number, arrays)
    if metrics is not None:
        _log.log(INFO, "\t└──> MetricRecord: %s", metrics)
        result.evaluate_metrics_serverapp[number] = metrics
