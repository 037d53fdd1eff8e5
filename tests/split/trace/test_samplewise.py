"""A unit counts as samplewise only if slices of a batch give what the batch gives.

What the reader of graphs allows is checked with numbers, on torchvision's models and
operation by operation; what mixes samples is refused, and the numbers see it too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import spectral_norm

from flwr_smartsplit.plan.slicing import deepest_sliced_cut
from flwr_smartsplit.split.build import materialise, parameters_on_meta
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Segment, Unit, as_boundary, run_unit

NUM_SAMPLES = 5
SLICES = (2, 2, 1)  # The last is smaller, and a single sample.


def error_of_slices(unit: Unit, segment: Segment, value: Tensor) -> float:
    """Run a unit on a batch and on its slices; compare results and gradients."""
    chance = torch.Generator().manual_seed(0)

    def run(inputs: Tensor) -> Tensor:
        output: Tensor = as_boundary(run_unit(unit.forward_in(True), segment, inputs))[
            0
        ]
        return output

    def gradient_of(inputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        leaf = inputs.clone().requires_grad_()
        output = run(leaf.view_as(leaf))  # An in-place unit may write into that.
        (gradient,) = torch.autograd.grad((output * weights).sum(), leaf)
        return output.detach(), gradient

    with torch.no_grad():
        weights = torch.randn(run(value.clone()).shape, generator=chance).double()
    whole = gradient_of(value, weights)
    parts = [
        gradient_of(part, weight)
        for part, weight in zip(value.split(SLICES), weights.split(SLICES), strict=True)
    ]
    return max(
        float((torch.cat(found) - expected).abs().max() / expected.abs().max())
        for found, expected in zip(zip(*parts, strict=True), whole, strict=True)
    )


@dataclass(frozen=True)
class Case:
    """A model, how much of it is run, and the last cut whose front can be sliced."""

    build: Callable[[], nn.Module]
    num_units: int
    deepest: int
    num_apart: int
    num_pixels: int = 32


def vit() -> nn.Module:
    """Build a transformer with a class token, small."""
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
    )


MODELS = {
    "alexnet": Case(torchvision.models.alexnet, 11, 10, 10, 64),
    "vgg11": Case(torchvision.models.vgg11, 8, 16, 8),
    "squeezenet": Case(torchvision.models.squeezenet1_1, 20, 20, 20),
    "convnext": Case(torchvision.models.convnext_tiny, 5, 3, 3),
    "vit": Case(vit, 7, 12, 6),
    "resnet18": Case(torchvision.models.resnet18, 14, 1, 5),
    "mobilenet": Case(torchvision.models.mobilenet_v3_small, 20, 1, 11),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_what_counts_as_samplewise_is(case: Case) -> None:
    """In float64 a slice gives the batch's numbers and gradients to 1e-12."""
    with parameters_on_meta():
        model = case.build().double()
    shape = (3, case.num_pixels, case.num_pixels)
    chain = Chain.from_module(model, torch.zeros(1, *shape, dtype=torch.float64))
    assert deepest_sliced_cut([u.is_samplewise for u in chain.units]) == case.deepest
    chance = np.random.default_rng(0)
    state = {
        name: chance.standard_normal(tuple(tensor.shape)) * 0.1
        for name, tensor in chain.segment(0, case.num_units).state_dict().items()
    }
    segment = materialise(chain, 0, case.num_units, state).train()
    values: list[Any] = [torch.randn(NUM_SAMPLES, *shape, dtype=torch.float64)]
    with torch.no_grad():
        segment(values[0].clone(), observe=lambda _, value: values.append(value))
    tried = 0
    for unit, value in zip(chain.units, values[:-1], strict=False):
        if not unit.is_samplewise or not isinstance(value, Tensor):
            continue  # Sizes come along, which are those of the whole batch.
        tried += 1
        assert error_of_slices(unit, segment, value) < 1e-12, unit.name
    assert tried == case.num_apart


