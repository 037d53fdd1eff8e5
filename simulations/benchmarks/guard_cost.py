"""What the guard costs, once: ``python -m simulations.benchmarks.guard_cost``.

It compares a task's chain with the stock module before the task is first trained. A
step is one forward and backward of the whole stock model on the same batch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flwr_smartsplit import Task
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.huggingface import decoder_units
from flwr_smartsplit.train.threads import torch_threads
from flwr_smartsplit.verify.equivalence import example_batches
from flwr_smartsplit.verify.guard import compare, guard_trials
from flwr_smartsplit.verify.reference import call

NUM_TOKENS = 64
BATCH_SIZE = 2


@dataclass(frozen=True, slots=True)
class GuardCost:
    """What one comparison took, beside one step of the stock model."""

    num_steps: float  # In floating-point operations
    step_seconds: float
    profile_seconds: float  # Of the dry run that planning needs anyway
    seconds: float


def resnet50() -> Task:
    """Make a task of ResNet-50 at 224 x 224 pixels."""
    return Task(
        model_fn=partial(torchvision.models.resnet50, num_classes=10),
        loss_fn=nn.functional.cross_entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        example_inputs=torch.zeros(1, 3, 224, 224),
        example_targets=torch.arange(10),
    )


def decoder() -> nn.Module:
    """Build a GPT-2 of twelve layers, with untied embeddings and random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    config = GPT2Config(n_layer=12, use_cache=False, tie_word_embeddings=False)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def next_tokens(outputs: Any, targets: Tensor) -> Tensor:
    """Compute the mean loss over all tokens."""
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())


def gpt2() -> Task:
    """Make a task of the decoder."""
    tokens = torch.arange(NUM_TOKENS)[None]
    return Task(
        model_fn=decoder,
        loss_fn=next_tokens,
        optimizer_fn=partial(torch.optim.AdamW, lr=1e-4),
        example_inputs=tokens,
        example_targets=tokens,
        units_fn=decoder_units,
    )


TASKS: dict[str, Callable[[], Task]] = {"resnet50": resnet50, "gpt2": gpt2}


def measure(task: Task) -> GuardCost:
    """Take one step of the stock model, then compare."""
    started = time.perf_counter()
    profile = profile_of(task, batch_size=BATCH_SIZE)
    profiled = time.perf_counter()
    inputs, targets = example_batches(task, batch_size=BATCH_SIZE)[0]
    with torch_threads(1):
        model = task.model_fn()
        begun = time.perf_counter()
        task.loss_fn(call(model, inputs), targets).backward()
        step_seconds = time.perf_counter() - begun
        with FlopCounterMode(display=False) as step:
            task.loss_fn(call(model, inputs), targets).backward()
        trials = guard_trials(profile)
        begun = time.perf_counter()
        compare(task, trials, config={}, place="here")
        seconds = time.perf_counter() - begun
        with FlopCounterMode(display=False) as steps:
            compare(task, trials, config={}, place="here")
    return GuardCost(
        num_steps=steps.get_total_flops() / step.get_total_flops(),
        step_seconds=step_seconds,
        profile_seconds=profiled - started,
        seconds=seconds,
    )


def main(models: list[str] = typer.Argument(None)) -> None:  # noqa: B008
    """Measure some models, all by default."""
    table = Table("model", "guard, steps", "guard, s", "one step, s", "dry run, s")
    for name in models or TASKS:
        cost = measure(TASKS[name]())
        seconds = cost.seconds, cost.step_seconds, cost.profile_seconds
        table.add_row(name, f"{cost.num_steps:.1f}", *(f"{s:.2g}" for s in seconds))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
