"""The devices. Each SuperNode says in its --node-config what its device has."""

from flwr.app import Context

from digits_app.task import build_task, load_data
from flwr_smartsplit import SmartSplitNumPyClient, build_client_app


def client_fn(context: Context) -> SmartSplitNumPyClient:
    """Make the client of one device.

    No edge is named: its address and certificate come with the strategy's plan.
    """
    node = context.node_config
    partition_id = int(node.get("partition-id", 0))
    num_partitions = int(node.get("num-partitions", 1))
    budget_bytes = int(node.get("budget-bytes", 0))
    return SmartSplitNumPyClient(
        build_task(),
        load_data(partition_id, num_partitions),
        # The same in all rounds and runs, also after the SuperNode was restarted.
        client_key=str(node.get("client-key", partition_id)),
        budget_bytes=budget_bytes or None,  # no limit, if the node says nothing
    )


app = build_client_app(client_fn)
