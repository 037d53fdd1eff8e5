"""A device notices an edge that hijacks training, and accuses no honest one.

The runs go through the public API. ``python -m simulations run leakage`` counts over
many seeds; here are one of each kind, and planted errors in the check itself.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import Route, Task
from flwr_smartsplit.device import gradient_check
from flwr_smartsplit.device.gradient_check import GradientCheck
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.split.build import state_of
from simulations.attacks.hijacking import Hijacker, forging_edge
from tests.flower.apps import Run, make_client, message_app, run, smart_split
from tests.tasks import differences

NUM_EXAMPLES, BATCH_SIZE, CUT = 224, 16, 3


def network(*, frozen: bool = False) -> nn.Sequential:
    """Build a network with BatchNorm and dropout on both sides of the cut."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(144, 10),
    )
    model[0].requires_grad_(not frozen)
    return model


TASK = Task(
    model_fn=network,
    loss_fn=nn.functional.cross_entropy,
    optimizer_fn=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    example_inputs=torch.zeros(1, 1, 8, 8),
    example_targets=torch.zeros(1, dtype=torch.int64),
)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Load the digits."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(found.target)


def loader(labels: Callable[[Tensor], Tensor] = lambda y: y) -> DataLoader[Any]:
    """Load the client's images."""
    images, classes = (each[:NUM_EXAMPLES] for each in digits())
    dataset = TensorDataset(images, labels(classes))
    return DataLoader(dataset, BATCH_SIZE, shuffle=True)


def hijacker() -> Edge:
    """Make an edge that hijacks with images that are not the client's."""
    return forging_edge(Hijacker(digits()[0][900:], 8 * 8 * 8, seed=0))


def trained(edge: Edge, *, task: Task = TASK, **changes: Any) -> Run:
    """Run two rounds of one client through the public API."""
    torch.manual_seed(3)
    arrays = to_array_record(state_of(task.model_fn()))
    own = {"check_gradients": True, "train_loader": loader(), **changes.pop("own", {})}
    app = message_app(0, task=task, edges=(edge,), **own)
    facts = {"choose_route": lambda request: Route.split(CUT), "min_train_nodes": 1}
    changes = {**facts, "min_available_nodes": 1, **changes}
    return run([app], smart_split((edge,), task=task, **changes), arrays=arrays)


HONEST: dict[str, dict[str, Any]] = {
    "as it is": {},
    "labels on the device": {"choose_route": lambda request: Route.u_shape(CUT, 8)},
    "a frozen front": {"task": replace(TASK, model_fn=partial(network, frozen=True))},
    "nothing but a frozen front": {
        "task": replace(TASK, model_fn=partial(network, frozen=True)),
        "choose_route": lambda request: Route.split(1),
    },
    "micro-batches": {"task": replace(TASK, accumulate=2)},
    "clipped": {"task": replace(TASK, max_gradient_norm=0.5)},
    "two classes": {"own": {"train_loader": loader(lambda y: y % 2)}},
    "wrong labels": {
        "own": {"train_loader": loader(lambda y: y[torch.randperm(len(y))])}
    },
}


@pytest.mark.every(4)
@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_edge_is_not_accused_and_nothing_changes(kind: str) -> None:
    """All rounds merge, with the bits of a run without the check."""
    made = trained(LocalEdge(), **HONEST[kind])
    assert made.kinds() == []
    own = {**HONEST[kind].get("own", {}), "check_gradients": False}
    plain = trained(LocalEdge(), **{**HONEST[kind], "own": own})
    assert differences(made.state, plain.state) == []


def noise(boundary: Tensor) -> Tensor:
    """Return what no loss has made."""
    return torch.randn(boundary.shape, generator=torch.Generator().manual_seed(1))


FORGERS: dict[str, Callable[[], Edge]] = {
    "hijacked": hijacker,
    "noise": lambda: forging_edge(noise),
    "one direction for all": lambda: forging_edge(lambda z: noise(z[:1]) + 0 * z),
    "away from the boundary": lambda: forging_edge(lambda z: 1e-4 * z),
}


@pytest.mark.parametrize(
    ("forger", "kind"),
    [*((forger, "as it is") for forger in FORGERS)]
    + [("hijacked", kind) for kind in ("labels on the device", "micro-batches")],
)
def test_gradients_that_ignore_the_labels_are_noticed(forger: str, kind: str) -> None:
    """Nothing of the client is merged, and the cause says why, in both rounds."""
    rows: list[Any] = []
    with pytest.raises(SmartSplitError, match="not those of a loss of the labels"):
        trained(FORGERS[forger](), on_row=[rows.append], **HONEST[kind])
    clients = [row for row in rows if row["kind"] == "client"]
    assert [row["status"] for row in clients] == ["edge_failed"] * 2
    # Once suspect, it is sent nothing at all.
    assert clients[0]["num_steps"] > 0
    assert clients[1]["num_steps"] == clients[1]["edge_bytes_up"] == 0


def test_without_the_check_nobody_notices() -> None:
    """The same run is merged, so the check is what notices."""
    made = trained(hijacker(), own={"check_gradients": False})
    assert made.kinds() == []


# --- the check itself -----------------------------------------------------------------


def rated(*, is_mixed: bool = False, num_batches: int = 12) -> GradientCheck:
    """Rate the gradients of an honest loss; if mixed, against labels of others."""
    images, classes = digits()
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    check = GradientCheck("e", torch.zeros(1, dtype=torch.int64), {}, client="c")
    for batch in range(num_batches):
        part = slice(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE)
        boundary = images[part].clone().requires_grad_()
        nn.functional.cross_entropy(tail(boundary), classes[part]).backward()
        assert boundary.grad is not None
        order = torch.randperm(BATCH_SIZE) if is_mixed else torch.arange(BATCH_SIZE)
        labels = classes[part][order]
        check.sent((boundary.detach(),), labels)
        check.came((boundary.grad,))
        check.judge()
    return check


def test_planted_errors_in_the_check_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of other examples, or a bound that none reaches, accuse an honest edge."""
    rated()
    with pytest.raises(SmartSplitError, match="over the last"):
        rated(is_mixed=True)
    monkeypatch.setattr(gradient_check, "LEAST_DEPENDENCE", 1.5)
    with pytest.raises(SmartSplitError, match="over the last 8 batches"):
        rated()


def test_a_round_in_which_nothing_could_be_said_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client with one class alone learns that its edge was not checked."""
    made = trained(LocalEdge(), own={"train_loader": loader(lambda y: 0 * y)})
    assert made.kinds() == []
    assert "could not check edge 'edge'" in caplog.text


@pytest.mark.parametrize("targets", [torch.zeros(2), torch.zeros(2, 3).long(), None])
def test_other_targets_are_refused_at_the_start(targets: Any) -> None:
    """Only one class for each example can be checked."""
    task = replace(TASK, example_targets=targets)
    with pytest.raises(InvalidTask, match="one class for each example"):
        make_client(0, task=task, train_loader=loader(), check_gradients=True)
