"""LegacySmartSplit: the central manager as a strategy of Flower's legacy API."""

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    MetricsAggregationFn,
    NDArrays,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg, Strategy
from flwr.serverapp.strategy import FedAvg as ServerOptimizerStrategy

from flwr_smartsplit.edge.protocol import Edge
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.flower.journal.journal import DEFAULT_JOURNAL, OnRow
from flwr_smartsplit.flower.legacy_registry import LegacyFleet, reason_of
from flwr_smartsplit.flower.observations import ClientSeconds
from flwr_smartsplit.flower.round_exchange import Answer, Dispatch, names_after
from flwr_smartsplit.flower.round_manager import (
    CentralManager,
    Phase,
    refuse_wrappers,
)
from flwr_smartsplit.flower.serde.records import plan_to_scalars
from flwr_smartsplit.flower.serde.replies import NamesOf, reply_from_scalars
from flwr_smartsplit.flower.settings import Settings
from flwr_smartsplit.plan.routes import ChooseRoute
from flwr_smartsplit.plan.selection.selection import Select
from flwr_smartsplit.plan.selection.utility import BY_UTILITY
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ClientReply, Failure, RoundPlan

EvaluateFn = Callable[
    [int, NDArrays, dict[str, Scalar]], tuple[float, dict[str, Scalar]] | None
]
ConfigFn = Callable[[int], dict[str, Scalar]]
_Failures = Sequence[tuple[ClientProxy, Any] | BaseException]


