"""Whole federated runs of gated models that nobody here wrote, with ``Packed``.

Each is the run without a codec, to the last bit, while few channels are open and while
all are; and, cut or not, the run of whole models.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flwr_smartsplit import Packed, PruneSchedule, Raw, Route, Task, cut_at_gate, gated
from flwr_smartsplit.edge.coding import packed_codes
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.split.build import state_of
from flwr_smartsplit.types import Codec
from tests.flower.apps import Run, message_app, run, smart_split
from tests.tasks import differences

NUM_CLASSES = 3
SHAPE = (3, 32, 32)
OPEN = 2
ROUNDS = 3  # The last has all channels.


def torchvision_model(name: str) -> nn.Module:
    """Build one for few classes."""
    model: nn.Module = torchvision.models.get_model(name, num_classes=NUM_CLASSES)
    return model


def vision_transformer() -> nn.Module:
    """Build a small one: its tokens have their channels last."""
    return torchvision.models.VisionTransformer(
        *(32, 8, 2, 2, 32, 64), num_classes=NUM_CLASSES
    )


def convnext() -> nn.Module:
    """Build a small one of transformers."""
    library = import_module("transformers")
    config = library.ConvNextConfig(
        hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], num_labels=NUM_CLASSES
    )
    model: nn.Module = library.ConvNextForImageClassification(config)
    return model


def entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Return the loss of a model of either library."""
    logits = getattr(outputs, "logits", outputs)
    return nn.functional.cross_entropy(logits, targets)


GATED: dict[str, Callable[[], nn.Module]] = {
    "resnet18": gated(partial(torchvision_model, "resnet18"), "layer2", encoder=False),
    "resnet18, encoded": gated(
        partial(torchvision_model, "resnet18"), "layer1", channels=8
    ),
    "mobilenet": gated(
        partial(torchvision_model, "mobilenet_v3_small"), "features.3", encoder=False
    ),
    "shufflenet": gated(
        partial(torchvision_model, "shufflenet_v2_x0_5"),
        "stage3",
        encoder=False,
        channels=96,
    ),
    "vit": gated(
        vision_transformer, "encoder.layers.encoder_layer_0", encoder=False, channels=32
    ),
    "convnext": gated(
        convnext, "convnext.encoder.stages.1", encoder=False, channels=12
    ),
}


def trained(name: str, codec: Codec, **changes: Any) -> Run:
    """Train two clients for some rounds with few channels, then one with all."""
    task = Task(
        model_fn=GATED[name],
        loss_fn=entropy,
        optimizer_fn=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        example_inputs=torch.zeros(1, *SHAPE),
        example_targets=torch.zeros(1, dtype=torch.int64),
    )
    schedule = PruneSchedule.deprune(budget=OPEN, rounds=ROUNDS, full_rounds=1)
    facts = {"choose_route": cut_at_gate, "between_rounds": schedule, "codec": codec}
    loaders = [DataLoader(examples(client), batch_size=4) for client in range(2)]
    members = [
        message_app(index, task=task, train_loader=each)
        for index, each in enumerate(loaders)
    ]
    torch.manual_seed(3)
    arrays = to_array_record(state_of(task.model_fn()))
    strategy = smart_split(task=task, **{**facts, **changes})
    return run(members, strategy, num_rounds=ROUNDS, arrays=arrays)


def examples(client: int) -> TensorDataset:
    """Draw a client's images."""
    chance = torch.Generator().manual_seed(client)
    images = torch.randn(8, *SHAPE, generator=chance)
    return TensorDataset(images, torch.randint(NUM_CLASSES, (8,), generator=chance))


@pytest.mark.every(3)
@pytest.mark.parametrize("name", GATED)
def test_packed_is_the_run_without_a_codec(name: str, tmp_path: Path) -> None:
    """Its bytes are those of the open channels, both ways."""
    path = tmp_path / "journal.jsonl"
    plain, packed = trained(name, Raw()), trained(name, Packed(), journal=path)
    whole = trained(name, Raw(), choose_route=lambda _: Route.whole())
    assert [made.kinds() for made in (plain, packed, whole)] == [[], [], []]
    assert differences(packed.state, plain.state) == []
    assert differences(packed.state, whole.state) == []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    clients = [row for row in rows if row["kind"] == "client"]
    assert {row["route"] == "whole" for row in clients} == {False}
    assert len([row for row in clients if row["round"] < ROUNDS]) == 2 * (ROUNDS - 1)
    for row in clients:
        for way in ("up", "down"):
            sent = row[f"edge_bytes_{way}"]
            raw = row.get(f"edge_bytes_raw_{way}", sent)  # Only where they differ
            assert sent <= (0.6 if row["round"] < ROUNDS else 1) * raw


def test_a_channel_that_is_lost_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the first open channel is taken for a closed one."""
    found = packed_codes._open_channels

    def fewer(*arguments: Any) -> Any:
        channels = found(*arguments)
        if channels is None:
            return None
        channels.is_open[channels.indices[0]] = False
        return replace(channels, indices=channels.indices[1:])

    plain = trained("resnet18", Raw())
    monkeypatch.setattr(packed_codes, "_open_channels", fewer)
    assert differences(trained("resnet18", Packed()).state, plain.state) != []
