"""The devices: each has its data and its budget, and may be sent to both edges."""

from flwr.app import Context
from torch.utils.data import DataLoader

from flwr_smartsplit import SmartSplitNumPyClient, build_client_app
from multi_hop.task import BATCH_SIZE, BUDGETS_BYTES, EDGES, build_task, make_data


def client_fn(context: Context) -> SmartSplitNumPyClient:
    """Make the client of one device."""
    index = int(context.node_config["partition-id"])
    return SmartSplitNumPyClient(
        build_task(),
        DataLoader(make_data(seed=index), batch_size=BATCH_SIZE, shuffle=True),
        client_key=str(index),
        budget_bytes=BUDGETS_BYTES[index],
        edges=EDGES,
    )


app = build_client_app(client_fn)
