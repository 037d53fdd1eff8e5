"""Channels put back: the stock model computes what the narrow one does."""

import copy
from functools import partial

import pytest
import torch
import torchvision

from flwr_smartsplit import Variant, grown, narrowed
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.plan.variants.pruning import pruned
from flwr_smartsplit.split.build import state_of
from flwr_smartsplit.split.narrow.channels import find_channels

MODELS = {
    "resnet18": partial(torchvision.models.resnet18, num_classes=10),
    "vgg11_bn": partial(torchvision.models.vgg11_bn, num_classes=10),
    "mobilenet": partial(torchvision.models.mobilenet_v3_small, num_classes=10),
}
EXAMPLE = torch.zeros(1, 3, 32, 32)


def trained_like(model: torch.nn.Module) -> torch.nn.Module:
    """Give its normalisations statistics that are not the first ones."""
    chance = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0, generator=chance)
        elif name.endswith("running_mean"):
            buffer.normal_(generator=chance)
    return model


@pytest.mark.parametrize(
    "name",
    ["resnet18", *(pytest.param(n, marks=pytest.mark.slow) for n in [*MODELS][1:])],
)
def test_a_pruned_model_is_grown(name: str) -> None:
    """To 1e-4 of the largest output; planted: readers that are not silent."""
    torch.manual_seed(0)
    model = trained_like(MODELS[name]())
    groups = find_channels(model, EXAMPLE).groups
    state, names = state_of(model), dict(model.named_parameters())
    variant = pruned(groups, 0.5, state, parameters=names, ranks=None)
    small = narrowed(model, variant, EXAMPLE).eval()
    stock, inputs = MODELS[name]().eval(), torch.randn(2, 3, 32, 32)
    arrays = grown(small.state_dict(), variant, stock, EXAMPLE)
    stock.load_state_dict(arrays)
    with torch.no_grad():
        wanted = small(inputs)
        assert _error(stock(inputs), wanted) < 1e-4
        mixed = copy.deepcopy(stock)
        for key, value in mixed.state_dict().items():
            value[value == 0] = model.state_dict()[key][value == 0]
        assert _error(mixed.eval()(inputs), wanted) > 1e-2


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_what_is_not_of_the_variant_is_refused() -> None:
    """Another variant, other names, other shapes."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 3))
    variant = Variant("two", {"0.weight": (0, 2)})
    state = narrowed(model, variant, EXAMPLE).state_dict()
    assert set(grown(state, variant, model, EXAMPLE)) == set(state)
    with pytest.raises(InvalidTask, match="no channel group"):
        grown(state, Variant("two", {"9.weight": (0,)}), model, EXAMPLE)
    with pytest.raises(InvalidTask, match=r"0\.weight is .*2, 3.*3, 3"):
        grown(state, Variant("three", {"0.weight": (0, 1, 2)}), model, EXAMPLE)
    del state["1.bias"]
    with pytest.raises(InvalidTask, match=r"differ in 1\.bias"):
        grown(state, variant, model, EXAMPLE)
