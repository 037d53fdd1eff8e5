"""What all methods built on SmartSplit's strategy have in common."""

from typing import Any

from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import Constraints, Planning, SmartSplit
from simulations.experiments.clients import edges_of
from simulations.methods.method import Setting

NO_RECOMPUTE = Constraints(recompute=False)


def split_strategy(
    setting: Setting, *, has_edges: bool = True, **planning: Any
) -> SmartSplit:
    """Build SmartSplit's strategy for a setting."""
    experiment = setting.experiment
    if any(device.traits.flops_per_second for device in setting.devices):
        planning.setdefault("client_seconds", setting.clock.client_seconds)
    return SmartSplit(
        setting.task,
        edges_of(experiment) if has_edges else (),
        strategy=FedAvg(
            fraction_train=experiment.fraction_train,
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_available_nodes=experiment.num_clients,
        ),
        planning=Planning(**planning),
        seed=experiment.seed,
        journal=setting.journal,
    )
