"""The devices: each has its text and its budget."""

from flwr.app import Context
from torch.utils.data import DataLoader

from flwr_smartsplit import RayEdge, SmartSplitNumPyClient, build_client_app
from lora_language_model.task import (
    BATCH_SIZE,
    BUDGETS_BYTES,
    build_task,
    load_eval,
    load_train,
)


def client_fn(context: Context) -> SmartSplitNumPyClient:
    """Make the client of one device, as in any Flower app."""
    index = int(context.node_config["partition-id"])
    return SmartSplitNumPyClient(
        build_task(),
        DataLoader(load_train(index), batch_size=BATCH_SIZE, shuffle=True),
        DataLoader(load_eval(index), batch_size=BATCH_SIZE),
        client_key=str(index),
        budget_bytes=BUDGETS_BYTES[index],
        edges=(RayEdge(),),
        local_epochs=2,
    )


app = build_client_app(client_fn)
