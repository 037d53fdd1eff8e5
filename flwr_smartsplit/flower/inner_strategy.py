"""The inner strategy: which are accepted, and the config that it gives clients.

It keeps its metric functions, sampling numbers, keys and server step. It does not
merge: the server never has a split client's whole model.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import LogRecord, getLogger
from types import SimpleNamespace
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common import EvaluateIns, FitIns, Parameters, Scalar
from flwr.server import SimpleClientManager
from flwr.server import strategy as legacy
from flwr.server.client_proxy import ClientProxy
from flwr.server.criterion import Criterion
from flwr.serverapp import Grid
from flwr.serverapp import strategy as message

from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.fedprox import proximal

_log = getLogger("flwr")
_PROXIMAL = (message.FedProx, legacy.FedProx)

_WHY = {
    ("Krum", "MultiKrum", "Bulyan", "FedMedian", "FedTrimmedAvg", "QFedAvg"): (
        "it compares whole models of single clients, and those are nowhere whole when "
        "they are split. Give one that needs no more than their mean"
    ),
    ("DifferentialPrivacy", "DPFedAvg"): (
        "it clips and noises whole models of single clients, and those are nowhere "
        "whole when they are split. Give the strategy that it wraps, without the "
        "guarantee"
    ),
    ("FedXgb",): (
        "it merges trees, not the state of a torch model. Run it without SmartSplit"
    ),
    ("SmartSplit", "LegacySmartSplit"): "it is one already. Give the strategy inside",
}


@dataclass(frozen=True, slots=True)
class Api:
    """What differs between Flower's two APIs."""

    wrapper: str
    base: type[Any]
    module: str
    merge: str
    steps: tuple[type[Any], ...]


MESSAGE_API = Api(
    "SmartSplit",
    message.FedAvg,
    "flwr.serverapp.strategy",
    "aggregate_train",
    (message.FedAdagrad, message.FedAdam, message.FedAvgM, message.FedYogi),
)
LEGACY_API = Api(
    "LegacySmartSplit",
    legacy.FedAvg,
    "flwr.server.strategy",
    "aggregate_fit",
    (legacy.FedAdagrad, legacy.FedAdam, legacy.FedAvgM, legacy.FedYogi),
)


def check_strategy(strategy: object, api: Api) -> None:
    """Raise TypeError if a strategy cannot work without whole client models."""
    why = _why_not(strategy, api)
    if why:
        name = strategy if isinstance(strategy, type) else type(strategy)
        others = ", ".join(kind.__name__ for kind in (api.base, *api.steps))
        raise TypeError(
            f"{api.wrapper} cannot hold strategy={name.__name__}: {why}. Instances of "
            f"{api.module}'s {others} and FedProx can be, and subclasses that leave "
            f"{api.merge} alone."
        )


def check_proximal(strategy: object, task: Task) -> None:
    """Raise ValueError for FedProx if the task does not add its proximal term."""
    mu = getattr(strategy, "proximal_mu", 0.0)
    made = task.optimizer_fn
    of_task = 0.0
    if isinstance(made, partial) and made.func is proximal:
        of_task = made.keywords["mu"]
    if mu != of_task and task.schedule_fn is None and isinstance(strategy, _PROXIMAL):
        raise ValueError(
            f"strategy=FedProx(proximal_mu={mu}) asks clients for a term that the task "
            f"adds with mu={of_task}: give Task(optimizer_fn=partial(proximal, "
            f"optimizer_fn=..., mu={mu})), or a schedule_fn that reads it."
        )


def arguments_of(strategy: object) -> dict[str, Any]:
    """List what a strategy was given of the arguments that Flower's classes take.

    Attributes of the user's own may change in a run, so they are no arguments.
    """
    kinds = [k for k in type(strategy).__mro__ if k.__module__.startswith("flwr.")]
    makers = [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)]
    taken = {name for make in makers for name in inspect.signature(make).parameters}
    taken -= {"evaluate_fn", "initial_parameters"}
    given = {name: value for name, value in vars(strategy).items() if name in taken}
    return {"class": type(strategy), **given}


def has_server_step(strategy: object, api: Api) -> bool:
    """Tell whether a strategy has a server step after the mean."""
    return _definer(type(strategy), api.merge) in api.steps


def overrides(strategy: object, method: str, api: Api) -> bool:
    """Tell whether a strategy overrides a method of FedAvg."""
    return _definer(type(strategy), method) is not api.base


def _why_not(strategy: object, api: Api) -> str:
    kind = type(strategy)
    if isinstance(strategy, type):
        return "it is a class, not an instance"
    for names, why in _WHY.items():
        if any(base.__name__.startswith(names) for base in kind.__mro__):
            return why
    if isinstance(strategy, message.Strategy | legacy.Strategy) and not isinstance(
        strategy, message.Strategy if api is MESSAGE_API else legacy.Strategy
    ):
        other = LEGACY_API if api is MESSAGE_API else MESSAGE_API
        return f"it is of Flower's other API, whose wrapper is {other.wrapper}"
    if not isinstance(strategy, api.base):
        return "it is no FedAvg, so nothing is known of what it does with a mean"
    for method in (api.merge, "start"):
        definer = _definer(kind, method)
        if definer not in (None, api.base, *api.steps, message.Strategy):
            return (
                f"{definer.__name__ if definer else ''} overrides {method}, and no "
                "whole model of a split client reaches the server. Do what it does "
                "after the merge in server_steps or between_rounds"
            )
    return ""


def _definer(kind: type, method: str) -> type | None:
    return next((base for base in kind.__mro__ if method in vars(base)), None)


# --- the config that it gives clients ------------------------------------------------


