"""The hospitals: each has its data, its diagnoses and its budget."""

from flwr.app import Context

from flwr_smartsplit import RayEdge, SmartSplitNumPyClient, build_client_app
from own_model.task import BUDGETS_BYTES, build_task, load_data


def client_fn(context: Context) -> SmartSplitNumPyClient:
    """Make the client of one hospital."""
    index = int(context.node_config["partition-id"])
    train_loader, test_loader = load_data(index)
    return SmartSplitNumPyClient(
        build_task(),
        train_loader,
        test_loader,
        client_key=str(index),
        budget_bytes=BUDGETS_BYTES[index],
        edges=(RayEdge(),),
    )


app = build_client_app(client_fn)
