"""A profile on disk is found again exactly when nothing it depends on has changed."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.profile import profile as costs
from flwr_smartsplit.profile.cache import profile_digest
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import ChainProfile, Variant
from tests.models import OPTIMIZERS, small_cnn, task_of


class Pool(nn.Module):
    """A leaf whose work depends on a plain attribute that it does not show."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(x, self.size)


def pooled(size: int = 2, width: int = 8) -> nn.Module:
    """Build a network that pools."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        Pool(size),
        nn.Flatten(),
        nn.Linear(width * (12 // size) ** 2, 10),
    )


def chain_of(task: Task) -> Chain:
    return Chain.from_module(task.model_fn(), task.example_inputs)


def digest_of(task: Task, *, batch_size: int = 4) -> str:
    return profile_digest(chain_of(task), batch_size=batch_size, task=task)


def sum_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


def scaled_loss(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: functional.cross_entropy(outputs, targets) * scale


def sgd_with(momentum: float) -> Callable[..., torch.optim.Optimizer]:
    def build(parameters: Any, *, momentum: float = momentum) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=momentum)

    return build


class Maker:
    """An optimizer's settings in an object."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum

    def build(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=self.momentum)


class Leaf(nn.Module):
    """A leaf with settings of every kind."""

    def __init__(self, setting: Any) -> None:
        super().__init__()
        self.setting = setting
        self.itself = Maker(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x


def leafy(setting: Any) -> nn.Module:
    """Put such a leaf into the network."""
    model = pooled()
    model.add_module("leaf", Leaf(setting))
    return model


def helper(outputs: Tensor, targets: Tensor) -> Tensor:
    return sum_loss(outputs, targets)


TASK = task_of(pooled)
OTHERS: dict[str, Task] = {
    "attribute": task_of(partial(pooled, 3)),
    "width": task_of(partial(pooled, 2, 9)),
    "frozen": task_of(lambda: pooled().requires_grad_(False).append(nn.Linear(10, 10))),
    "optimizer": replace(TASK, optimizer_fn=OPTIMIZERS["adam"]),
    "optimizer's setting": replace(
        TASK, optimizer_fn=partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    ),
    "loss": replace(TASK, loss_fn=sum_loss),
    "closure of the loss": replace(TASK, loss_fn=scaled_loss(2.0)),
    "other closure of the loss": replace(TASK, loss_fn=scaled_loss(3.0)),
    "loss through a helper": replace(TASK, loss_fn=helper),
    "setting of the loss": replace(TASK, loss_fn=nn.CrossEntropyLoss()),
    "other setting of the loss": replace(
        TASK, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1)
    ),
    "keyword default": replace(TASK, optimizer_fn=sgd_with(0.0)),
    "other keyword default": replace(TASK, optimizer_fn=sgd_with(0.9)),
    "method": replace(TASK, optimizer_fn=Maker(0.0).build),
    "other method": replace(TASK, optimizer_fn=Maker(0.9).build),
    "function in a leaf": task_of(partial(leafy, functional.relu)),
    "other function in a leaf": task_of(partial(leafy, sum_loss)),
    "list in a leaf": task_of(partial(leafy, [1, 1])),
    "other list in a leaf": task_of(partial(leafy, [4, 1])),
    "autocast": replace(TASK, autocast_dtype=torch.bfloat16),
    "clipping": replace(TASK, max_gradient_norm=1.0),
    "targets": replace(TASK, example_targets=torch.zeros(1, 2, dtype=torch.int64)),
    "layout of the inputs": replace(
        TASK,
        example_inputs=TASK.example_inputs.contiguous(
            memory_format=torch.channels_last
        ),
    ),
    "layout": task_of(lambda: pooled().to(memory_format=torch.channels_last)),
}


def test_every_dependency_changes_the_digest():
    """Model, attributes, layout, optimizer, loss and targets all count."""
    digests = {name: digest_of(task) for name, task in OTHERS.items()}
    digests["itself"] = digest_of(TASK)
    digests["batch size"] = digest_of(TASK, batch_size=5)
    front = Variant("front")
    digests["variant"] = profile_digest(
        chain_of(TASK), batch_size=4, task=TASK, variant=front
    )
    assert len(set(digests.values())) == len(digests)


def test_the_same_recipe_has_the_same_digest():
    """Two models built alike, and values of parameters, make no difference."""
    assert digest_of(task_of(small_cnn)) == digest_of(task_of(small_cnn))
    assert digest_of(TASK) == digest_of(task_of(pooled))


IN_ANOTHER_PROCESS = """
import tests.profile.test_cache as here
print(*(here.digest_of(task) for task in here.OTHERS.values()))
"""


@pytest.mark.slow  # tests/task_digest does the same with what both describe alike.
def test_another_process_finds_the_same_digests():
    """No address gets into a digest: what one process keeps, another finds."""
    run = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    found = subprocess.run(run, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [digest_of(task) for task in OTHERS.values()]


def test_a_profile_is_computed_once(tmp_path, monkeypatch):
    """The second time it comes from the disk, and is the same."""
    folder = tmp_path / "new" / "folder"
    chain = chain_of(TASK)
    ask = partial(profile_chain, chain, batch_size=4, task=TASK)
    first = ask(cache_dir=folder)
    assert first == ask()
    assert [path.suffix for path in folder.iterdir()] == [".json"]

    def forbidden(*_: object, **__: object) -> Any:
        raise AssertionError("a dry run")

    monkeypatch.setattr(costs, "StepLogger", forbidden)
    assert ask(cache_dir=folder) == first
    with pytest.raises(Exception, match="a dry run"):
        ask()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"units": [{}]}', "null", "\x00"])
def test_a_spoilt_file_is_replaced(tmp_path: Path, text: str):
    """Whatever stands in the file, the profile is right, and so is the file then."""
    chain = chain_of(TASK)
    first = profile_chain(chain, batch_size=4, task=TASK, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(text, encoding="utf-8")
    again = profile_chain(chain, batch_size=4, task=TASK, cache_dir=tmp_path)
    assert again == first
    assert ChainProfile.from_json(path.read_text(encoding="utf-8")) == first


def test_json_that_is_no_profile_is_refused_clearly():
    """The error says what to do."""
    with pytest.raises(ValueError, match=r"not a chain.*Make a new one"):
        ChainProfile.from_json('{"batch_size": 3}')
