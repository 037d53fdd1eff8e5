"""Evaluating along a route is evaluating the whole model, on real data.

Digits come with scikit-learn. The others are used where ``data/NAME.npz`` is there
(arrays ``x_train, y_train, x_test, y_test``), and skipped where it is not.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flwr_smartsplit import Route
from flwr_smartsplit.device.local_training import Conditions, evaluate_locally
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.protocol import HoldState
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.types import ClientPlan, Status
from simulations.experiments.clients import build_task
from simulations.experiments.data import evaluation_loader
from simulations.experiments.experiment import Experiment
from simulations.studies.quickstart import quickstart


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Say which share of a batch is right."""
    return {"accuracy": float((outputs.argmax(1) == targets).double().mean())}


def experiment_on(name: str) -> Experiment:
    """Take a data set, if it is there."""
    if name == "digits":
        return quickstart(name)
    path = Path("data") / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there: this real data set is NOT tested")
    return replace(quickstart(str(path.resolve())), max_test_examples=512)


def central(model: nn.Module, experiment: Experiment) -> tuple[float, float]:
    """Evaluate the stock model in a plain loop."""
    loss, right, total = 0.0, 0.0, 0
    model.eval()
    with torch.no_grad():
        for inputs, targets in evaluation_loader(experiment):
            outputs = model(inputs)
            loss += float(nn.functional.cross_entropy(outputs, targets)) * len(targets)
            right += accuracy(outputs, targets)["accuracy"] * len(targets)
            total += len(targets)
    return loss / total, right / total


@pytest.mark.parametrize("data", ["digits", "fashion_mnist", "cifar10"])
@pytest.mark.parametrize("bend", [0.0, 1e-4])
def test_split_evaluation_is_central_evaluation(data: str, bend: float) -> None:
    """Loss and accuracy have the same bits at every cut; a bent bias is seen."""
    experiment = experiment_on(data)
    task = replace(build_task(experiment), metrics_fn=accuracy)
    model = task.model_fn()
    state = state_of(model)
    truth = central(model, experiment)
    state["classify.bias"][0] += bend
    chain, edge = build_chain(task), LocalEdge()
    address, digest = edge.start(task), state_digest(state)
    edge.connect(address).send(HoldState(digest, state))
    for cut in range(1, len(chain)):
        plan = ClientPlan(
            client_key="a",
            round_number=1,
            route=Route.split(cut),
            seed=0,
            state_digest=digest,
            edge_addresses={"edge": address},
        )
        report = evaluate_locally(
            plan,
            {name: state[name] for name in chain.state_names(0, cut)},
            evaluation_loader(experiment),
            Conditions(task=task, connect=lambda _, where: edge.connect(where)),
        )
        assert report.status is Status.OK, report.message
        same = (report.loss, report.metrics["accuracy"]) == truth
        assert same == (bend == 0.0)
    edge.stop(address)
