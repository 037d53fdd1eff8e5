"""What the strategy's part of a round takes where everybody trains the whole model.

``python -m simulations.benchmarks.rounds.whole_variants``.

The same rounds are planned, written, checked and merged by turns with ``Whole()``,
which is never asked for variants, and with rules that are asked for each client: one
that offers the whole model, and one that offers a narrow one. Replies are made here:
no training and no network is in these times, which would hide a difference. They are
CPU time, which other programs disturb least.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torchvision.models import get_model

from flwr_smartsplit import Planning, Task, Variant, VariantRequest, Whole, Widths
from flwr_smartsplit.edge.regions import cut_state
from flwr_smartsplit.flower.planning import Settings
from flwr_smartsplit.flower.rounds.exchange import Phase, Sent
from flwr_smartsplit.flower.rounds.manager import CentralManager
from flwr_smartsplit.flower.serde.records import plan_from_config, plan_to_scalars
from flwr_smartsplit.plan.selection.selection import select_at_random
from flwr_smartsplit.server.aggregation import Replace
from flwr_smartsplit.split.build import state_of
from flwr_smartsplit.types import (
    RAW,
    WHOLE,
    ClientReply,
    DeviceProfile,
    StepReport,
)


class AlwaysWhole:
    """Offer the whole model by the general path."""

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        """Return the whole model."""
        del request
        return (WHOLE,)


RULES: Mapping[str, Callable[[], Any]] = {
    "Whole()": Whole,
    "asked": AlwaysWhole,
    "half": lambda: Widths((0.5,)),
}


def build_manager(task: Task, rule: Any, folder: Path, name: str) -> CentralManager:
    """Build a strategy's manager without edges."""
    settings = Settings(
        planning=Planning(variants=rule, select=select_at_random),
        mixing=Replace(),
        server_steps=(),
        seed=0,
        journal=folder / f"{name}.jsonl",
        on_row=(),
        between_rounds=None,
        codec=RAW,
    )
    return CentralManager(task, (), settings)


def one_round(manager: CentralManager, number: int, state: Any, num: int) -> float:
    """Plan, send and settle a round of so many clients; return the CPU time."""
    clients = {
        str(index): DeviceProfile(
            client_key=str(index), budget_bytes=None, num_examples=64, batch_size=2
        )
        for index in range(num)
    }
    phase = Phase(
        round_number=number, is_train=True, sample_size=lambda n: n, config={}
    )
    start = time.process_time()
    dispatch = manager.begin(phase, state, clients)
    for sent in dispatch.sent.values():
        plan_from_config(plan_to_scalars(sent.plan))  # As the client reads it
    replies = [_reply(sent, number, state) for sent in dispatch.sent.values()]
    manager.take(number, is_train=True)
    manager.settle(dispatch, replies, [])
    return time.process_time() - start


def _reply(sent: Sent, number: int, state: Any) -> ClientReply:
    mine = {name: state[name] for name in sent.returned_names}
    return ClientReply(
        client_key=sent.plan.client_key,
        round_number=number,
        state=cut_state(mine, sent.regions),
        receipts=(),
        report=StepReport(
            num_examples=64, num_steps=32, loss=1.0, loss_rms=1.0, metrics={}
        ),
    )


def build_model(name: str) -> nn.Module:
    """Build a torchvision classifier."""
    model: nn.Module = get_model(name, num_classes=10)
    return model


def main(
    model: Annotated[str, typer.Option(help="One of torchvision's.")] = "resnet18",
    num_clients: Annotated[int, typer.Option(help="In each round.")] = 10,
    num_rounds: Annotated[int, typer.Option(help="Of each rule.")] = 11,
) -> None:
    """Print medians in milliseconds, and what they are of ``Whole()``'s."""
    task = Task(
        model_fn=lambda: build_model(model),
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        example_inputs=torch.zeros(2, 3, 32, 32),
        example_targets=torch.zeros(2, dtype=torch.long),
    )
    state = state_of(build_model(model))
    with TemporaryDirectory() as folder:
        managers = {
            name: build_manager(task, make(), Path(folder), name)
            for name, make in RULES.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in RULES}
        for number in range(1, num_rounds + 2):
            for name, manager in managers.items():
                taken = one_round(manager, number, state, num_clients)
                if number > 1:  # The first one makes dry runs.
                    seconds[name].append(taken)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians["Whole()"]
        typer.echo(f"{name}: {1000 * median:.1f} ms a round, {ratio:.3f}")


if __name__ == "__main__":
    typer.run(main)
