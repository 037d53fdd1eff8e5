"""What is alive where: tensors decide about places, sizes travel along."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.trace.liveness import (
    as_size,
    as_tensor,
    live_places,
    read_sizes_early,
)
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.models import OPTIMIZERS


def test_places_are_where_one_value_is_alive():
    """Neither inputs, nor parameters, nor the output are places; a used value is."""

    def forward(x: Tensor) -> Tensor:
        a = x + 1
        b = a * 2
        c = b - a
        return (c * c).relu()

    places = live_places(fx.symbolic_trace(forward).graph)
    assert {node.name: place.sizes for node, place in places.items()} == {
        "add": (),
        "sub": (),
        "mul_1": (),
    }


def test_with_more_tensors_there_are_more_places():
    """What is still needed crosses, in the order it was made."""

    def forward(x: Tensor) -> Tensor:
        a = x + 1
        b = a * 2
        c = b - a
        return (c * c).relu()

    places = live_places(fx.symbolic_trace(forward).graph, 2)
    assert {n.name: [t.name for t in p.tensors] for n, p in places.items()} == {
        "add": ["add"],
        "mul": ["add", "mul"],
        "sub": ["sub"],
        "mul_1": ["mul_1"],
    }


def test_sizes_are_alive_beside_a_place():
    """A size is no second tensor, and what is computed from sizes is a size."""

    def forward(x: Tensor) -> Tensor:
        height, half = x.shape[2], x.size(3) // 2
        x = x.relu()
        x = x.sigmoid()
        return x.view(x.shape[0], height, half, -1).tanh()

    places = live_places(fx.symbolic_trace(forward).graph)
    names = {n.name: {s.name for s in place.sizes} for n, place in places.items()}
    assert names["relu"] == {"getitem", "floordiv"}
    assert names["view"] == set()


def test_a_number_that_is_read_off_values_is_no_size():
    """An item of a tensor depends on values; it must not travel as a shape."""

    def forward(x: Tensor) -> Tensor:
        top = x.max()
        return (x.relu() * top).sigmoid().tanh()

    places = live_places(fx.symbolic_trace(forward).graph)
    assert [node.name for node in places] == ["mul", "sigmoid"]


@pytest.mark.parametrize(
    "value", [0, 7, torch.Size([3, 4]), torch.Size([]), (5, 0), ()]
)
def test_a_size_survives_its_journey(value):
    """Numbers, sizes and tuples come back as what they were, in no memory."""
    carrier = as_tensor(value)
    assert carrier.untyped_storage().nbytes() == 0
    found = as_size(carrier)
    assert found == value
    assert type(found) is type(value)


class Segmenter(nn.Module):
    """Make an image as large as the one that came, from its size at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 4, 3, stride=2)
        self.classify = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        batch, _, *_ = x.shape[0], x.shape[1]
        size = x.shape[-2:]
        x = functional.relu(self.norm(self.down(x)))
        x = self.classify(torch.tanh(self.deep(x)))
        x = functional.interpolate(x, size=size, mode="bilinear")
        return {"out": x.view(batch, 5, -1)}


def pixel_loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs["out"], targets.flatten(1))


def segmentation(optimizer: str) -> Task:
    return Task(
        model_fn=Segmenter,
        loss_fn=pixel_loss,
        optimizer_fn=OPTIMIZERS[optimizer],
        example_inputs=torch.zeros(1, 3, 13, 17),
        example_targets=torch.arange(5).repeat(1, 13, 4)[:, :, :17],
    )


def test_sizes_cross_the_wire_and_change_nothing():
    """A segmentation network cuts anywhere, at every batch size, to the byte."""
    task = segmentation("adam")
    with RouteChecker(task, example_batches(task, batch_size=4)) as checker:
        chain = checker.chain
        assert chain.unit_names == (
            "down",
            "norm",
            "relu",
            "deep",
            "tanh",
            "classify",
            "interpolate",
            "view",
        )
        profile = profile_chain(chain, batch_size=4, task=task)
        for cut in range(1, len(chain)):
            found = checker.check(Route.split(cut))
            assert found.differences == ()
            predicted = predicted_peak_bytes(profile, Route.split(cut))
            assert predicted == found.measured_peak_bytes


def late_reader(x: Tensor) -> Tensor:
    y = x.relu().sigmoid()
    return functional.interpolate(y, size=x.shape[-2:])


def test_a_shape_is_read_before_its_tensor_is_gone():
    """The input need not stay for its size."""
    graph = fx.symbolic_trace(late_reader).graph
    assert list(live_places(graph)) == []
    read_sizes_early(graph)
    assert [node.name for node in live_places(graph)] == ["relu", "sigmoid"]


class Skips(nn.Module):
    """The first value is needed until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.third(self.second(first).relu()) + first


def test_a_model_without_a_place_says_what_is_in_the_way():
    """The value that stays alive is named."""
    chain = Chain.from_module(Skips(), torch.zeros(1, 4))
    assert chain.unit_names == ("first", "third")
    block = Skips()
    block.first = nn.Identity()
    with pytest.raises(NotSplittable, match=r"cannot be cut anywhere: first: "):
        Chain.from_module(block, torch.zeros(1, 4)).require_cuts()


def test_a_lost_size_would_be_seen(monkeypatch):
    """A size that arrives changed changes the model's outputs."""

    def shrunk(carrier: Tensor) -> object:
        size = as_size(carrier)
        return size if isinstance(size, int) else torch.Size([size[0], size[1] - 1])

    monkeypatch.setattr("flwr_smartsplit.split.trace.subgraphs.as_size", shrunk)
    model = Segmenter()
    chain = Chain.from_module(model, torch.zeros(1, 3, 13, 17))
    out = chain.segment(0, len(chain))(torch.zeros(2, 3, 13, 17))["out"]
    assert out.shape != model(torch.zeros(2, 3, 13, 17))["out"].shape
