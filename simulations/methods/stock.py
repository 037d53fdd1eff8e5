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

from collections.abc import Callable
from functools import partial

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

from simulations.methods.journalled import ASKED_BY_SAMPLER, Journalled
from simulations.methods.method import Method, Setting


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
        strategy_fn=partial(_build_strategy, inner_fn=inner_fn),
    )


def _build_strategy(setting: Setting, *, inner_fn: Callable[..., FedAvg]) -> Strategy:
    return Journalled(inner_fn(**ASKED_BY_SAMPLER), setting)


STOCK = (
    stock_method(
        "fedprox",
        partial(FedProx, proximal_mu=0.1),
        rule="with a pull of 0.1 to the global model",
    ),
    stock_method(
        "fedadam",
        partial(FedAdam, eta=0.03),
        rule="with Adam on the server, rate 0.03",
    ),
    stock_method(
        "fedyogi",
        partial(FedYogi, eta=0.01),
        rule="with Yogi on the server, rate 0.01",
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
