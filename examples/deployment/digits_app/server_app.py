"""The server, in either of Flower's APIs."""

import os

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import DefaultWorkflow
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits_app.task import NUM_TRAIN, Net, build_task, load_images
from flwr_smartsplit import Checkpoints, GrpcEdge, LegacySmartSplit, SmartSplit

app = ServerApp()


def edge_of(run_config):
    """Describe the edge.

    The secret is a file of this machine, and its name comes from the environment of the
    SuperLink: Flower keeps and shows what is in a run's config.
    """
    is_insecure = run_config["edge-is-insecure"]
    return GrpcEdge(
        run_config["edge"],
        insecure=is_insecure,
        root_certificates=None if is_insecure else os.environ.get("EDGE_CA_FILE"),
        admin_secret_file=os.environ.get("EDGE_SECRET_FILE"),
    )


def common_of(run_config):
    """Return the arguments that our strategies have in both APIs."""
    folder = run_config["checkpoints"]
    return {
        "journal": run_config["journal"] or None,
        "checkpoints": Checkpoints(folder) if folder else None,
        "client_keys": run_config["client-keys"],
    }


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for some rounds."""
    config = context.run_config
    edges = (edge_of(config),)
    torch.manual_seed(0)
    start = run_legacy if config["api"] == "legacy" else run_messages
    start(grid, context, edges)


def run_messages(grid, context, edges):
    """Run with Flower's Message API."""
    config = context.run_config
    num_clients = config["num-clients"]
    strategy = SmartSplit(
        build_task(),
        edges,
        strategy=FedAvg(min_available_nodes=num_clients, min_train_nodes=num_clients),
        **common_of(config),
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=evaluate_record,
    )


def run_legacy(grid, context, edges):
    """Run with Flower's legacy API."""
    config = context.run_config
    initial = [array.numpy() for array in Net().state_dict().values()]
    strategy = LegacySmartSplit(
        build_task(),
        edges,
        strategy=LegacyFedAvg(
            min_available_clients=config["num-clients"],
            min_fit_clients=config["num-clients"],
            initial_parameters=ndarrays_to_parameters(initial),
            on_fit_config_fn=lambda _: {"lr": config["learning-rate"]},
            evaluate_fn=evaluate_arrays,
        ),
        **common_of(config),
    )
    rounds = ServerConfig(num_rounds=config["num-server-rounds"])
    DefaultWorkflow()(grid, LegacyContext(context, config=rounds, strategy=strategy))
    strategy.close()


def evaluate_record(server_round, arrays):
    """Evaluate the whole model on the server."""
    loss, accuracy = evaluate(arrays.to_torch_state_dict())
    return MetricRecord({"loss": loss, "accuracy": accuracy})


def evaluate_arrays(server_round, parameters, config):
    """Do the same in the legacy API."""
    state = dict(zip(Net().state_dict(), map(torch.tensor, parameters), strict=True))
    loss, accuracy = evaluate(state)
    return loss, {"accuracy": accuracy}


def evaluate(state):
    """Return loss and accuracy on images that no device has."""
    model = Net().eval()
    model.load_state_dict(state)
    images, labels = load_images(NUM_TRAIN, None).tensors
    with torch.no_grad():
        outputs = model(images)
    right = (outputs.argmax(1) == labels).float().mean()
    return float(F.cross_entropy(outputs, labels)), float(right)
