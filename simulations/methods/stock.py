"""Stock: other strategies of Flower's own, on devices without a limit.

Like ``fedavg``, they have every sampled client train the whole model and know no
budgets: ceilings for another server or local rule, and no answer to weak devices.

References
----------
FedProx: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in
Heterogeneous Networks. MLSys 2020. arXiv:1812.06127.
FedAdagrad, FedAdam, FedYogi: Reddi et al.: Adaptive Federated Optimization. ICLR 2021.
arXiv:2003.00295.
FedAvgM: Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for
Federated Visual Classification. 2019. arXiv:1909.06335.
FedMedian, FedTrimmedAvg: Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed
Learning. ICML 2018. arXiv:1803.01498.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Strategy,
)

from flwr_smartsplit.flower.journal.rows import Row
from flwr_smartsplit.flower.serde.records import from_array_record, to_array_record
from simulations.methods.method import Method, Setting
from simulations.methods.sampled import Answer, Merged, Sample, SampledRounds

ASKED_BY_SAMPLER: dict[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
}
"""Arguments of a strategy that asks every node it sees: it sees the sample only."""


def stock_method(name: str, inner_fn: Callable[..., FedAvg], *, rule: str) -> Method:
    """Make a method of a strategy that derives from Flower's FedAvg.

    Parameters
    ----------
    name : str
        What to call it.
    inner_fn : Callable[..., FedAvg]
        The strategy's class, or a partial of it with its own settings.
    rule : str
        What it does otherwise than FedAvg, in a few words.
    """
    return Method(
        name=name,
        summary=f"fedavg {rule}; budgets ignored",
        strategy_fn=partial(build_strategy, inner_fn=inner_fn),
    )


def build_strategy(
    setting: Setting, *, inner_fn: Callable[..., FedAvg] = FedAvg
) -> Strategy:
    """Build a strategy of Flower's over the sampled clients."""
    return SampledRounds(StockRounds(inner_fn(**ASKED_BY_SAMPLER)), setting)


@dataclass(slots=True)
class StockRounds:
    """Rounds of a strategy of Flower's: every client trains the whole model.

    What it returns is sent on in the types it came in: some return float64, which is
    twice the bytes.
    """

    inner: FedAvg
    _dtypes: dict[str, str] = field(default_factory=dict)

    def ask(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        sample: Sample,
    ) -> tuple[list[Message], list[Row]]:
        """Ask the sampled clients as the strategy does."""
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        seen = cast(Grid, _Nodes([each.node_id for each in sample.chosen.values()]))
        asked = self.inner.configure_train(server_round, arrays, config, seen)
        return list(asked), []

    def merge(self, server_round: int, answers: Sequence[Answer]) -> Merged:
        """Merge as the strategy does."""
        messages = [message for _, message in answers]
        arrays, metrics = self.inner.aggregate_train(server_round, messages)
        if arrays is not None:
            state = from_array_record(arrays).items()
            arrays = to_array_record(
                {name: a.astype(self._dtypes[name], copy=False) for name, a in state}
            )
        return Merged(arrays, metrics, [_row(message) for message in messages])


def _row(message: Message) -> Row:
    """Say what a client that trained the whole model did."""
    row: Row = {"route": "whole", "budget_bytes": None}
    if message.has_error():
        return row
    (metrics,) = message.content.metric_records.values()
    return row | {
        "peak_bytes": metrics["device-peak-bytes"],
        "num_examples": metrics["num-examples"],
        "loss": metrics["loss"],
        "edge_bytes_up": metrics["sent-bytes"],
        "edge_bytes_down": metrics["received-bytes"],
        "seconds": metrics["seconds"],
        "num_steps": metrics["num-steps"],
    }


@dataclass(frozen=True, slots=True)
class _Nodes:
    """All that a strategy asks of a grid before it sends."""

    node_ids: list[int]

    def get_node_ids(self) -> list[int]:
        return self.node_ids


STOCK = (
    stock_method(
        "fedprox",
        partial(FedProx, proximal_mu=0.1),
        rule="with a pull of 0.1 to the global model",
    ),
    stock_method(
        "fedadam", partial(FedAdam, eta=0.03), rule="with Adam on the server, rate 0.03"
    ),
    stock_method(
        "fedyogi", partial(FedYogi, eta=0.01), rule="with Yogi on the server, rate 0.01"
    ),
    stock_method(
        "fedadagrad",
        partial(FedAdagrad, eta=0.01),
        rule="with Adagrad on the server, rate 0.01",
    ),
    stock_method(
        "fedavgm",
        partial(FedAvgM, server_learning_rate=1.0, server_momentum=0.5),
        rule="with momentum 0.5 on the server",
    ),
    stock_method("fedmedian", FedMedian, rule="with the median for the mean"),
    stock_method(
        "fedtrimmedavg",
        partial(FedTrimmedAvg, beta=0.1),
        rule="without the outer tenths of each value",
    ),
)
"""The ready ones; rates for the digits of the quickstart, found by short runs."""