class Between(nn.Module):
    """A convolution, then something; an end, so that there are two units."""

    def __init__(self, middle: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.middle = middle if isinstance(middle, nn.Module) else None
        self.function = middle
        self.token = nn.Parameter(torch.randn(1, 4, 1, 6))
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.middle(x) if self.middle is not None else self.function(self, x)
        return torch.tanh(x) * 2


def verdict(middle: Any) -> tuple[bool, float]:
    """Read the network; say whether all is samplewise, and how far slices are off."""
    torch.manual_seed(3)
    model = Between(middle).double().train()
    inputs = torch.randn(NUM_SAMPLES, 2, 6, 6, dtype=torch.float64)
    chain = Chain.from_module(model, inputs[:1])
    whole = Unit("", lambda root, x: model(x), ())
    try:
        error = error_of_slices(whole, chain.segment(0, len(chain)), inputs)
    except RuntimeError:  # It does not run on a slice at all.
        error = float("inf")
    return all(unit.is_samplewise for unit in chain.units), error


def affine_group_norm() -> nn.Module:
    """Make a norm within each sample."""
    return nn.GroupNorm(2, 4)


APART: dict[str, Any] = {
    "relu in place": nn.ReLU(inplace=True),
    "group norm": affine_group_norm(),
    "layer norm": nn.LayerNorm(6),
    "instance norm": nn.InstanceNorm2d(4),
    "pooling": nn.MaxPool2d(2),
    "adaptive pooling": nn.AdaptiveAvgPool2d(1),
    "flatten": nn.Flatten(),
    "upsample": nn.Upsample(scale_factor=2),
    "softmax": nn.Softmax(dim=-1),
    "dropout that keeps all": nn.Dropout(0.0),
    "view": lambda m, x: x.view(x.size(0), -1),
    "view by shape": lambda m, x: x.view(x.shape[0], x.shape[1], -1),
    "view of known size": lambda m, x: x.view(-1, 4 * 36),
    "torch.flatten": lambda m, x: torch.flatten(x, 1),
    "mean": lambda m, x: x.mean((2, 3)),
    "mean, negative": lambda m, x: x - x.mean(-1, keepdim=True),
    "functional softmax": lambda m, x: functional.softmax(x, dim=1),
    "index": lambda m, x: x[:, 1:3],
    "chunks": lambda m, x: torch.cat([x.chunk(2, 1)[1], x.chunk(2, dim=1)[0]], dim=1),
    "stack": lambda m, x: torch.stack([x, x * 2], dim=1),
    "permute": lambda m, x: x.permute(0, 2, 3, 1),
    "transpose": lambda m, x: x.transpose(1, -1),
    "unsqueeze": lambda m, x: x.unsqueeze(1).squeeze(1),
    "residual": lambda m, x: x + functional.gelu(x),
    "matrix": lambda m, x: x @ m.matrix,
    "batched matrix": lambda m, x: x @ x.transpose(-1, -2),
    "broadcast": lambda m, x: x * m.token + m.matrix,
    "token": lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1, -1), x], 2),
    "linear": lambda m, x: functional.linear(x, m.matrix),
    "attention": lambda m, x: functional.scaled_dot_product_attention(x, x, x),
    "normalize": lambda m, x: functional.normalize(x, dim=1),
    "pad": lambda m, x: functional.pad(x, (1, 1)),
    "interpolate": lambda m, x: functional.interpolate(x, scale_factor=2.0),
}


@pytest.mark.parametrize("middle", APART.values(), ids=APART)
def test_what_keeps_samples_apart_is_found(middle: Any) -> None:
    """And the numbers agree."""
    is_apart, error = verdict(middle)
    assert is_apart
    assert error < 1e-12


