"""fedavg_app: A Flower / PyTorch app."""

from flwr.app import Context

from fedavg_app.task import build_task, load_data
from flwr_smartsplit import RayEdge, SmartSplitNumPyClient, build_client_app


def client_fn(context: Context):
    """Make the client of one device."""
    # Load the data
    partition_id = context.node_config["partition-id"]
    num_partitions = context.node_config["num-partitions"]
    batch_size = context.run_config["batch-size"]
    trainloader, valloader = load_data(partition_id, num_partitions, batch_size)

    return SmartSplitNumPyClient(
        build_task(),
        trainloader,
        valloader,
        client_key=str(partition_id),
        budget_bytes=2**17 if partition_id % 2 else 2**20,  # what it has
        edges=(RayEdge(),),
        local_epochs=context.run_config["local-epochs"],
    )


app = build_client_app(client_fn)
