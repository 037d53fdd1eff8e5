"""Narrower modules: real ones, with the model's values, names and layouts."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from flwr_smartsplit import Variant, narrowed
from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.narrow.channels import find_channels
from flwr_smartsplit.split.narrow.narrowing import narrowed_module
from flwr_smartsplit.split.template import parameters_on_meta
from flwr_smartsplit.types import ChannelGroup, width_of
from simulations.experiments.models import digits_network
from tests.split.narrow.masks import TOLERANCE, difference
from tests.tasks import TASK, tiny_cnn

COLOUR = torch.zeros(1, 3, 32, 32)
MODELS: dict[str, tuple[Any, torch.Tensor, int, float]] = {
    "digits": (digits_network, torch.zeros(1, 1, 8, 8), 3, 0.271),
    "resnet18": (torchvision.models.resnet18, COLOUR, 12, 0.251),
    "vgg11_bn": (torchvision.models.vgg11_bn, COLOUR, 10, 0.250),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, COLOUR, 27, 0.264),
    "densenet121": (torchvision.models.densenet121, COLOUR, 58, 0.555),
}
SLOW = {"vgg11_bn", "densenet121"}
"""How many groups each has, and which share of the parameters is left at width 0.5."""


def model_of(name: str) -> nn.Module:
    """Build a model, always with the same values."""
    make = MODELS[name][0]
    torch.manual_seed(0)
    model: nn.Module = make(num_classes=10)
    for norm in model.modules():  # As training leaves them.
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, std=0.1)  # type: ignore[arg-type]
    return model.eval()


def drawn(groups: tuple[ChannelGroup, ...], rng: np.random.Generator) -> Variant:
    """Keep six of ten channels, anywhere, in whole runs."""
    kept = {}
    for group in groups:
        num_runs = group.size // group.multiple
        runs = np.sort(rng.choice(num_runs, max(1, int(0.6 * num_runs)), replace=False))
        channels = runs[:, None] * group.multiple + np.arange(group.multiple)
        kept[group.name] = tuple(channels.reshape(-1).tolist())
    return Variant("drawn", kept)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MODELS],
)
def test_a_narrow_model_is_the_masked_one(name: str) -> None:
    """With all channels the same bits; wrong ones are seen."""
    _, example, num_groups, share = MODELS[name]
    model = model_of(name)
    groups = find_channels(model, example).groups
    assert len(groups) == num_groups
    inputs = torch.randn(2, *example.shape[1:])
    everything = Variant("all", {g.name: tuple(range(g.size)) for g in groups})
    assert torch.equal(
        model(inputs), narrowed_module(model, groups, everything)(inputs)
    )
    half = narrowed_module(model, groups, width_of(groups, 0.5))
    sizes = [sum(p.numel() for p in each.parameters()) for each in (half, model)]
    assert sizes[0] / sizes[1] == pytest.approx(share, abs=0.001)
    half.train()(inputs).sum().backward()
    variant = drawn(groups, np.random.default_rng(0))
    assert difference(model, groups, variant, example) < TOLERANCE


def test_wrong_indices_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: what a layer reads is cut one channel further."""
    from flwr_smartsplit.split.narrow import narrowing  # noqa: PLC0415

    model = model_of("resnet18")
    groups = find_channels(model, COLOUR).groups
    variant = drawn(groups, np.random.default_rng(0))
    true = narrowing.regions_of

    def shifted(*args: Any) -> Any:
        regions = dict(true(*args))
        first = regions["layer1.0.conv2.weight"]
        regions["layer1.0.conv2.weight"] = (first[0], np.maximum(first[1] - 1, 0))
        return regions

    monkeypatch.setattr(narrowing, "regions_of", shifted)
    assert difference(model, groups, variant, COLOUR) > 100 * TOLERANCE