class Rolled(nn.Conv2d):
    """A subclass of something known may do anything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(1, 0)


def shuffled(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    """Turn a batch around, as a hook."""
    return output.flip(0)


def hooked() -> nn.Module:
    """Make a module whose hook does it."""
    module = nn.ReLU()
    module.register_forward_hook(shuffled)
    return module


MIXING: dict[str, Any] = {
    "batch norm": nn.BatchNorm2d(4),
    "subclass": Rolled(4, 4, 1),
    "hook": hooked(),
    "flatten from 0": nn.Flatten(0),
    "flatten from -4": nn.Flatten(-4),
    "softmax along 0": nn.Softmax(dim=0),
    "tracking instance norm": nn.InstanceNorm2d(4, track_running_stats=True).train(),
    "mean along 0": lambda m, x: x - x.mean(0),
    "mean along all": lambda m, x: x - x.mean(),
    "mean along -4": lambda m, x: x - x.mean((-4, 1), keepdim=True),
    "sum kept": lambda m, x: x + x.sum(dim=0, keepdim=True),
    "largest": lambda m, x: x / x.amax(),
    "functional softmax": lambda m, x: functional.softmax(x, 0),
    "sum along 0 by name": lambda m, x: x + torch.cumsum(x, dim=0),
    "flip": lambda m, x: x.flip(0),
    "roll": lambda m, x: torch.roll(x, 1, 0),
    "divided by the batch": lambda m, x: x / x.shape[0],
    "divided by its length": lambda m, x: x / x.size(0),
    "moved by the batch": lambda m, x: x[:, : x.shape[0] % 4 + 1].sum(1),
    "samples in rows": lambda m, x: x.reshape(-1, 6) - x.reshape(-1, 6).mean(0),
    "samples joined": lambda m, x: torch.cat([x, x.flip(0)]).mean(0) + x,
    "transposed": lambda m, x: functional.softmax(x.transpose(0, 1), 1).transpose(0, 1),
    "permuted": lambda m, x: nn.functional.relu(x.permute(1, 0, 2, 3)).mean(1),
    "all layer norm": lambda m, x: functional.layer_norm(x, x.shape),
    "functional batch norm": lambda m, x: functional.batch_norm(
        x, None, None, training=True
    ),
    "matrix of samples": lambda m, x: x.mean((2, 3)) @ x.mean((2, 3)).t(),
    "first of all": lambda m, x: x + x[0],
    "all but one": lambda m, x: x * x[1:].mean(),
    "normalized along 0": lambda m, x: functional.normalize(x, dim=0),
}


@pytest.mark.parametrize("middle", MIXING.values(), ids=MIXING)
def test_what_mixes_samples_is_refused(middle: Any) -> None:
    """And the numbers see it, unless it writes buffers only."""
    is_apart, error = verdict(middle)
    assert not is_apart
    assert not error < 1e-6 or getattr(middle, "track_running_stats", False)


def units_of(model: nn.Module, inputs: Tensor) -> list[bool]:
    """Read a model; say of each unit whether it is samplewise."""
    return [unit.is_samplewise for unit in Chain.from_module(model, inputs).units]


def test_a_unit_that_draws_is_refused() -> None:
    """The mask of a slice would be another one."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4))
    assert units_of(model, torch.zeros(1, 4)) == [True, False, True]


def test_a_module_that_changes_itself_in_forward_is_refused() -> None:
    """A front runs twice, so its power iteration would go on twice as fast."""
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert units_of(model, torch.zeros(1, 4)) == [False, True]


class WritesItsInput(nn.Module):
    """Adds one to the batch, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x.add_(1)))
        return result


def test_a_unit_that_writes_into_the_batch_is_refused() -> None:
    """Run twice, it would add two."""
    assert units_of(WritesItsInput(), torch.zeros(1, 4)) == [False, True]


def test_an_example_without_a_batch_dimension_is_not_a_batch() -> None:
    """A convolution reads (channels, height, width) as one sample."""
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    assert not any(units_of(model, torch.zeros(2, 4, 4))[:2])


@pytest.mark.parametrize(
    "table",
    [
        nn.Embedding(8, 4, max_norm=1.0),
        nn.Embedding(8, 4, scale_grad_by_freq=True),
        nn.Embedding(8, 4, sparse=True),
    ],
)
def test_an_embedding_that_looks_at_the_batch_is_refused(table: nn.Module) -> None:
    """A plain one looks up each token alone."""
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert units_of(nn.Sequential(table, nn.Linear(4, 2)), tokens) == [False, True]
    plain = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2))
    assert units_of(plain, tokens) == [True, True]


def test_listed_units_are_what_they_are_said_to_be() -> None:
    """A joined unit is samplewise if all of its units are."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def unit(index: str, is_samplewise: bool) -> Unit:
        run = partial(_run_child, index)
        return Unit(index, run, (index,), is_samplewise=is_samplewise)

    for second in (True, False):
        units = [unit("0", True), unit("1", second), unit("2", True)]
        chain = Chain.from_units(model, units, torch.zeros(1, 4))
        assert [u.is_samplewise for u in chain.units] == [True, second, True]


def _run_child(index: str, root: nn.Module, x: Tensor) -> Any:
    return root.get_submodule(index)(x)
