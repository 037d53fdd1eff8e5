"""The server: it has no data, so the hospitals evaluate."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import Planning, RayEdge, SmartSplit, deepest_u_shape
from own_model.task import BUDGETS_BYTES, Net, build_task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train along routes that end where they began: with the labels."""
    torch.manual_seed(0)
    strategy = SmartSplit(
        build_task(),
        edges=(RayEdge(),),
        strategy=FedAvg(min_available_nodes=len(BUDGETS_BYTES)),
        planning=Planning(choose_route=deepest_u_shape),
        journal=context.run_config["journal"] or None,
    )
    strategy.start(
        grid,
        ArrayRecord(Net().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
    )