def test_a_template_without_values_is_narrowed_alike() -> None:
    """On meta, as chains are; shapes are those of the real one."""
    groups = find_channels(tiny_cnn(), TASK.example_inputs).groups
    variant = width_of(groups, 0.5)
    with parameters_on_meta():
        hollow = tiny_cnn()
    small = narrowed_module(hollow, groups, variant)
    assert all(parameter.is_meta for parameter in small.parameters())
    real = narrowed_module(tiny_cnn(), groups, variant)
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (small, real)]
    assert shapes[0] == shapes[1]
    assert find_channels(hollow, TASK.example_inputs).groups == groups


def test_layouts_and_attributes_of_parameters_stay() -> None:
    """A place builds tensors like the template's."""
    model = tiny_cnn().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model[4].weight.note = "mine"
    model[4].weight.requires_grad_(False)
    groups = find_channels(model, TASK.example_inputs).groups
    weight = narrowed_module(model, groups, width_of(groups, 0.5))[4].weight  # type: ignore[index]
    assert weight.shape == (3, 2, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert weight.note == "mine"
    assert not weight.requires_grad


def test_layers_know_their_sizes() -> None:
    """As they print."""
    small = str(narrowed(model_of("digits"), 0.5, torch.zeros(1, 1, 8, 8)))
    assert "Conv2d(16, 20, kernel_size=(3, 3)" in small
    assert "GroupNorm(4, 20, eps=1e-05" in small
    assert "Linear(in_features=128, out_features=10, bias=True)" in small


# --- the scaler -----------------------------------------------------------------------


def without_norms() -> nn.Sequential:
    """Build a model in which a norm follows the second layer only."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 2, 1),
    )


def test_outputs_that_nothing_normalises_are_scaled_in_training() -> None:
    """HeteroFL's scaler: by the inverse of the share, and not in evaluation."""
    model = without_norms()
    groups = find_channels(model, COLOUR).groups
    variant = width_of(groups, 0.25, is_scaled=True)
    plain = narrowed_module(model, groups, width_of(groups, 0.25))
    scaled = narrowed_module(model, groups, variant)
    inputs = torch.randn(2, 3, 4, 4)
    assert torch.equal(scaled.eval()(inputs), plain.eval()(inputs))
    plain.train()
    scaled.train()
    for index, factor in ((0, 4.0), (2, 1.0), (4, 1.0)):
        given = torch.randn(2, scaled[index].in_channels, 4, 4)  # type: ignore[index, union-attr]
        expected = factor * plain[index](given)  # type: ignore[index]
        assert torch.equal(scaled[index](given), expected)  # type: ignore[index]
    assert torch.equal(
        pickle.loads(pickle.dumps(scaled.eval()))(inputs), scaled(inputs)
    )


# --- for who exports ------------------------------------------------------------------


def test_a_trained_model_is_exported_narrow() -> None:
    """By a width, or by the variant of a plan."""
    model = tiny_cnn().eval()
    groups = build_chain(TASK).channels.groups
    one = narrowed(model, 0.5, TASK.example_inputs)
    other = narrowed(model, width_of(groups, 0.5), TASK.example_inputs)
    for mine, theirs in zip(
        one.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    same = narrowed(model, 1, TASK.example_inputs)
    inputs = torch.randn(2, 1, 6, 6)
    assert torch.equal(same(inputs), model(inputs))
    assert model[0].out_channels == 4


@pytest.mark.parametrize(
    ("variant", "error", "message"),
    [
        (0.0, ValueError, r"a width is 0\.0: give a share"),
        (Variant("v", {"9.weight": (0,)}), InvalidTask, "no channel group '9.weight'"),
        (Variant("v", {"0.weight": (9,)}), InvalidTask, "'0.weight' has 4 channels"),
    ],
)
def test_what_is_no_variant_of_a_model_is_refused(
    variant: Any, error: type[Exception], message: str
) -> None:
    """With the reason."""
    with pytest.raises(error, match=message):
        narrowed(tiny_cnn(), variant, TASK.example_inputs)
    with pytest.raises(NotSplittable, match="cannot be narrowed"):
        narrowed(nn.Linear(4, 2), 0.5, torch.zeros(1, 4))
