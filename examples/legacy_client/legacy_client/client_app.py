"""The clients: NumPyClients, as before."""

from flwr.client import Client, ClientApp
from flwr.common import Context

from flwr_smartsplit import RayEdge, SmartSplitNumPyClient
from legacy_client.task import BUDGETS_BYTES, build_task, load_data


def client_fn(context: Context) -> Client:
    """Make one client."""
    index = int(context.node_config["partition-id"])
    train_loader, val_loader = load_data(index)
    return SmartSplitNumPyClient(
        build_task(),
        train_loader,
        val_loader,
        client_key=str(index),
        budget_bytes=BUDGETS_BYTES[index],
        edges=(RayEdge(),),
    ).to_client()


app = ClientApp(client_fn)
