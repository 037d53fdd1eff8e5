"""LegacySmartSplit: the central manager as a strategy of Flower's legacy API."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg, Strategy

from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.flower.inner_strategy import (
    LEGACY_API,
    check_proximal,
    check_strategy,
    has_server_step,
    legacy_config,
    legacy_sample_size,
    without_fedavgs_log,
)
from flwr_smartsplit.flower.journal.journal import DEFAULT_JOURNAL, OnRow
from flwr_smartsplit.flower.planning import Planning
from flwr_smartsplit.flower.registry import LegacyFleet, reason_of
from flwr_smartsplit.flower.round_exchange import Answer, Dispatch, names_after
from flwr_smartsplit.flower.round_manager import (
    BetweenRounds,
    CentralManager,
    Phase,
    Settings,
    refuse_wrappers,
)
from flwr_smartsplit.flower.serde.records import plan_to_scalars
from flwr_smartsplit.flower.serde.replies import NamesOf, reply_from_scalars
from flwr_smartsplit.flower.server_optimizer import legacy_step
from flwr_smartsplit.server.aggregation import Mixing, Replace, ServerStep
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ClientReply, Failure, RoundPlan

_Failures = Sequence[tuple[ClientProxy, Any] | BaseException]


class LegacySmartSplit(Strategy):
    """``SmartSplit`` for servers that speak Flower's legacy API.

    From the same replies both make the same state, bit for bit. Parameters and arrays
    are in the order of the model's ``state_dict``. All arguments but one are those of
    ``SmartSplit``.

    Parameters
    ----------
    strategy : flwr.server.strategy.FedAvg, optional
        Flower's legacy strategy, which keeps its sampling numbers, config and metric
        functions, ``evaluate_fn``, ``initial_parameters`` and server step.

    Notes
    -----
    Flower's legacy server does not tell a strategy when a run is over, so the edges
    end with the strategy, or with ``close()``.
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
        super().__init__()
        self.strategy = FedAvg() if strategy is None else strategy
        check_strategy(self.strategy, LEGACY_API)
        check_proximal(self.strategy, task)
        has_step = has_server_step(self.strategy, LEGACY_API)
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
            take_step=partial(legacy_step, self.strategy) if has_step else None,
        )
        self._names = tuple(self._central.chain.model.state_dict())
        self._fleet = LegacyFleet(timeout_seconds=planning.profile_timeout_seconds)
        self.close = weakref.finalize(self, self._central.close)

    @property
    def failures(self) -> list[Failure]:
        """Every client's part that was not merged so far, and why."""
        return self._central.rounds.failures

    @property
    def round_plans(self) -> list[RoundPlan]:
        """Every training plan so far."""
        return self._central.round_plans

    def __repr__(self) -> str:
        """Show the strategy inside."""
        return f"LegacySmartSplit(strategy={self.strategy!r})"

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Return the initial parameters; without any, Flower asks a client."""
        self._central.summary()
        return self.strategy.initialize_parameters(client_manager)

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate on the server, as the strategy inside does."""
        return self.strategy.evaluate(server_round, parameters)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Plan the round and give each chosen client its segments and its plan."""
        refuse_wrappers(self, (Strategy,))
        told = self._configure(server_round, parameters, client_manager, is_train=True)
        return [(proxy, FitIns(*share)) for proxy, share in told]

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Give each chosen client what it needs to evaluate along its route."""
        told = self._configure(server_round, parameters, client_manager, is_train=False)
        return [(proxy, EvaluateIns(*share)) for proxy, share in told]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Settle the round: refuse, commit, drop, merge, mix, step."""
        dispatch = self._central.take(server_round, is_train=True)
        if dispatch is None:
            return None, {}
        replies, failed = self._collect(dispatch, results, failures)
        settled = self._central.settle(dispatch, replies, failed)
        if settled.state is None:
            return None, {}
        arrays = [settled.state[name] for name in self._names]
        metrics = self._metrics(settled.accepted, results)
        average = self.strategy.fit_metrics_aggregation_fn
        told = average(list(metrics.values())) if average and metrics else {}
        return ndarrays_to_parameters(arrays), told

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Let the strategy inside average what the clients measured on their routes."""
        dispatch = self._central.take(server_round, is_train=False)
        if dispatch is None:
            return None, {}
        replies, failed = self._collect(dispatch, results, failures)
        accepted = self._central.assess(dispatch, replies, failed)
        proxies = {self._fleet.key_of(proxy): proxy for proxy, _ in results}
        evaluated = [
            (
                proxies[key],
                EvaluateRes(
                    Status(Code.OK, ""), accepted[key].report.loss, *weight_and_metrics
                ),
            )
            for key, weight_and_metrics in self._metrics(accepted, results).items()
        ]
        with without_fedavgs_log():
            return self.strategy.aggregate_evaluate(server_round, evaluated, [])

    # --- one phase ----------------------------------------------------------------

    def _configure(
        self,
        server_round: int,
        parameters: Parameters,
        client_manager: ClientManager,
        *,
        is_train: bool,
    ) -> list[tuple[ClientProxy, tuple[Parameters, dict[str, Scalar]]]]:
        told = legacy_config(
            self.strategy, parameters, server_round=server_round, is_train=is_train
        )
        if told is None:
            return []
        phase = Phase(
            round_number=server_round,
            is_train=is_train,
            sample_size=partial(legacy_sample_size, self.strategy, is_train=is_train),
            config={**told, "server-round": server_round},
        )
        least = self.strategy.min_available_clients
        clients, failures = self._fleet.clients(client_manager, least)
        self._central.rounds.write_failures(failures, server_round, phase="profile")
        state = self._state(parameters)
        profiles = {key: client.profile for key, client in clients.items()}
        dispatch = self._central.begin(phase, state, profiles)
        written = self._written(dispatch, parameters, phase)
        return [(clients[key].proxy, share) for key, share in written.items()]

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
        if failed and not self.strategy.accept_failures:
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

    def _metrics(
        self,
        accepted: Mapping[str, ClientReply],
        results: Sequence[tuple[ClientProxy, FitRes | EvaluateRes]],
    ) -> dict[str, tuple[int, dict[str, Scalar]]]:
        """List weights and metrics of who counts, in client_key order."""
        found = {self._fleet.key_of(proxy): result.metrics for proxy, result in results}
        return {k: (r.report.num_examples, found[k]) for k, r in accepted.items()}


def _read(
    result: FitRes | EvaluateRes, parameters: Parameters, names: NamesOf
) -> ClientReply:
    return reply_from_scalars(result.metrics, parameters_to_ndarrays(parameters), names)


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
