"""SmartSplit: the central manager as a Flower Message-API strategy."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING, getLogger
from pathlib import Path

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from flwr_smartsplit.edge.protocol import Edge
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.flower import messages
from flwr_smartsplit.flower.journal.journal import DEFAULT_JOURNAL, OnRow
from flwr_smartsplit.flower.observations import ClientSeconds
from flwr_smartsplit.flower.registry import Fleet, Member
from flwr_smartsplit.flower.round_manager import (
    CentralManager,
    Phase,
    refuse_wrappers,
)
from flwr_smartsplit.flower.serde.records import (
    from_array_record,
    message_dialect,
    to_array_record,
)
from flwr_smartsplit.flower.serde.replies import (
    metrics_of,
)
from flwr_smartsplit.flower.settings import Settings
from flwr_smartsplit.plan.routes import ChooseRoute
from flwr_smartsplit.plan.selection.selection import Select
from flwr_smartsplit.plan.selection.utility import BY_UTILITY
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ClientReply, Failure, RoundPlan

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
    select : Callable[[SelectionRequest], Selection]
        Chooses the clients that train, each with one of the routes and plans that its
        memory allows: ``SelectByUtility()`` (default), ``select_at_random``, or a
        function of one's own.
    choose_route : Callable[[RouteRequest], Route], optional
        Chooses each client's route beforehand: ``deepest_split``, ``deepest_u_shape``
        if labels must stay on the devices, or a function of one's own.
    min_device_units : int
        How many units a cut leaves on the device at least, wherever it moves: shallow
        boundaries leak.
    recompute : bool
        Whether a device may recompute activations.
    refine : bool
        Whether edges may move cuts and release slow, unimportant clients in a round.
    client_seconds : Callable[[ClientPlan, StepReport], float], optional
        How long a client's part took, for the selections to come, such as
        ``measured_seconds``; by default as long as was predicted from its traits.
        With it, the speed of devices that do not tell it is learned from their steps.
    server_optimizer : FedAdam, FedYogi, FedAdagrad or FedAvgM, optional
        Flower's strategy whose server step follows the merge.
    journal : str or Path, optional
        File for one JSON line per client and round; ``{number}`` in its name becomes
        the first number that is free. None writes no file.
    on_row : Sequence[Callable[[Mapping], None]]
        Told each of these lines as a mapping, such as ``TensorBoardRows(folder)``.
    clock : Callable[[], float]
        Seconds that only move forward.
    profile_timeout_seconds : float
        How long to wait for clients that are asked who they are.
    weighted_by_key : str
        What the weight is called in metrics; it is the number of examples.

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
        select: Select = BY_UTILITY,
        choose_route: ChooseRoute | None = None,
        min_device_units: int = 1,
        recompute: bool = True,
        refine: bool = True,
        client_seconds: ClientSeconds | None = None,
        server_optimizer: FedAvg | None = None,
        journal: str | Path | None = DEFAULT_JOURNAL,
        on_row: Sequence[OnRow] = (),
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
        self._central = CentralManager(
            task,
            edges,
            Settings(
                seed=seed,
                num_threads=num_threads,
                select=select,
                choose_route=choose_route,
                min_device_units=min_device_units,
                recompute=recompute,
                refine=refine,
                client_seconds=client_seconds,
                server_optimizer=server_optimizer,
                journal=journal,
                on_row=on_row,
                clock=clock,
            ),
        )
        self._fleet = Fleet(
            message_dialect(arrayrecord_key, configrecord_key),
            timeout_seconds=profile_timeout_seconds,
        )
        self._members: dict[str, Member] = {}

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
        if not result.arrays and self.fedavg.fraction_train > 0:
            _log.log(WARNING, "Nobody trained: the result is the initial model.")
            result.arrays = initial_arrays
        return result

    def close(self) -> None:
        """End the edges; ``start`` does so by itself."""
        self._central.edges.stop()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Plan the round and send each chosen client its segments and its plan."""
        refuse_wrappers(self, (Strategy,))
        average = self.fedavg
        if average.fraction_train == 0.0:
            return []
        phase = Phase(
            round_number=server_round,
            is_train=True,
            fraction=average.fraction_train,
            least=average.min_train_nodes,
            config=config,
        )
        return self._configure(phase, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each chosen client what it needs to evaluate along its route."""
        average = self.fedavg
        if average.fraction_evaluate == 0.0:
            return []
        phase = Phase(
            round_number=server_round,
            is_train=False,
            fraction=average.fraction_evaluate,
            least=average.min_evaluate_nodes,
            config=config,
        )
        return self._configure(phase, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Settle the round: refuse, commit, drop, merge."""
        dispatch = self._central.take()
        if dispatch is None:
            return None, None
        read = messages.read(dispatch, self._members, replies, self._central.chain)
        settled = self._central.settle(dispatch, *read)
        if settled.state is None:
            return None, None
        return to_array_record(settled.state), self._average(
            settled.accepted, self.fedavg.train_metrics_aggr_fn
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average what the clients measured along their routes."""
        dispatch = self._central.take()
        if dispatch is None:
            return None
        read = messages.read(dispatch, self._members, replies, self._central.chain)
        accepted = self._central.assess(dispatch, *read)
        if not accepted:
            return None
        return self._average(accepted, self.fedavg.evaluate_metrics_aggr_fn)

    # --- one phase ----------------------------------------------------------------

    def _configure(
        self, phase: Phase, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        self._members = self._present(grid, phase)
        config["server-round"] = phase.round_number
        dispatch = self._central.begin(
            phase,
            from_array_record(arrays),
            {key: member.profile for key, member in self._members.items()},
        )
        return messages.written(dispatch, self._members, arrays, config)

    def _present(self, grid: Grid, phase: Phase) -> dict[str, Member]:
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
        members, failures = self._fleet.members(grid, nodes, ask_again=phase.is_train)
        rounds = self._central.rounds
        rounds.write_failures(failures, phase.round_number, phase="profile")
        if failures and not members:
            raise SmartSplitError(
                f"none of {len(nodes)} nodes says who it is; the first: "
                f"{failures[0].cause}"
            )
        return members

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
