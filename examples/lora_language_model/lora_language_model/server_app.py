"""The server: it trains the base on public text, and has the devices adapt it."""

from dataclasses import replace

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.utils.data import DataLoader

from flwr_smartsplit import (
    Chain,
    Planning,
    RayEdge,
    Route,
    SmartSplit,
    Task,
    deepest_u_shape,
    predicted_peak_bytes,
    profile_chain,
)
from lora_language_model.task import (
    BATCH_SIZE,
    BUDGETS_BYTES,
    build_base,
    build_model,
    build_task,
    load_public,
    loss_fn,
)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Show what a device needs, train the adapters, and save them."""
    torch.manual_seed(0)
    show_costs()
    model = build_model()
    pretrain(model.get_base_model())
    strategy = SmartSplit(
        build_task(),
        edges=(RayEdge(),),
        strategy=FedAvg(min_available_nodes=len(BUDGETS_BYTES)),
        # The text stays on its device: routes end where they began.
        planning=Planning(choose_route=deepest_u_shape),
        journal=context.run_config["journal"] or None,
    )
    result = strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
    )
    model.load_state_dict(result.arrays.to_torch_state_dict())
    if folder := context.run_config["adapters"]:
        model.save_pretrained(folder)  # Only the adapters: 125 KiB.


def pretrain(base: nn.Module) -> None:
    """Train the base, without adapters, on text that is nobody's secret."""
    weights = [p for name, p in base.named_parameters() if "lora_" not in name]
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    for parameter in weights:
        parameter.requires_grad_(True)
    for _ in range(40):
        for inputs, labels in DataLoader(load_public(), BATCH_SIZE, shuffle=True):
            optimizer.zero_grad()
            loss_fn(base(**inputs), labels).backward()
            optimizer.step()
    for parameter in weights:
        parameter.requires_grad_(False)


def show_costs() -> None:
    """Print what a device needs, however much of the model it trains and holds."""
    adapters, everything = build_task(), build_task(build_base)
    quarters = replace(adapters, accumulate=4)
    split = Route.u_shape(1, 5)
    rows = (
        ("whole model, all of it trained", everything, Route.whole()),
        ("whole model, adapters trained", adapters, Route.whole()),
        ("embeddings and head", adapters, split),
        ("embeddings and head, 4 micro-batches", quarters, split),
    )
    for what, task, route in rows:
        print(f"{what:38} {peak_bytes(task, route):>10,} bytes")


def peak_bytes(task: Task, route: Route) -> int:
    """Predict the most that a device holds on a route."""
    model = task.model_fn()
    chain = Chain.from_units(model, task.units_fn(model), task.example_inputs)
    profile = profile_chain(chain, batch_size=BATCH_SIZE, task=task)
    return predicted_peak_bytes(profile, route)
