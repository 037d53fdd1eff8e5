"""The server: SmartSplit where FedAvg would be."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import RayEdge, SmartSplit
from segmentation.task import (
    BUDGETS_BYTES,
    NUM_CLASSES,
    UNet,
    build_task,
    make_data,
)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train; each device gets the deepest route that fits its budget."""
    torch.manual_seed(0)
    strategy = SmartSplit(
        build_task(),
        edges=(RayEdge(),),
        strategy=FedAvg(min_available_nodes=len(BUDGETS_BYTES), fraction_evaluate=0.0),
        journal=context.run_config["journal"] or None,
    )
    strategy.start(
        grid,
        ArrayRecord(UNet().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the whole model on images that no device has."""
    model = UNet()
    model.load_state_dict(arrays.to_torch_state_dict(), strict=True)
    images, classes = make_data(seed=len(BUDGETS_BYTES)).tensors
    with torch.no_grad():
        found = model.eval()(images).argmax(1)
    right = (found == classes).float()
    by_class = [right[classes == kind].mean() for kind in range(NUM_CLASSES)]
    return MetricRecord({"accuracy": float(torch.stack(by_class).mean())})
