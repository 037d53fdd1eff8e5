"""The devices: each has its images and its budget."""

from flwr.app import Context
from torch.utils.data import DataLoader

from flwr_smartsplit import RayEdge, SmartSplitNumPyClient, build_client_app
from segmentation.task import BATCH_SIZE, BUDGETS_BYTES, build_task, make_data


def client_fn(context: Context) -> SmartSplitNumPyClient:
    """Make the client of one device, as in any Flower app."""
    index = int(context.node_config["partition-id"])
    return SmartSplitNumPyClient(
        build_task(),
        DataLoader(make_data(seed=index), batch_size=BATCH_SIZE, shuffle=True),
        client_key=str(index),
        budget_bytes=BUDGETS_BYTES[index],
        edges=(RayEdge(),),
    )


app = build_client_app(client_fn)
