"""What LoRA takes on a device: ``python -m simulations.benchmarks.lora_memory``.

A GPT-2 with random weights and tied embeddings is trained for two steps: all of it,
its adapters only, and the adapters cut by a u-shape that keeps text and labels on the
device. Each is compared with a plain loop over the same model, to the last bit.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from flwr_smartsplit import Task
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.huggingface import decoder_units
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches

VOCABULARY = 50_257
IGNORED = -100


@dataclass(frozen=True)
class Size:
    """How large the model and its batches are."""

    layers: int = 12
    width: int = 512
    batch_size: int = 8
    length: int = 64
    vocabulary: int = VOCABULARY


@dataclass(frozen=True)
class Row:
    """One way to train: bytes on the device, and bytes of arrays that travel."""

    name: str
    route: str
    parameters: int
    trained: int
    predicted_bytes: int
    measured_bytes: int
    is_exact: bool  # Loss, gradients, final state: those of the plain loop
    first_down_bytes: int  # To the device, in the first round
    down_bytes: int  # In each later round
    up_bytes: int


def whole_model(size: Size) -> nn.Module:
    """Build a GPT-2 whose input and output embeddings are one."""
    library: Any = import_module("transformers")
    config = library.GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.length,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=max(1, size.width // 64),
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model: nn.Module = library.GPT2LMHeadModel(config)
    return model


def adapted_model(size: Size) -> nn.Module:
    """Build the same with LoRA adapters on every matrix of its layers."""
    peft: Any = import_module("peft")
    config = peft.LoraConfig(
        r=8,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft uses a name that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = peft.get_peft_model(whole_model(size), config)
    return model


def token_loss(outputs: Any, labels: Tensor) -> Tensor:
    """Compare each token's prediction with its label."""
    logits = outputs.logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)


def task_of(model_fn: Any, size: Size) -> Task:
    """Make the task of training a model."""
    chance = torch.Generator().manual_seed(0)
    shape = (size.batch_size, size.length)
    tokens = torch.randint(size.vocabulary, shape, generator=chance)
    return Task(
        model_fn=partial(model_fn, size),
        loss_fn=token_loss,
        optimizer_fn=partial(torch.optim.AdamW, lr=1e-3),
        example_inputs=tokens,
        example_targets=tokens,
        units_fn=decoder_units,
    )


def measured(size: Size) -> Iterator[Row]:
    """Train in each way; the costliest comes first."""
    adapters = task_of(adapted_model, size)
    ends = Route.u_shape(1, size.layers + 1)
    yield from _rows({"all trained": Route.whole()}, task_of(whole_model, size), size)
    routes = {
        "adapters": Route.whole(),
        "adapters, split": Route.split(1),
        "adapters, u-shape": ends,
    }
    yield from _rows(routes, adapters, size)
    quarters = replace(adapters, accumulate=4)
    routes = {
        "adapters, split, 4 micro-batches": Route.split(1),
        "adapters, u-shape, 4 micro-batches": ends,
    }
    yield from _rows(routes, quarters, size)


def _rows(routes: dict[str, Route], task: Task, size: Size) -> Iterator[Row]:
    batches = example_batches(task, batch_size=size.batch_size)[:2]
    with RouteChecker(task, batches) as checker:
        chain = checker.chain
        profile = profile_chain(chain, batch_size=size.batch_size, task=task)
        parameters = list(chain.model.parameters())
        for name, route in routes.items():
            check = checker.check(route)
            up_bytes, frozen_bytes = _travelling(chain, route)
            yield Row(
                name=name,
                route=str(route),
                parameters=sum(p.numel() for p in parameters),
                trained=sum(p.numel() for p in parameters if p.requires_grad),
                predicted_bytes=predicted_peak_bytes(profile, route),
                measured_bytes=check.measured_peak_bytes,
                is_exact=check.differences == (),
                first_down_bytes=up_bytes + frozen_bytes,
                down_bytes=up_bytes,
                up_bytes=up_bytes,
            )


def _travelling(chain: Chain, route: Route) -> tuple[int, int]:
    """Add up the device's state that training changes, and the rest."""
    state, changed = chain.model.state_dict(), 0
    names: set[str] = set()
    for leg in route.device_legs(len(chain)):
        names.update(chain.state_names(leg.start, leg.stop))
        own = chain.changed_names(leg.start, leg.stop)
        changed += sum(state[name].nbytes for name in own)
    return changed, sum(state[name].nbytes for name in names) - changed


def show(rows: list[Row], console: Console) -> None:
    """Print the rows as a table."""
    table = Table("", "route", "peak", "predicted", "exact", "round 1", "later", "back")
    for row in rows:
        sizes = (row.first_down_bytes, row.down_bytes, row.up_bytes)
        table.add_row(
            row.name,
            row.route,
            f"{row.measured_bytes:,}",
            f"{row.predicted_bytes:,}",
            "yes" if row.is_exact else "NO",
            *(f"{size:,}" for size in sizes),
        )
    console.print(table)


def main(
    layers: Annotated[int, typer.Option(help="Layers of the decoder.")] = 12,
    width: Annotated[int, typer.Option(help="Its hidden size.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare what LoRA takes on a device, whole and cut."""
    torch.set_num_threads(1)
    rows = list(measured(Size(layers=layers, width=width, batch_size=batch_size)))
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows]) + "\n")
        return
    console = Console(width=160)
    counts = {row.parameters for row in rows}, {row.trained for row in rows}
    console.print(f"{max(counts[0]):,} parameters, {min(counts[1]):,} in adapters")
    show(rows, console)


if __name__ == "__main__":
    typer.run(main)
