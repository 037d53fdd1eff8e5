"""The server: it chooses the routes by rules of its own."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit import Planning, Route, RouteRequest, SmartSplit, first_that_fits
from multi_hop.task import (
    BUDGETS_BYTES,
    EDGES,
    FAR,
    KEEP_LABELS,
    NEAR,
    build_net,
    build_task,
    make_data,
)

NEAR_UNITS = 4  # the near edge is small: it takes so many units of a client

app = ServerApp()


def choose_route(request: RouteRequest) -> Route:
    """Leave a device all that it can hold; near takes a little more, far the rest."""
    end = request.num_units
    routes = [Route.whole()]
    for cut in range(end - 1, 0, -1):  # the deepest first
        if request.device.client_key in KEEP_LABELS:
            if cut < end - 1:  # the last unit, and the labels, come back
                routes.append(Route.u_shape(cut, end - 1, edge=FAR))
        elif end - cut <= NEAR_UNITS:
            routes.append(Route.split(cut, edge=NEAR))
        else:
            routes.append(Route.hops((cut, cut + NEAR_UNITS), edges=(NEAR, FAR)))
    return first_that_fits(routes, request)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train over both edges."""
    torch.manual_seed(0)
    strategy = SmartSplit(
        build_task(),
        edges=EDGES,
        strategy=FedAvg(min_available_nodes=len(BUDGETS_BYTES), fraction_evaluate=0.0),
        planning=Planning(choose_route=choose_route),
        journal=context.run_config["journal"] or None,
    )
    strategy.start(
        grid,
        ArrayRecord(build_net().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the whole model on examples that no device has."""
    model = build_net()
    model.load_state_dict(arrays.to_torch_state_dict())
    inputs, targets = make_data(seed=len(BUDGETS_BYTES)).tensors
    with torch.no_grad():
        right = model(inputs).argmax(1) == targets
    return MetricRecord({"accuracy": float(right.float().mean())})
