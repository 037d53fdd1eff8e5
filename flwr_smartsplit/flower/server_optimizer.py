"""Server optimizers: the server step of Flower's adaptive strategies, after the merge.

They need only the state before a round and the clients' mean. The arithmetic is
Flower's own.

References
----------
.. [1] Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv:2003.00295.
.. [2] Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for
   Federated Visual Classification", 2019, arXiv:1909.06335 (server momentum).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common import (
    Code,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import strategy as legacy
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp.strategy import FedAvg, FedAvgM

from flwr_smartsplit.edge.regions import cut_state
from flwr_smartsplit.flower.inner_strategy import instead, without_fedavgs_log
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from flwr_smartsplit.server.aggregation import RoundSummary
from flwr_smartsplit.types import Regions

State = Mapping[str, npt.NDArray[Any]]
TakeStep = partial[State]
"""``take_step(round, state, mean)`` of a strategy returns the next state."""

_MOMENTS = ("m_t", "v_t", "momentum_vector")
"""What Flower's strategies call them: arrays by name, or in the order of parameters."""


class ServerOptimizer:
    """Step from a round's state to the next, as one of Flower's strategies does.

    ``take_step`` is ``message_step`` or ``legacy_step`` of a strategy, which keeps the
    moments. Only ``trained_names``, the parameters, are stepped. Buffers, such as
    BatchNorm's statistics, take the mean: a step could make a variance negative.
    """

    def __init__(self, take_step: TakeStep, trained_names: frozenset[str]) -> None:
        self._take_step = take_step
        self._trained_names = trained_names
        self._taken: State = {}
        self._names: list[str] = []  # Of the last step, in order

    def step(self, before: State, after: State, summary: RoundSummary) -> State:
        """Return the next state."""
        names = [name for name in before if name in self._trained_names]
        self._names = names
        start = {name: self._unrounded(name, before[name]) for name in names}
        mean = {name: after[name] for name in names}
        self._taken = self._take_step(summary.round_number, start, mean)
        return {**after, **self._taken}

    def cut(self, regions: Regions) -> None:
        """Keep the moments of these values: the model has become smaller."""
        held = vars(self._take_step.args[0])
        for key in set(held) & set(_MOMENTS):
            if isinstance(held[key], dict):
                held[key] = dict(cut_state(held[key], regions))
            elif isinstance(held[key], list):
                named = zip(self._names, held[key], strict=True)
                held[key] = list(cut_state(dict(named), regions).values())
        self._taken = dict(cut_state(self._taken, regions))

    def _unrounded(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the last step's result, whose dtype may be finer than the model's."""
        taken = self._taken.get(name)
        if taken is None or not np.array_equal(taken.astype(array.dtype), array):
            return array
        return taken


# The strategy's metric function must not see the one made-up reply.


def message_step(
    strategy: FedAvg, round_number: int, start: State, mean: State
) -> State:
    """Let a Message-API strategy aggregate one reply: the mean."""
    record = to_array_record(start)
    # What its configure_train keeps, without the buffers.
    kept = record if isinstance(strategy, FedAvgM) else dict(start)
    vars(strategy)["current_arrays"] = kept
    metrics = MetricRecord({strategy.weighted_by_key: 1})
    content = RecordDict({"arrays": to_array_record(mean), "metrics": metrics})
    reply = Message(content, message_type="train", dst_node_id=0)
    with (
        without_fedavgs_log(),
        instead(strategy, "train_metrics_aggr_fn", lambda *_: MetricRecord()),
    ):
        arrays, _ = strategy.aggregate_train(round_number, [reply])
    return from_array_record(cast(ArrayRecord, arrays))


def legacy_step(
    strategy: legacy.FedAvg, round_number: int, start: State, mean: State
) -> State:
    """Let a legacy strategy aggregate one result: the mean."""
    if isinstance(strategy, legacy.FedAvgM):
        strategy.initial_parameters = ndarrays_to_parameters(list(start.values()))
        # It makes its momentum in round 1, even if nobody trained then.
        round_number = 1 if strategy.momentum_vector is None else round_number
    else:
        vars(strategy)["current_weights"] = list(start.values())
    result = FitRes(
        status=Status(Code.OK, ""),
        parameters=ndarrays_to_parameters(list(mean.values())),
        num_examples=1,
        metrics={},
    )
    with (
        without_fedavgs_log(),
        instead(strategy, "fit_metrics_aggregation_fn", lambda _: {}),
    ):
        nobody = cast(ClientProxy, None)
        parameters, _ = strategy.aggregate_fit(round_number, [(nobody, result)], [])
    arrays = parameters_to_ndarrays(cast(Parameters, parameters))
    return dict(zip(start, arrays, strict=True))
