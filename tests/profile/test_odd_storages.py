"""Results whose memory is not what their shape says: sparse, or with room to spare."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit import Route, Task, predicted_peak_bytes, profile_chain
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.profile import optimizer_memory
from flwr_smartsplit.split import fake_tensors
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches

BATCH_SIZE = 4
SGD = partial(torch.optim.SGD, lr=0.1)
IMAGES, TOKENS = torch.zeros(2, 3, 8, 8), torch.arange(24).view(4, 6)


class Unfolded(nn.Module):
    """Patches of an image as columns."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.first, self.unfold = nn.Conv2d(3, 4, 3, padding=1), nn.Unfold(3, **how)
        size = self.unfold(torch.zeros(1, 4, 8, 8)).numel()
        self.middle, self.last = nn.Linear(size, 16), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Look at all patches."""
        columns = self.unfold(torch.tanh(self.first(images))).flatten(1)
        outputs: Tensor = self.last(self.middle(columns).relu())
        return outputs


class Folded(nn.Module):
    """Columns as an image that they overlap in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fold = nn.Conv2d(3, 18, 3), nn.Fold((8, 8), 3)
        self.last = nn.Linear(128, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Put patches together."""
        columns = self.first(images).flatten(2)
        outputs: Tensor = self.last(torch.tanh(self.fold(columns)).flatten(1))
        return outputs


class Tokens(nn.Module):
    """The mean of embeddings."""

    def __init__(self, *, size: int = 30, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(size, width, sparse=True)
        self.middle, self.last = nn.Linear(width, 16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score a sentence."""
        values = self.embed(tokens).mean(1)
        outputs: Tensor = self.last(self.middle(values).relu())
        return outputs


class Bags(nn.Module):
    """Bags of embeddings."""

    def __init__(self, mode: str, **how: Any) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(200, 16, mode=mode, **how)
        self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score a bag of words."""
        outputs: Tensor = self.last(self.middle(self.embed(tokens)).relu())
        return outputs


class OffsetBags(Bags):
    """The same, from a flat list and where bags begin and end."""

    def __init__(self, mode: str) -> None:
        super().__init__(mode, include_last_offset=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score a bag of words."""
        offsets = torch.arange(0, tokens.numel() + 1, tokens.shape[1])
        values = self.embed(tokens.flatten(), offsets)
        outputs: Tensor = self.last(self.middle(values).relu())
        return outputs


CASES: dict[str, tuple[Any, Tensor]] = {
    "unfold": (Unfolded, IMAGES),
    "unfold with strides": (partial(Unfolded, stride=3), IMAGES),
    "fold": (Folded, IMAGES),
    "few tokens": (Tokens, TOKENS),
    "sparse bags": (partial(Bags, "sum", sparse=True), TOKENS),
    "means of bags": (partial(Bags, "mean"), TOKENS),
    "maxima of bags": (partial(Bags, "max"), TOKENS),
    "bags with padding": (partial(Bags, "sum", padding_idx=3), TOKENS),
    "bags with an end": (partial(OffsetBags, "mean"), TOKENS),
    "many tokens": (partial(Tokens, size=2000, width=64), TOKENS),
}


def task(name: str, optimizer_fn: Any = SGD) -> Task:
    """Make a classification task."""
    model_fn, inputs = CASES[name]
    return Task(
        model_fn=model_fn,
        loss_fn=functional.cross_entropy,
        optimizer_fn=optimizer_fn,
        example_inputs=inputs,
        example_targets=torch.arange(3),
    )


def errors(each: Task) -> list[int]:
    """Compare every cut: by how much the prediction is too high."""
    chain = build_chain(each)
    profile = profile_chain(chain, batch_size=BATCH_SIZE, task=each)
    routes = [Route.whole(), *map(Route.split, range(1, len(chain)))]
    found = []
    with RouteChecker(each, example_batches(each, batch_size=BATCH_SIZE)) as checker:
        for route in routes:
            check = checker.check(route)
            assert check.differences == ()
            predicted = predicted_peak_bytes(profile, route)
            found.append(predicted - check.measured_peak_bytes)
    return found


@pytest.mark.every(4)
@pytest.mark.parametrize("name", CASES)
def test_peaks_are_predicted_to_the_byte(name: str) -> None:
    assert set(errors(task(name))) == {0}


def test_a_result_without_room_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: storages as the shapes say."""
    monkeypatch.setattr(fake_tensors, "_LIKE_INPUT", set())
    assert min(errors(task("unfold"))) < 0


def test_an_index_without_room_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: bags whose lists are as long as they say."""
    monkeypatch.setattr(fake_tensors, "_BAGS", set())
    assert min(errors(task("means of bags"))) < 0


def test_a_sparse_gradient_without_parts_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: torch's own sparse fakes."""
    monkeypatch.setattr(fake_tensors, "is_sparse_fake", lambda _: False)
    monkeypatch.setattr(optimizer_memory, "_gradient", lambda x, **_: x.detach())
    assert min(errors(task("many tokens"))) < 0


@pytest.mark.parametrize(
    "optimizer_fn",
    [partial(SGD, momentum=0.9), partial(SGD, momentum=0.9, nesterov=True)],
    ids=["momentum", "nesterov"],
)
def test_a_state_that_grows_in_each_step_is_refused(optimizer_fn: Any) -> None:
    each = task("few tokens", optimizer_fn)
    with pytest.raises(InvalidTask, match=r"SGD keeps a sparse state.*sparse=False"):
        profile_chain(build_chain(each), batch_size=BATCH_SIZE, task=each)


def test_sparse_gradients_are_not_accumulated() -> None:
    each = task("few tokens")
    object.__setattr__(each, "accumulate", 2)
    with pytest.raises(InvalidTask, match=r"embed.weight are sparse.*sparse=False"):
        profile_chain(build_chain(each), batch_size=BATCH_SIZE, task=each)
