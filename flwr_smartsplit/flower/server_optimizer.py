"""Server optimizers: Flower's adaptive strategies, applied after the merge.

They need nothing but the state before a round and the clients' mean, which is what a
split round ends with too. The arithmetic is Flower's own.

References
----------
.. [1] Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv:2003.00295.
.. [2] Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for
   Federated Visual Classification", 2019, arXiv:1909.06335 (server momentum).
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import WARNING, getLogger
from typing import Any, cast

import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi

from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record

State = Mapping[str, npt.NDArray[Any]]

_NEED_ONLY_THE_MEAN = (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)
_log = getLogger("flwr")


class ServerOptimizer:
    """Step from a round's state to the next by one of Flower's strategies.

    Parameters
    ----------
    strategy : FedAdam, FedYogi, FedAdagrad or FedAvgM
        A copy of it keeps the moments; its sampling arguments are not used.
    trained_names : frozenset[str]
        The parameters. Buffers, such as BatchNorm's statistics, take the mean: a step
        beyond it could make a variance negative.

    Raises
    ------
    TypeError
        If the strategy needs the clients' whole models one by one.
    """

    def __init__(self, strategy: FedAvg, trained_names: frozenset[str]) -> None:
        if type(strategy) not in _NEED_ONLY_THE_MEAN:
            raise TypeError(
                f"server_optimizer is a {type(strategy).__name__}: only strategies "
                "that need no more than the clients' mean can follow a merge "
                f"({', '.join(kind.__name__ for kind in _NEED_ONLY_THE_MEAN)}). Krum, "
                "medians, trimmed means and q-FedAvg compare whole models of single "
                "clients, and those are nowhere whole when they are split."
            )
        self._strategy = copy.deepcopy(strategy)
        self._strategy.fraction_train = 0.0  # It takes the state and asks nobody.
        self._trained_names = trained_names

    def step(self, round_number: int, before: State, mean: State) -> State:
        """Return the next state.

        Parameters
        ----------
        round_number : int
            The round, counted from 1.
        before, mean : Mapping[str, ndarray]
            The state the round started from, and the merged one.
        """
        strategy = self._strategy
        start, merged = self._trained(before), self._trained(mean)
        config = ConfigRecord()
        nobody = cast(Grid, None)
        strategy.configure_train(round_number, to_array_record(start), config, nobody)
        key = strategy.weighted_by_key
        content = RecordDict(
            {"arrays": to_array_record(merged), "metrics": MetricRecord({key: 1})}
        )
        reply = Message(content, message_type="train", dst_node_id=0)
        with _quietly():  # It would log one reply.
            arrays, _ = strategy.aggregate_train(round_number, [reply])
        stepped = from_array_record(cast(ArrayRecord, arrays))
        return {
            name: stepped[name].astype(value.dtype) if name in stepped else value
            for name, value in mean.items()
        }

    def _trained(self, state: State) -> State:
        return {n: array for n, array in state.items() if n in self._trained_names}


@contextmanager
def _quietly() -> Iterator[None]:
    level = _log.level
    _log.setLevel(WARNING)
    try:
        yield
    finally:
        _log.setLevel(level)
