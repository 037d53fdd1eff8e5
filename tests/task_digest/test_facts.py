"""Equal tasks have equal digests in every process; each difference names its field."""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.task_digest.facts import (
    code_copies,
    facts_digest,
    require_same_task,
    task_facts,
)
from flwr_smartsplit.task_digest.torch_settings import (
    apply_torch_settings,
    torch_settings,
)
from tests.models import small_cnn, task_of

ROOT = Path(__file__).parents[2]
SCALE = 2.0
DEVICE = torch.device("cpu")
WORDS = {"one", "two", "three", "four", "five"}


class Net(nn.Module):
    def __init__(self, width: int = 5, drop: float = 0.1) -> None:
        super().__init__()
        self.first, self.drop = nn.Linear(4, width), nn.Dropout(drop)
        self.last = nn.Linear(width, 3)
        self.register_buffer("mask", torch.ones(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.relu(self.first(x)) * self.mask))


class Negated(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.relu(-self.first(x)) * self.mask))


class Loss:
    """A loss with settings, and values of its own."""

    def __init__(self, weights: Any = (1.0, 2.0, 3.0), smoothing: float = 0.0) -> None:
        self.weights, self.smoothing = torch.tensor(weights), smoothing
        self.ignored = {"seven", "eight", "nine"}

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(
            outputs, targets, self.weights, label_smoothing=self.smoothing
        )


def scaled(outputs: Tensor, targets: Tensor, *, by: float = 1.0) -> Tensor:
    return functional.cross_entropy(outputs, targets) * by * SCALE


