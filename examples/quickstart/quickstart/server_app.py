"""The server: SmartSplit where FedAvg would be."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import (
    Chain,
    RayEdge,
    Route,
    SmartSplit,
    predicted_peak_bytes,
    profile_chain,
)
from quickstart.task import (
    BATCH_SIZE,
    BUDGETS_BYTES,
    build_net,
    build_task,
    load_test,
)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Show what each cut costs a device, and train."""
    torch.manual_seed(0)
    show_costs()
    strategy = SmartSplit(
        build_task(),
        edges=(RayEdge(),),
        strategy=FedAvg(min_available_nodes=len(BUDGETS_BYTES), fraction_evaluate=0.0),
        journal=context.run_config["journal"] or None,
    )
    strategy.start(
        grid,
        ArrayRecord(build_net().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )


def show_costs() -> None:
    """Print what each cut needs on a device: a help to choose budgets."""
    task = build_task()
    chain = Chain.from_module(build_net(), task.example_inputs)
    profile = profile_chain(chain, batch_size=BATCH_SIZE, task=task)
    routes = [Route.split(cut) for cut in range(1, len(chain))]
    for route in [*routes, Route.whole()]:
        print(f"{route!s:24} {predicted_peak_bytes(profile, route):>9,} bytes")


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the whole model on the server, as with FedAvg."""
    model = build_net()
    model.load_state_dict(arrays.to_torch_state_dict(), strict=True)
    images, targets = load_test()
    with torch.no_grad():
        right = model.eval()(images).argmax(1) == targets
    return MetricRecord({"accuracy": float(right.float().mean())})
