"""The slow truth: a stock module trained in one plain loop, and a strict comparison.

Nothing here knows segments, runners or edges, so an error of theirs cannot hide in
both sides of a comparison. ``test_oracle.py`` proves that planted errors are seen.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flwr_smartsplit.train.rng import derived_seed

Batches = Iterable[tuple[Tensor, Tensor]]
Values = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """The derived streams that a stock model's random modules draw from.

    Parameters
    ----------
    seed, round_number, client_key
        As in the client's plan.
    units : Mapping[str, int]
        Index of its unit for every module that is the first to draw in a unit.
    """

    seed: int
    round_number: int
    client_key: str
    units: Mapping[str, int]

    @contextmanager
    def in_step(self, model: nn.Module, step: int) -> Iterator[None]:
        """Seed torch's generator right before each of the modules runs."""

        def seed(unit: int, *_: object) -> None:
            parts = (self.seed, self.round_number, self.client_key, step, unit)
            torch.default_generator.manual_seed(derived_seed(*parts))

        hooks = [
            model.get_submodule(name).register_forward_pre_hook(partial(seed, unit))
            for name, unit in self.units.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def train_whole(
    model: nn.Module,
    batches: Batches,
    *,
    loss_fn: Callable[..., Tensor],
    optimizer_fn: Callable[..., torch.optim.Optimizer],
    chance: Chance,
) -> Iterator[Values]:
    """Train the stock model; yield loss, gradients, buffers and parameters per step."""
    model.train()
    optimizer = optimizer_fn([p for p in model.parameters() if p.requires_grad])
    for step, (inputs, targets) in enumerate(batches):
        optimizer.zero_grad()
        with chance.in_step(model, step):
            loss = loss_fn(model(inputs), targets)
        loss.backward()
        values: Values = {"loss": loss.item()}
        values |= {
            f"gradient {name}": parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        optimizer.step()
        yield values | {
            f"state {name}": value.clone() for name, value in model.state_dict().items()
        }


@torch.no_grad()
def evaluate_whole(
    model: nn.Module, batches: Batches, *, loss_fn: Callable[..., Tensor]
) -> list[float]:
    """Evaluate the stock model; return the loss of each batch."""
    model.eval()
    return [loss_fn(model(inputs), targets).item() for inputs, targets in batches]


def compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """List every difference between two sets of values by name, to the last bit.

    Strides are not compared: they are how a tensor lies in memory, not what it is.
    """
    differences = [f"{name}: missing" for name in expected.keys() - found.keys()]
    differences += [f"{name}: unexpected" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        reason = _difference(expected[name], found[name])
        if reason:
            differences.append(f"{name}: {reason}")
    return sorted(differences)


def _difference(expected: Any, found: Any) -> str | None:
    """Say how two values differ, if they do."""
    if not (isinstance(expected, Tensor) and isinstance(found, Tensor)):
        return None if expected == found else f"{found!r} instead of {expected!r}"
    kinds = [(tuple(value.shape), value.dtype) for value in (expected, found)]
    if kinds[0] != kinds[1]:
        return f"{kinds[1]} instead of {kinds[0]}"
    if torch.equal(expected, found):
        return None
    where = expected != found
    largest = (expected.double() - found.double())[where].abs().max().item()
    return f"{int(where.sum())} of {where.numel()} differ, by up to {largest:.3g}"


def fingerprint(tensor: Tensor) -> str:
    """Stand for a tensor's shape, dtype and values where the tensor cannot travel."""
    values = tensor.detach().contiguous().reshape(-1)
    digest = hashlib.sha256(repr((tuple(tensor.shape), tensor.dtype)).encode())
    digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(values: Mapping[str, Any]) -> Values:
    """Replace every tensor by its fingerprint."""
    return {
        name: fingerprint(value) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