def closed(power: float, table: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        known = float(str(power) in {"one", "two", "three"})
        loss = functional.cross_entropy(outputs, targets) ** power
        return loss * float(table[0]) + known

    return loss


def optimizer(parameters: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


def halved(optimizer: Any, config: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def tenth(optimizer: Any, config: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


def make(**changes: Any) -> Task:
    facts: dict[str, Any] = {
        "model_fn": partial(Net, width=5),
        "loss_fn": Loss(),
        "optimizer_fn": partial(torch.optim.SGD, lr=0.1, weight_decay=1e-4),
        "example_inputs": torch.zeros(2, 4),
        "example_targets": torch.zeros(2, dtype=torch.int64),
        "schedule_fn": halved,
    }
    return Task(**{**facts, **changes})


class Hashed:
    """Keeps a hash of its own, as transformers' generation settings do."""

    def __init__(self) -> None:
        self._own_hash = hash("another one in each process")


TASKS: dict[str, Callable[[], Task]] = {
    "objects": make,
    "network": lambda: task_of(small_cnn),
    "closures": lambda: make(
        loss_fn=closed(2.0, [1.0, np.array([1.0, 2.0]), Hashed()]),
        optimizer_fn=logged(optimizer),
    ),
    "lambdas": lambda: make(
        loss_fn=lambda outputs, targets: functional.cross_entropy(outputs, targets) * 2,
        metrics_fn=lambda outputs, targets: {w: 1.0 for w in WORDS if w in {"one"}},
        is_local=lambda name: name in {"a", "b", "c"},
    ),
}


def facts_of(task: Task) -> dict[str, str]:
    return task_facts(task, build_chain(task).model, is_anew=True)


def differing(one: Task, other: Task) -> list[str]:
    mine, theirs = facts_of(one), facts_of(other)
    assert (facts_digest(mine) == facts_digest(theirs)) == (mine == theirs)
    return sorted(n for n in mine.keys() | theirs if mine.get(n) != theirs.get(n))


# --- what is equal --------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_same_code_gives_the_same_digest_twice_and_as_a_copy(name):
    """Two calls, and a copy as Ray makes it."""
    task = TASKS[name]()
    assert differing(task, TASKS[name]()) == []
    assert differing(task, cloudpickle.loads(cloudpickle.dumps(task))) == []


@pytest.mark.slow
def test_another_process_and_folder_give_the_same_digests(tmp_path):
    """Another hash seed, another folder with the same code, other line numbers."""
    (tmp_path / "tests" / "task_digest").mkdir(parents=True)
    for name in ("__init__", "models", "oracle"):
        path = ROOT / "tests" / f"{name}.py"
        text = path.read_text() if path.exists() else ""
        (tmp_path / "tests" / path.name).write_text(text)
    own = Path(__file__).read_text().replace("ROOT =", "\n\n\nROOT =", 1)
    (tmp_path / "tests" / "task_digest" / "test_facts.py").write_text(own)
    code = (
        "from tests.task_digest.test_facts import *\n"
        "for name, make in TASKS.items(): print(name, facts_digest(facts_of(make())))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    digests = [
        f"{name} {facts_digest(facts_of(make()))}" for name, make in TASKS.items()
    ]
    assert found.stdout.splitlines() == digests, found.stderr


def test_what_a_client_may_choose_does_not_count():
    """Examples' values and number, and whether a gradient is there."""
    assert differing(make(), make(example_inputs=torch.ones(7, 4))) == []


def test_facts_hold_no_address_and_no_path():
    for make_task in TASKS.values():
        text = repr(facts_of(make_task()))
        assert " at 0x" not in text
        assert str(ROOT) not in text


# --- what differs ---------------------------------------------------------------------

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": (
        {"optimizer_fn": partial(torch.optim.SGD, lr=0.0, weight_decay=1e-4)},
        "optimizer_fn.lr",
    ),
    "optimizer": ({"optimizer_fn": partial(torch.optim.Adam, lr=0.1)}, "optimizer_fn"),
    "width": ({"model_fn": partial(Net, width=6)}, "model_fn.width"),
    "dropout": ({"model_fn": partial(Net, width=5, drop=0.2)}, "model_fn.drop"),
    "class weights": ({"loss_fn": Loss((1.0, 2.0, 4.0))}, "loss_fn.weights"),
    "smoothing": ({"loss_fn": Loss(smoothing=0.1)}, "loss_fn.smoothing"),
    "loss": ({"loss_fn": scaled}, "loss_fn"),
    "schedule": ({"schedule_fn": tenth}, "schedule_fn"),
    "metrics": ({"metrics_fn": lambda outputs, targets: {}}, "metrics_fn"),
    "clipping": ({"max_gradient_norm": 1.0}, "max_gradient_norm"),
    "mixed precision": ({"autocast_dtype": torch.bfloat16}, "autocast_dtype"),
    "accumulation": ({"accumulate": 2}, "accumulate"),
    "what is local": ({"is_local": str.isupper}, "is_local"),
    "shape": ({"example_targets": torch.zeros(2, 1).long()}, "example_targets"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_names_its_field_and_both_values(name):
    changes, field = CHANGES[name]
    try:
        mine = facts_of(make(**changes))
    except InvalidTask:  # The examples do not fit the loss.
        pytest.skip("not a task")
    theirs = facts_of(make())
    with pytest.raises(InvalidTask) as caught:
        require_same_task(mine, theirs, whose="client 'c7'")
    text = str(caught.value)
    assert "client 'c7' has another task than the strategy" in text
    assert f"{field} is {mine[field]} there and " in text
    assert theirs.get(field, "missing") in text


def changed_in(monkeypatch: Any, name: str, value: Any) -> None:
    monkeypatch.setitem(globals(), name, value)


def test_code_counts_wherever_it_is(monkeypatch):
    """Globals that a function uses, closures, defaults, and the classes of modules."""
    scale = make(loss_fn=scaled)
    before = facts_of(scale)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    after = facts_of(scale)
    assert [n for n in after if after[n] != before[n]] == ["loss_fn.SCALE"]
    names = {
        "closure": (closed(2.0, [1]), closed(3.0, [1]), ["loss_fn.power"]),
        "array": (
            closed(2.0, np.array([1.0, 2.0])),
            closed(2.0, np.array([1.0, 3.0])),
            ["loss_fn.table"],
        ),
        "argument": (partial(scaled, by=2.0), partial(scaled, by=1.0), ["loss_fn.by"]),
    }
    for one, other, expected in names.values():
        found = differing(make(loss_fn=one), make(loss_fn=other))
        assert [name for name in found if name in expected] == expected
    forward = Net.forward
    built = facts_of(make())
    monkeypatch.setattr(Net, "forward", lambda self, x: forward(self, x) * 2)
    changed = facts_of(make())
    assert any(
        "forward" in name for name in changed if changed[name] != built.get(name)
    )


def test_what_belongs_to_a_place_does_not_count(monkeypatch):
    """Its device, its log, its environment, and where a file lies."""
    log = logging.getLogger("a place")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        log.debug("in %s", os.environ.get("HOME"))
        return functional.cross_entropy(outputs, targets).to(DEVICE)

    task = make(loss_fn=loss)
    before = facts_of(task)
    monkeypatch.setitem(globals(), "DEVICE", torch.device("meta"))
    monkeypatch.setenv("HOME", "elsewhere")
    log.setLevel(logging.ERROR)
    assert facts_of(task) == before
    paths = (Path("/home/one/table.npy"), "/opt/table.npy", "/opt/another.npy")
    here, there, other = (make(is_local=partial(str.endswith, path)) for path in paths)
    assert differing(here, there) == []
    assert differing(here, other) == ["is_local[0]"]


def test_what_was_built_counts_whatever_built_it(monkeypatch):
    """A model function that reads its settings from elsewhere."""
    width = [5]

    def model_fn() -> nn.Module:
        return Net(width[0], drop=float(os.environ.get("TEST_DROP", "0.1")))

    one = facts_of(make(model_fn=model_fn))
    monkeypatch.setenv("TEST_DROP", "0.4")
    other = task_facts(make(model_fn=model_fn), model_fn())
    assert [n for n in one if one[n] != other.get(n)] == ["model drop"]
    masked = Net()
    masked.mask[0] = 0
    other = task_facts(make(), masked)
    own = task_facts(make(), Net())
    assert [n for n in own if own[n] != other[n]] == ["model"]


# --- torch's settings -----------------------------------------------------------------

SETTINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype": (lambda: torch.set_default_dtype(torch.float64), "default_dtype"),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True),
        "deterministic_algorithms",
    ),
    "matmul": (
        lambda: torch.set_float32_matmul_precision("medium"),
        "float32_matmul_precision",
    ),
    "mkldnn": (lambda: torch.backends.mkldnn.set_flags(False), "mkldnn.enabled"),
    "attention": (
        lambda: torch.backends.cuda.enable_flash_sdp(False),
        "flash_attention",
    ),
    "denormal": (lambda: torch.set_flush_denormal(True), "flush_denormal"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_process_count_and_can_be_carried(name):
    task = make()
    before, settings = facts_of(task), torch_settings()
    change, field = SETTINGS[name]
    try:
        change()
        after, changed = facts_of(task), torch_settings()
    finally:
        apply_torch_settings(settings)
    assert facts_of(task) == before
    with pytest.raises(InvalidTask, match=f"torch.{field} is"):
        require_same_task(after, before, whose="an edge")
    try:
        apply_torch_settings(changed)
        assert facts_of(task) == after
    finally:
        apply_torch_settings(settings)


def test_settings_are_read_and_written_where_torch_warns_of_their_names(monkeypatch):
    """As torch 2.9 does, once a process; the user may have made warnings errors."""
    settings, warned = torch_settings(), []
    name = "float32_matmul_precision"
    for verb in ("get", "set"):
        real = getattr(torch, f"{verb}_{name}")

        def warning(*words: str, real: Callable[..., Any] = real) -> Any:
            warned.append(real)
            warnings.warn("Please use the new API settings", stacklevel=1)
            return real(*words)

        monkeypatch.setattr(torch, f"{verb}_{name}", warning)
    try:
        apply_torch_settings({**settings, name: "medium"})
        assert torch_settings()[name] == "medium"
    finally:
        apply_torch_settings(settings)
    assert len(set(warned)) == 2
    with pytest.raises(UserWarning, match="the new API"):
        torch.get_float32_matmul_precision()  # The user's own calls warn as ever.


def test_settings_of_an_accelerator_that_one_side_lacks_do_not_count():
    facts = facts_of(make())
    other = {**facts, "torch.cudnn.benchmark": "False"}
    require_same_task(facts, other, whose="a device")
    assert facts_digest(facts) == facts_digest(other)
    with pytest.raises(InvalidTask, match=r"torch\.cudnn\.benchmark"):
        require_same_task({**facts, "torch.cudnn.benchmark": "True"}, other, whose="x")


# --- copies of a package --------------------------------------------------------------


@pytest.fixture
def copies(tmp_path, monkeypatch) -> Callable[[str, str], dict[str, str]]:
    """Import a package of one name from folders, and say which copy it is."""

    def copied(folder: str, budget: str) -> dict[str, str]:
        package = tmp_path / folder / "shopfloor"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("def model():\n    return None\n")
        (package / "client.py").write_text(f"BUDGET = {budget}\n")
        monkeypatch.delitem(sys.modules, "shopfloor", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path / folder))
        import shopfloor  # noqa: PLC0415

        return code_copies(make(model_fn=shopfloor.model))

    return copied


def test_another_copy_with_other_content_on_one_machine_is_refused(copies):
    """A SuperLink that is still up lets workers import what it found first."""
    first, second = copies("a", "1024"), copies("b", "102400")
    with pytest.raises(InvalidTask) as caught:
        require_same_task(first, second, whose="client 'c0'")
    assert "copy of shopfloor" in str(caught.value)
    assert "a SuperLink, may have imported the old one" in str(caught.value)


def test_an_edited_or_equal_copy_or_another_machine_is_not(copies):
    first = copies("a", "1024")
    edited = copies("a", "2048")
    require_same_task(first, edited, whose="x")
    require_same_task(copies("b", "1024"), first, whose="x")
    elsewhere = {"copy of shopfloor on another": "/app/shopfloor #123"}
    require_same_task(first, elsewhere, whose="x")
    assert facts_digest(first) == facts_digest(elsewhere) == facts_digest({})


# --- what functions note while they train ---------------------------------------------

_CALLS: list[int] = []
_NUM_CALLS = 0


def counting(optimizer, config):
    """Count the calls, in a list and in a number."""
    global _NUM_CALLS  # noqa: PLW0603
    _NUM_CALLS += 1
    _CALLS.append(_NUM_CALLS)


def test_what_functions_note_makes_no_other_task():
    """The next client of a process has the same task; a new strategy looks anew."""
    task = make(schedule_fn=counting)
    model = build_chain(task).model
    first = task_facts(task, model, is_anew=True)
    counting(None, {})
    assert task_facts(task, model) == first
    assert task_facts(task, model, is_anew=True) != first
