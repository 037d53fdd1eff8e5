"""SmartSplit: weak devices train the front of the model, an edge the rest.

A reconstruction: the formulas of the paper are not public to us. This file lets every
sampled client that has a route within its budget take part, on the deepest cut that
fits.

References
----------
Tian, Li, Tam, Wu, Xu: Breaking the Memory Wall for Heterogeneous Federated Learning
via Model Splitting. IEEE TPDS 35(12), 2024. arXiv:2410.11577.
"""

from flwr.serverapp.strategy import Strategy

from flwr_smartsplit import SmartSplit
from simulations.clients import edges_of
from simulations.method import Method, Setting


def build_strategy(setting: Setting) -> Strategy:
    """Build the strategy that splits models over the devices and one Ray edge."""
    experiment = setting.experiment
    return SmartSplit(
        task=setting.task,
        edges=edges_of(setting.experiment),
        seed=experiment.seed,
        journal=setting.journal,
        fraction_train=experiment.fraction_train,
        fraction_evaluate=0.0,
        min_available_nodes=experiment.num_clients,
    )


SMARTSPLIT = Method(
    name="smartsplit",
    summary="who cannot hold the model trains its front, an edge the rest",
    strategy_fn=build_strategy,
)