def message_config(
    strategy: message.FedAvg,
    arrays: ArrayRecord,
    config: ConfigRecord,
    *,
    server_round: int,
    is_train: bool,
) -> ConfigRecord | None:
    """Return the config that a strategy gives a phase; None if it skips the phase.

    Which clients it chooses does not matter: SmartSplit chooses.
    """
    configure = strategy.configure_train if is_train else strategy.configure_evaluate
    grid = _AnyNodes(strategy)
    # So that few messages are made, however many nodes it waits for.
    with without_fedavgs_log(), instead(strategy, "min_available_nodes", 1):
        asked = list(configure(server_round, arrays, config, cast(Grid, grid)))
    size = sample_size(strategy, len(grid.get_node_ids()), is_train=is_train)
    configs = [_config_of(strategy, each, arrays) for each in asked]
    return _one(strategy, configs, size)


def sample_size(strategy: message.FedAvg, num_nodes: int, *, is_train: bool) -> int:
    """Return how many of the nodes a strategy samples, as FedAvg does."""
    if is_train:
        fraction, least = strategy.fraction_train, strategy.min_train_nodes
    else:
        fraction, least = strategy.fraction_evaluate, strategy.min_evaluate_nodes
    return max(int(num_nodes * fraction), least)


def legacy_config(
    strategy: legacy.FedAvg,
    parameters: Parameters,
    *,
    server_round: int,
    is_train: bool,
) -> dict[str, Scalar] | None:
    """Do what ``message_config`` does, in Flower's legacy API."""
    configure = strategy.configure_fit if is_train else strategy.configure_evaluate
    clients = _AnyClients(strategy)
    with without_fedavgs_log():
        asked: Sequence[tuple[ClientProxy, FitIns | EvaluateIns]] = configure(
            server_round, parameters, clients
        )
    if any(sent.parameters is not parameters for _, sent in asked):
        raise _not_kept(strategy, "sends other parameters than the global model's")
    size = legacy_sample_size(strategy, clients.num_available(), is_train=is_train)
    return _one(strategy, [sent.config for _, sent in asked], size)


def legacy_sample_size(
    strategy: legacy.FedAvg, num_clients: int, *, is_train: bool
) -> int:
    """Return how many of the clients a strategy samples."""
    count = strategy.num_fit_clients if is_train else strategy.num_evaluation_clients
    return count(num_clients)[0]


@contextmanager
def without_fedavgs_log() -> Iterator[None]:
    """Hide what FedAvg logs about clients that are not real."""

    def is_not_fedavgs(record: LogRecord) -> bool:
        return record.module != "fedavg"

    _log.addFilter(is_not_fedavgs)
    try:
        yield
    finally:
        _log.removeFilter(is_not_fedavgs)


@contextmanager
def instead(strategy: object, name: str, value: object) -> Iterator[None]:
    """Replace a strategy's attribute for a moment."""
    usual = getattr(strategy, name)
    setattr(strategy, name, value)
    try:
        yield
    finally:
        setattr(strategy, name, usual)


class _AnyNodes:
    """A grid of as many made-up nodes as a strategy needs."""

    def __init__(self, strategy: message.FedAvg) -> None:
        self._strategy = strategy

    def get_node_ids(self) -> range:
        each = self._strategy
        return range(max(each.min_train_nodes, each.min_evaluate_nodes, 1))


class _AnyClients(SimpleClientManager):
    """A manager of as many made-up clients as a strategy needs."""

    def __init__(self, strategy: legacy.FedAvg) -> None:
        super().__init__()
        self._strategy = strategy

    def num_available(self) -> int:
        each = self._strategy
        least = each.min_fit_clients, each.min_evaluate_clients
        return max(each.min_available_clients, *least, 1)

    def all(self) -> dict[str, ClientProxy]:
        raise _not_kept(self._strategy, "chooses clients by itself")

    def sample(
        self,
        num_clients: int,
        min_num_clients: int | None = None,
        criterion: Criterion | None = None,
    ) -> list[ClientProxy]:
        del min_num_clients, criterion
        return [cast(ClientProxy, SimpleNamespace(cid="any"))] * num_clients


def _config_of(
    strategy: message.FedAvg, asked: Message, arrays: ArrayRecord
) -> ConfigRecord:
    """Return the config of a message that holds nothing else but the arrays."""
    content = dict(asked.content)
    config = content.pop(strategy.configrecord_key, None)
    if content.pop(strategy.arrayrecord_key, None) is not arrays or content:
        raise _not_kept(strategy, "sends more than the global model and a config")
    return cast(ConfigRecord, config)


def _one(
    strategy: object, configs: Sequence[Mapping[str, Any]], size: int
) -> Any | None:
    if not configs:
        return None
    if len(configs) != size:
        raise _not_kept(strategy, "chooses clients by itself")
    if any(dict(config) != dict(configs[0]) for config in configs):
        raise _not_kept(strategy, "tells clients different things")
    return configs[0]


def _not_kept(strategy: object, what: str) -> SmartSplitError:
    return SmartSplitError(
        f"{type(strategy).__name__} {what} when it configures a round, which "
        "SmartSplit cannot keep: it chooses clients by Planning(select=...) and gives "
        "each its part of the model, with one config for all."
    )


def refuse_wrappers(strategy: object, kinds: tuple[type, ...]) -> None:
    """Refuse to be called by another strategy, such as differential privacy's.

    Such wrappers clip and noise single clients' whole models. The server has none of
    a split client, so their guarantee would silently not hold.
    """
    owner = sys._getframe(2).f_locals.get("self")
    if isinstance(owner, kinds) and owner is not strategy:
        raise SmartSplitError(
            f"{type(owner).__name__} drives {type(strategy).__name__}: strategies that "
            "wrap others, as for differential privacy, change the whole models of "
            "single clients, and those are nowhere whole when they are split. Run it "
            "unwrapped."
        )