class LegacySmartSplit(Strategy):
    """``SmartSplit`` for servers that speak Flower's legacy API.

    The parameters are those of ``flwr.server.strategy.FedAvg`` and of ``SmartSplit``;
    from the same replies both strategies make the same state, bit for bit.

    Parameters
    ----------
    task : Task
        Model, loss and optimizer, the same as the clients'.
    edges : Sequence[Edge]
        Edges that host tails, such as ``(RayEdge(),)``.
    seed : int
        Root of sampling and of every random stream of the clients.
    num_threads : int
        Torch threads at every place.
    select : Callable[[SelectionRequest], Selection]
        Chooses the clients that train, and their routes.
    choose_route : Callable[[RouteRequest], Route], optional
        Chooses each client's route beforehand.
    min_device_units : int
        How many units a cut leaves on the device at least, wherever it moves.
    recompute : bool
        Whether a device may recompute activations.
    refine : bool
        Whether edges may move cuts and release slow, unimportant clients in a round.
    client_seconds : Callable[[ClientPlan, StepReport], float], optional
        How long a client's part took, for the selections to come; with it, the speed
        of devices that do not tell it is learned from their steps.
    server_optimizer : FedAdam, FedYogi, FedAdagrad or FedAvgM, optional
        The Message-API strategy whose server step follows the merge.
    journal : str or Path, optional
        File for one JSON line per client and round; ``{number}`` in its name becomes
        the first number that is free. None writes no file.
    on_row : Sequence[Callable[[Mapping], None]]
        Told each of these lines as a mapping, such as ``TensorBoardRows(folder)``.
    clock : Callable[[], float]
        Seconds that only move forward.
    fraction_fit, fraction_evaluate : float
        As for ``flwr.server.strategy.FedAvg``, like all that follow but the last.
    min_fit_clients, min_evaluate_clients, min_available_clients : int
        The least numbers of clients.
    evaluate_fn : Callable[[int, NDArrays, dict], tuple[float, dict] or None], optional
        Evaluates on the server; arrays are in the order of the model's
        ``state_dict``.
    on_fit_config_fn, on_evaluate_config_fn : Callable[[int], dict], optional
        Make the config of a round.
    accept_failures : bool
        Whether a round counts in which somebody failed.
    initial_parameters : Parameters, optional
        In the order of the model's ``state_dict``; else Flower asks a client.
    fit_metrics_aggregation_fn, evaluate_metrics_aggregation_fn : Callable, optional
        Average the clients' metrics.
    profile_timeout_seconds : float
        How long to wait for clients that are asked who they are.

    Notes
    -----
    Flower's legacy server does not tell a strategy when a run is over, so the edges
    end with the strategy, or with ``close()``.
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
        server_optimizer: ServerOptimizerStrategy | None = None,
        journal: str | Path | None = DEFAULT_JOURNAL,
        on_row: Sequence[OnRow] = (),
        clock: Callable[[], float] = time.perf_counter,
        fraction_fit: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_fit_clients: int = 2,
        min_evaluate_clients: int = 2,
        min_available_clients: int = 2,
        evaluate_fn: EvaluateFn | None = None,
        on_fit_config_fn: ConfigFn | None = None,
        on_evaluate_config_fn: ConfigFn | None = None,
        accept_failures: bool = True,
        initial_parameters: Parameters | None = None,
        fit_metrics_aggregation_fn: MetricsAggregationFn | None = None,
        evaluate_metrics_aggregation_fn: MetricsAggregationFn | None = None,
        profile_timeout_seconds: float = 120.0,
    ) -> None:
        super().__init__()
        # FedAvg checks and keeps its own arguments.
        self.fedavg = FedAvg(
            fraction_fit=fraction_fit,
            fraction_evaluate=fraction_evaluate,
            min_fit_clients=min_fit_clients,
            min_evaluate_clients=min_evaluate_clients,
            min_available_clients=min_available_clients,
            evaluate_fn=evaluate_fn,
            on_fit_config_fn=on_fit_config_fn,
            on_evaluate_config_fn=on_evaluate_config_fn,
            accept_failures=accept_failures,
            initial_parameters=initial_parameters,
            fit_metrics_aggregation_fn=fit_metrics_aggregation_fn,
            evaluate_metrics_aggregation_fn=evaluate_metrics_aggregation_fn,
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
        self._names = tuple(self._central.chain.model.state_dict())
        self._fleet = LegacyFleet(timeout_seconds=profile_timeout_seconds)
        self.close = weakref.finalize(self, self._central.edges.stop)

    @property
    def failures(self) -> list[Failure]:
        """Every client's part that was not merged so far, and why."""
        return self._central.rounds.failures

    @property
    def round_plans(self) -> list[RoundPlan]:
        """Every training plan so far."""
        return self._central.round_plans

    def __repr__(self) -> str:
        """Show what FedAvg shows of itself."""
        return f"LegacySmartSplit(accept_failures={self.fedavg.accept_failures})"

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Return the initial parameters; without any, Flower asks a client."""
        self._central.summary()
        return self.fedavg.initialize_parameters(client_manager)

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate on the server, as FedAvg does."""
        return self.fedavg.evaluate(server_round, parameters)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Plan the round and give each chosen client its segments and its plan."""
        refuse_wrappers(self, (Strategy,))
        average = self.fedavg
        make_config = average.on_fit_config_fn
        phase = Phase(
            round_number=server_round,
            is_train=True,
            fraction=average.fraction_fit,
            least=average.min_fit_clients,
            config=_config(make_config, server_round),
        )
        return self._configure(phase, parameters, client_manager, FitIns)

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Give each chosen client what it needs to evaluate along its route."""
        average = self.fedavg
        if average.fraction_evaluate == 0.0:
            return []
        phase = Phase(
            round_number=server_round,
            is_train=False,
            fraction=average.fraction_evaluate,
            least=average.min_evaluate_clients,
            config=_config(average.on_evaluate_config_fn, server_round),
        )
        return self._configure(phase, parameters, client_manager, EvaluateIns)

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Settle the round: refuse, commit, drop, merge."""
        dispatch = self._central.take()
        if dispatch is None:
            return None, {}
        replies, failed = self._collect(dispatch, results, failures)
        settled = self._central.settle(dispatch, replies, failed)
        if settled.state is None:
            return None, {}
        average = self.fedavg.fit_metrics_aggregation_fn
        metrics = self._averaged(settled.accepted, results, average)
        arrays = [settled.state[name] for name in self._names]
        return ndarrays_to_parameters(arrays), metrics

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Average what the clients measured along their routes."""
        dispatch = self._central.take()
        if dispatch is None:
            return None, {}
        replies, failed = self._collect(dispatch, results, failures)
        accepted = self._central.assess(dispatch, replies, failed)
        if not accepted:
            return None, {}
        reports = [reply.report for reply in accepted.values()]
        total = sum(report.num_examples for report in reports)
        loss = sum(report.loss * report.num_examples for report in reports) / total
        average = self.fedavg.evaluate_metrics_aggregation_fn
        return loss, self._averaged(accepted, results, average)

    # --- one phase ----------------------------------------------------------------

    def _configure(
        self,
        phase: Phase,
        parameters: Parameters,
        client_manager: ClientManager,
        instruction: Callable[[Parameters, dict[str, Scalar]], Any],
    ) -> list[tuple[ClientProxy, Any]]:
        least = self.fedavg.min_available_clients
        clients, failures = self._fleet.clients(client_manager, least)
        rounds = self._central.rounds
        rounds.write_failures(failures, phase.round_number, phase="profile")
        state = self._state(parameters)
        profiles = {key: client.profile for key, client in clients.items()}
        dispatch = self._central.begin(phase, state, profiles)
        written = self._written(dispatch, parameters, phase)
        return [
            (clients[key].proxy, instruction(share, config))
            for key, (share, config) in written.items()
        ]

    def _written(
        self, dispatch: Dispatch, parameters: Parameters, phase: Phase
    ) -> dict[str, tuple[Parameters, dict[str, Scalar]]]:
        """Write to every chosen client: the state of its own segments, and its plan.

        What came as bytes goes on as bytes: no client's share is serialised anew.
        """
        tensors = dict(zip(self._names, parameters.tensors, strict=True))
        written = {}
        for key, sent in dispatch.sent.items():
            own = [tensors[name] for name in sent.names]
            share = Parameters(own, parameters.tensor_type)
            config = {**phase.config, **plan_to_scalars(sent.plan)}
            dispatch.sent_bytes[key] = _size(share, config)
            written[key] = (share, config)
        return written

    def _state(self, parameters: Parameters) -> dict[str, npt.NDArray[Any]]:
        """Name the parameters as the model does."""
        arrays = parameters_to_ndarrays(parameters)
        shapes = {n: a.shape for n, a in zip(self._names, arrays, strict=False)}
        if len(arrays) != len(self._names):
            raise InvalidTask(
                f"{len(arrays)} arrays came as parameters, the model's state_dict has "
                f"{len(self._names)}: give [v.numpy() for v in "
                "model.state_dict().values()]."
            )
        self._central.chain.check_state(shapes)
        return dict(zip(self._names, arrays, strict=True))

    def _collect(
        self,
        dispatch: Dispatch,
        results: Iterable[tuple[ClientProxy, FitRes | EvaluateRes]],
        failures: _Failures,
    ) -> tuple[list[ClientReply], list[Failure]]:
        """Read what came; of errors, Flower does not say whose they are."""
        answers = [self._answer(dispatch, proxy, result) for proxy, result in results]
        unnamed = [reason_of(f) for f in failures if isinstance(f, BaseException)]
        replies, failed = dispatch.collect(answers, unnamed=unnamed)
        if failed and not self.fedavg.accept_failures:
            return [], [*failed, *map(_given_up, replies)]
        return replies, failed

    def _answer(
        self, dispatch: Dispatch, proxy: ClientProxy, result: FitRes | EvaluateRes
    ) -> Answer:
        key = self._fleet.key_of(proxy)
        sent = dispatch.sent.get(key)
        names = partial(names_after, sent, self._central.chain)
        parameters = getattr(result, "parameters", Parameters([], ""))
        return Answer(
            key,
            read=partial(_read, result, parameters, names),
            num_bytes=_size(parameters, result.metrics),
        )

    def _averaged(
        self,
        accepted: Mapping[str, ClientReply],
        results: Sequence[tuple[ClientProxy, FitRes | EvaluateRes]],
        average: MetricsAggregationFn | None,
    ) -> dict[str, Scalar]:
        """Let the user's function average the metrics, in client_key order."""
        if average is None:
            return {}
        found = {self._fleet.key_of(proxy): result.metrics for proxy, result in results}
        return average([(r.report.num_examples, found[k]) for k, r in accepted.items()])


def _read(
    result: FitRes | EvaluateRes, parameters: Parameters, names: NamesOf
) -> ClientReply:
    return reply_from_scalars(result.metrics, parameters_to_ndarrays(parameters), names)


def _config(make: ConfigFn | None, server_round: int) -> dict[str, Scalar]:
    return {**(make(server_round) if make else {}), "server-round": server_round}


def _size(parameters: Parameters, scalars: Mapping[str, Any]) -> int:
    """Count the payload of a message: array bytes and the text we add."""
    texts = [value for value in scalars.values() if isinstance(value, str | bytes)]
    return sum(map(len, parameters.tensors)) + sum(map(len, texts))


def _given_up(reply: ClientReply) -> Failure:
    return Failure(
        client_key=reply.client_key,
        kind="refused",
        cause="another client failed, and accept_failures is False.",
        report=reply.report,
    )
