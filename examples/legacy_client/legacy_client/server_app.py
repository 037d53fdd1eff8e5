"""The server: LegacySmartSplit where the legacy FedAvg would be."""

import torch
from flwr.common import Context, Metrics, NDArrays, Scalar, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

from flwr_smartsplit import LegacySmartSplit, RayEdge
from legacy_client.task import BUDGETS_BYTES, Net, build_task, load_test


def server_fn(context: Context) -> ServerAppComponents:
    """Put the server together, as in any legacy app."""
    torch.manual_seed(0)
    initial = [array.numpy() for array in Net().state_dict().values()]
    strategy = LegacySmartSplit(
        build_task(),
        edges=(RayEdge(),),
        strategy=FedAvg(
            min_available_clients=len(BUDGETS_BYTES),
            initial_parameters=ndarrays_to_parameters(initial),
            on_fit_config_fn=fit_config,
            evaluate_fn=evaluate,
            evaluate_metrics_aggregation_fn=weighted_average,
        ),
        journal=context.run_config["journal"] or None,
    )
    num_rounds = int(context.run_config["num-server-rounds"])
    return ServerAppComponents(
        strategy=strategy, config=ServerConfig(num_rounds=num_rounds)
    )


def fit_config(server_round: int) -> dict[str, Scalar]:
    """Lower the learning rate from round to round."""
    return {"lr": 4e-3 * 0.8 ** (server_round - 1)}


def evaluate(
    server_round: int, parameters: NDArrays, config: dict[str, Scalar]
) -> tuple[float, dict[str, Scalar]]:
    """Evaluate the whole model on the server."""
    model = Net()
    names = model.state_dict()
    arrays = map(torch.tensor, parameters)
    model.load_state_dict(dict(zip(names, arrays, strict=True)))
    images, targets = load_test().tensors
    with torch.no_grad():
        outputs = model(images)
    loss = torch.nn.functional.cross_entropy(outputs, targets)
    right = outputs.argmax(1) == targets
    return float(loss), {"accuracy": float(right.float().mean())}


def weighted_average(metrics: list[tuple[int, Metrics]]) -> Metrics:
    """Average what the clients measured on their own images."""
    total = sum(num_examples for num_examples, _ in metrics)
    return {
        "accuracy": sum(n * float(metric["accuracy"]) for n, metric in metrics) / total
    }


app = ServerApp(server_fn=server_fn)
