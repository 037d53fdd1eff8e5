"""LegacySmartSplit: the central manager as a strategy of Flower's legacy API."""

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, cast

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
from flwr.server import Server
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg, Strategy

from flwr_smartsplit.edge.regions import cut_array
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.flower.base_strategy import SplitStrategy
from flwr_smartsplit.flower.inner_strategy import (
    LEGACY_API,
    legacy_config,
    legacy_sample_size,
    refuse_wrappers,
    without_fedavgs_log,
)
from flwr_smartsplit.flower.registry import LegacyFleet, reason_of
from flwr_smartsplit.flower.rounds.exchange import Answer, Dispatch, Phase, names_after
from flwr_smartsplit.flower.serde.records import (
    legacy_scalars,
    plan_to_scalars,
    text_bytes,
)
from flwr_smartsplit.flower.serde.replies import reply_from_scalars
from flwr_smartsplit.flower.server_optimizer import legacy_step
from flwr_smartsplit.types import ClientReply, Failure

_A_DAY_SECONDS = 86_400
_Failures = Sequence[tuple[ClientProxy, Any] | BaseException]


class LegacySmartSplit(SplitStrategy[FedAvg], Strategy):
    """``SmartSplit`` for Flower's legacy server API.

    The same replies give the same state as in ``SmartSplit``, bit for bit. Parameters
    are in the order of the model's ``state_dict``. All arguments but ``strategy`` are
    those of ``SmartSplit``.

    Parameters
    ----------
    strategy : flwr.server.strategy.FedAvg, optional
        The inner strategy, which keeps its sampling numbers, config and metric
        functions, ``evaluate_fn``, ``initial_parameters`` and server step.

    Notes
    -----
    Flower's legacy server does not tell a strategy when a run is over, so the edges
    end with the strategy, or with ``close()``.
    """

    _api = LEGACY_API
    _take_step = staticmethod(legacy_step)

    def _set_up(self, profile_timeout_seconds: float) -> None:
        self._names = tuple(self._central.chain.model.state_dict())
        self._fleet = LegacyFleet(
            timeout_seconds=profile_timeout_seconds,
            compare=self._start.require_same,
            owners=self._owners,
        )
        self._newest = Parameters([], "")
        self.close = weakref.finalize(self, self._central.close)

    def __repr__(self) -> str:
        """Show the inner strategy."""
        return f"LegacySmartSplit(strategy={self.strategy!r})"

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Return the initial parameters; without any, Flower asks a client."""
        self._central.summary()
        given = self.strategy.initialize_parameters(client_manager)

        def first() -> Mapping[str, Any]:
            if given is None:
                raise SmartSplitError(
                    "between_rounds changes the first state, and Flower would ask a "
                    "client for it: give the inner strategy initial_parameters."
                )
            return self._state(given)

        state = self._take_up(_num_rounds(), first)
        return given if state is None else self._parameters(state)

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate on the server, as the inner strategy does."""
        found: tuple[float, dict[str, Scalar]] | None
        if self._record.has(server_round):
            found = self._record.result("server", server_round)
            return found
        found = self.strategy.evaluate(server_round, parameters)
        self._record.note("server", server_round, found)
        return found

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Plan the round and give each chosen client its segments and its plan."""
        refuse_wrappers(self, (Strategy,))
        if self._record.has(server_round):
            asked = self._asked_before("train", server_round)
            return [(proxy, FitIns(Parameters([], ""), {})) for proxy in asked]
        sent = self._configure(server_round, parameters, client_manager, is_train=True)
        if not sent:
            self._end_if_last(server_round)
        return [(proxy, FitIns(*share)) for proxy, share in sent]

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Give each chosen client what it needs to evaluate along its route."""
        if self._record.has(server_round):
            asked = self._asked_before("evaluate", server_round)
            return [(proxy, EvaluateIns(Parameters([], ""), {})) for proxy in asked]
        self._newest = parameters
        sent = self._configure(server_round, parameters, client_manager, is_train=False)
        if not sent:
            self._end_round(server_round)
        return [(proxy, EvaluateIns(*share)) for proxy, share in sent]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Settle the round: refuse, commit, drop, merge, mix, step."""
        averages: dict[str, Scalar] = {}
        if self._record.has(server_round):
            averages = self._record.result("train", server_round)
            return None, averages
        dispatch = self._central.take(server_round, is_train=True)
        if dispatch is None:
            return None, {}
        replies, failed = self._collect(dispatch, results, failures)
        settled = self._central.settle(dispatch, replies, failed)
        parameters = None
        if settled.state is None:
            self._end_if_last(server_round)
        else:
            parameters = self._parameters(settled.state)
            metrics = self._metrics(settled.accepted, results)
            average = self.strategy.fit_metrics_aggregation_fn
            averages = average(list(metrics.values())) if average and metrics else {}
        return parameters, self._record.note("train", server_round, averages)

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Let the inner strategy average what the clients measured on their routes."""
        averages: tuple[float | None, dict[str, Scalar]]
        if self._record.has(server_round):
            averages = self._record.result("evaluate", server_round)
            return averages
        averages = self._averaged(server_round, results, failures)
        self._record.note("evaluate", server_round, averages)
        self._end_round(server_round)
        return averages

    def _averaged(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
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

    def _end_if_last(self, server_round: int) -> None:
        """Raise if this is the last round and none has merged anything.

        Flower's legacy server tells a strategy neither how many rounds there are, nor
        when the last one is over.
        """
        is_last = _num_rounds() == server_round
        if is_last and self.round_plans and not self._central.has_merged:
            raise SmartSplitError(self._central.why_nothing_merged())

    # --- checkpoints --------------------------------------------------------------

    def _asked_before(self, phase: str, server_round: int) -> list[ClientProxy]:
        """Have Flower's server ask somebody, so that it asks for the old result, too.

        Its workflows, which send messages themselves, skip the old rounds instead.
        """
        was_asked = self._record.result(phase, server_round) is not None
        is_server = any(isinstance(found, Server) for found in _in_callers("self"))
        return [cast(ClientProxy, _Nobody())] if is_server and was_asked else []

    def _end_round(self, server_round: int) -> None:
        self._record.end_round(server_round, lambda: self._state(self._newest))

    # --- one phase ----------------------------------------------------------------

    def _configure(
        self,
        server_round: int,
        parameters: Parameters,
        client_manager: ClientManager,
        *,
        is_train: bool,
    ) -> list[tuple[ClientProxy, tuple[Parameters, dict[str, Scalar]]]]:
        config = legacy_config(
            self.strategy, parameters, server_round=server_round, is_train=is_train
        )
        if config is None:
            return []
        phase = Phase(
            round_number=server_round,
            is_train=is_train,
            sample_size=partial(legacy_sample_size, self.strategy, is_train=is_train),
            config={**config, "server-round": server_round},
        )
        client_manager.wait_for(self.strategy.min_available_clients, _A_DAY_SECONDS)
        state = self._state(parameters)
        dispatch = self._begin(
            phase,
            state,
            *self._fleet.clients(list(client_manager.all().values())),
            asked=f"{client_manager.num_available()} clients",
        )
        # The bytes of Flower's parameters go on as they are, without serialising anew.
        tensors = dict(zip(self._names, parameters.tensors, strict=True))
        tensors |= {name: _tensor(a) for name, a in dispatch.proxies.items()}
        written = []
        for key, sent in dispatch.sent.items():
            own = [tensors[name] for name in sent.sent_names]
            for index, name in enumerate(sent.sent_names):
                if name in sent.regions:
                    own[index] = _tensor(cut_array(state[name], sent.regions[name]))
            share = Parameters(own, parameters.tensor_type)
            scalars = {**legacy_scalars(phase.config), **plan_to_scalars(sent.plan)}
            dispatch.sent_bytes[key] = _size(share, scalars)
            written.append((dispatch.contacts[key].proxy, (share, scalars)))
        return written

    def _parameters(self, state: Mapping[str, npt.NDArray[Any]]) -> Parameters:
        return ndarrays_to_parameters([state[name] for name in self._names])

    def _state(self, parameters: Parameters) -> dict[str, npt.NDArray[Any]]:
        arrays = parameters_to_ndarrays(parameters)
        named = zip(self._names, arrays, strict=False)
        kinds = {n: (a.shape, str(a.dtype)) for n, a in named}
        if len(arrays) != len(self._names):
            raise InvalidTask(
                f"{len(arrays)} arrays came as parameters, the model's state_dict has "
                f"{len(self._names)}: give [v.numpy() for v in "
                "model.state_dict().values()]."
            )
        self._central.chain.under(self.variant).check_state(kinds)
        return dict(zip(self._names, arrays, strict=True))

    def _collect(
        self,
        dispatch: Dispatch,
        results: Iterable[tuple[ClientProxy, FitRes | EvaluateRes]],
        failures: _Failures,
    ) -> tuple[list[ClientReply], list[Failure]]:
        """Read the results; Flower does not say which clients the errors are from."""
        answers = [self._answer(dispatch, proxy, result) for proxy, result in results]
        unnamed = [reason_of(f) for f in failures if isinstance(f, BaseException)]
        replies, failed = dispatch.collect(answers, unnamed=unnamed)
        self._fleet.heard(dispatch, failed)
        if failed and not self.strategy.accept_failures:
            return [], [*failed, *map(_given_up, replies)]
        return replies, failed

    def _answer(
        self, dispatch: Dispatch, proxy: ClientProxy, result: FitRes | EvaluateRes
    ) -> Answer:
        key = self._fleet.key_of(proxy)
        names = partial(names_after, dispatch.sent.get(key), self._central.chain)
        parameters = getattr(result, "parameters", Parameters([], ""))
        return Answer(
            key,
            read=partial(
                reply_from_scalars,
                result.metrics,
                lambda: dict(enumerate(parameters_to_ndarrays(parameters))),
                names,
            ),
            num_bytes=_size(parameters, result.metrics),
        )

    def _metrics(
        self,
        accepted: Mapping[str, ClientReply],
        results: Sequence[tuple[ClientProxy, FitRes | EvaluateRes]],
    ) -> dict[str, tuple[int, dict[str, Scalar]]]:
        """List the accepted clients' weights and metrics, in client_key order."""
        found = {self._fleet.key_of(proxy): result.metrics for proxy, result in results}
        return {k: (r.report.num_examples, found[k]) for k, r in accepted.items()}


class _Nobody:
    """A proxy that answers at once, without content."""

    cid = "checkpoint"

    def fit(self, *_: Any, **__: Any) -> FitRes:
        return FitRes(Status(Code.OK, ""), Parameters([], ""), 0, {})

    def evaluate(self, *_: Any, **__: Any) -> EvaluateRes:
        return EvaluateRes(Status(Code.OK, ""), 0.0, 0, {})


def _num_rounds() -> int | None:
    """Find out how many rounds Flower's server has; it does not tell a strategy."""
    return next(_in_callers("num_rounds"), None)


def _in_callers(name: str) -> Iterator[Any]:
    """Look for a local variable in the functions that called this module."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if name in frame.f_locals:
            yield frame.f_locals[name]
        frame = frame.f_back


def _tensor(array: npt.NDArray[Any]) -> bytes:
    (tensor,) = ndarrays_to_parameters([array]).tensors
    return tensor


def _size(parameters: Parameters, scalars: Mapping[str, Any]) -> int:
    """Count a message's payload in bytes: arrays and text."""
    return sum(map(len, parameters.tensors)) + text_bytes(scalars)


def _given_up(reply: ClientReply) -> Failure:
    return Failure(
        client_key=reply.client_key,
        kind="refused",
        cause="another client failed, and accept_failures is False.",
        report=reply.report,
    )
