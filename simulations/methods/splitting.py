"""What all methods built on SmartSplit's strategy have in common."""

from typing import Any

from flwr_smartsplit import SmartSplit
from simulations.experiments.clients import edges_of
from simulations.methods.method import Setting


def split_strategy(setting: Setting, **arguments: Any) -> SmartSplit:
    """Build SmartSplit's strategy for a setting.

    Parameters
    ----------
    setting : Setting
        What is run.
    **arguments : Any
        More of the strategy's arguments, or others.
    """
    experiment = setting.experiment
    usual: dict[str, Any] = {
        "edges": edges_of(experiment),
        "seed": experiment.seed,
        "journal": setting.journal,
        "fraction_train": experiment.fraction_train,
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_available_nodes": experiment.num_clients,
    }
    if any(device.traits.flops_per_second for device in setting.devices):
        usual["client_seconds"] = setting.clock.client_seconds
    return SmartSplit(setting.task, **{**usual, **arguments})
