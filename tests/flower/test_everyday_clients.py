"""What users write every day reaches the end of a run, in both of Flower's APIs."""

import copy
import json
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from flwr_smartsplit import (
    DeviceTraits,
    Link,
    Route,
    SmartSplit,
    SmartSplitNumPyClient,
    predicted_peak_bytes,
    profile_chain,
)
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.flower import messages
from flwr_smartsplit.flower.rounds import planner
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.plan import evaluation
from flwr_smartsplit.split.build import build_chain, state_of
from tests.flower.apps import apps, legacy_app, message_app, peak_of, run, smart_split
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import (
    BATCH_SIZE,
    NUM_CLASSES,
    TASK,
    differences,
    examples,
    initial_state,
    loader,
    tiny_cnn,
)

CUTS = {"whole": None, "split": 4}


def always(cut: int | None) -> Callable[[Any], Route]:
    """Give everybody one route."""
    return lambda request: Route.whole() if cut is None else Route.split(cut)


def in_both(fleet: Any, *, num_rounds: int = 1, **changes: Any) -> list[Any]:
    """Run a fleet under both strategies."""
    new = run(fleet, smart_split(**changes), num_rounds=num_rounds)
    old = run_legacy(fleet, legacy_smart_split(**changes), num_rounds=num_rounds)
    assert differences(new.state, old.state) == []
    return [new, old]


# --- values of the config -------------------------------------------------------------

CONFIG = {
    "milestones": [1, 3],
    "rates": [0.1, float("inf")],
    "names": ["a", "é"],
    "flags": [True, False],
    "key": b"\x00\xff",
    "keys": [b"a", b""],
    "none": [],
    "scale": 0.5,
}
_seen: list[dict[str, Any]] = []


def noting(optimizer: Any, config: Mapping[str, Any]) -> None:
    """Note what a place is told."""
    assert config["milestones"]
    _seen.append({name: config[name] for name in CONFIG})


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("make", [message_app, legacy_app])
@pytest.mark.parametrize("is_legacy", [False, True])
def test_every_value_of_the_config_reaches_every_place(
    cut: int | None, is_legacy: bool, make: Any
) -> None:
    """With its type; a list that does not arrive would be a schedule left out."""
    _seen.clear()
    task = replace(TASK, schedule_fn=noting)
    fleet = [make(index, task=task) for index in range(2)]
    if is_legacy:
        given = {"on_fit_config_fn": lambda number: CONFIG}
        strategy = legacy_smart_split(task=task, choose_route=always(cut), **given)
        run_legacy(fleet, strategy, num_rounds=1)
    else:
        strategy = smart_split(task=task, choose_route=always(cut))
        run(fleet, strategy, num_rounds=1, train_config=ConfigRecord(dict(CONFIG)))
    assert len(_seen) == (2 if cut is None else 4)
    assert all(repr(each) == repr(CONFIG) for each in _seen)


def test_a_config_without_its_lists_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted error: what was done before."""

    def scalars(config: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if not isinstance(v, list)}

    monkeypatch.setattr(planner, "config_values", scalars)
    task = replace(TASK, schedule_fn=noting)
    with pytest.raises(SmartSplitError, match=r"still the initial.*2 x .*'milestones'"):
        run(
            apps([None] * 2, task=task),
            smart_split(task=task),
            num_rounds=1,
            train_config=ConfigRecord(dict(CONFIG)),
        )


# --- metrics of the user's ------------------------------------------------------------


def rare(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """Report a metric of class 0 only where there is one."""
    found = {"mean": outputs.mean()}  # a tensor: as good as a number
    if (targets == 0).any():
        found["of_class_0"] = outputs[targets == 0].mean()
    return found


def rare_loaders() -> list[DataLoader[Any]]:
    """Make loaders: class 0 in every batch, in the first one, nowhere."""
    made = []
    for client, labels in enumerate(([0, 1] * 4, [0] * 4 + [1] * 4, [1, 2] * 4)):
        inputs = torch.randn(
            8, 1, 6, 6, generator=torch.Generator().manual_seed(client)
        )
        made.append(DataLoader(TensorDataset(inputs, torch.tensor(labels)), BATCH_SIZE))
    return made


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_metric_is_the_mean_over_those_that_report_it(
    cut: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By examples of the batches that have it, with their number; not 0 elsewhere."""
    task, loaders = replace(TASK, metrics_fn=rare), rare_loaders()
    fleet = [message_app(k, task=task, eval_loader=e) for k, e in enumerate(loaders)]
    changes = {"task": task, "choose_route": always(cut), "fraction_evaluate": 1.0}
    made = run(fleet, smart_split(**changes), num_rounds=1)
    model = tiny_cnn().eval()
    model.load_state_dict(made.result.arrays.to_torch_state_dict())
    with torch.no_grad():
        batches = [(model(x), y) for loader in loaders for x, y in loader]
    having = [rare(*b)["of_class_0"] for b in batches if (b[1] == 0).any()]
    metrics = made.result.evaluate_metrics_clientapp[1]
    assert len(having) == 3
    assert metrics["of_class_0"] == pytest.approx(float(sum(having)) / 3, rel=1e-6)
    assert metrics["of_class_0.num-examples"] == 12
    everywhere = sum(float(rare(*b)["mean"]) for b in batches) / len(batches)
    assert metrics["mean"] == pytest.approx(everywhere, rel=1e-6)
    assert not any(name.startswith("mean.") for name in metrics)

    def stock(average: Any, accepted: Any, key: str) -> MetricRecord:
        return average(messages.contents_of(accepted, key), key)

    monkeypatch.setattr(messages, "averaged", stock)  # The planted error
    wrong = run(fleet, smart_split(**changes), num_rounds=1).result
    assert wrong.evaluate_metrics_clientapp[1]["of_class_0"] != metrics["of_class_0"]


def test_flowers_legacy_functions_are_told_how_many() -> None:
    """Each client's metric comes with the number of its examples."""
    told: list[Any] = []
    task, loaders = replace(TASK, metrics_fn=rare), rare_loaders()
    fleet = [message_app(k, task=task, eval_loader=e) for k, e in enumerate(loaders)]
    strategy = legacy_smart_split(
        task=task,
        fraction_evaluate=1.0,
        evaluate_metrics_aggregation_fn=lambda found: told.extend(found) or {},
    )
    run_legacy(fleet, strategy, num_rounds=1)
    counts = [values.get("of_class_0.num-examples") for _, values in told]
    assert ["of_class_0" in values for _, values in told] == [True, True, False]
    assert counts == [None, 4, None]


@pytest.mark.parametrize("name", ["loss", "seconds", "num-steps", "route", "cause"])
def test_a_metric_with_a_name_of_ours_is_refused_at_the_start(name: str) -> None:
    """It would vanish behind ours."""
    for make in (smart_split, legacy_smart_split):
        with pytest.raises(InvalidTask, match=f"metrics_fn returns {name}, which"):
            make(task=replace(TASK, metrics_fn=lambda o, y: {name: 0.5, "good": 1.0}))


@pytest.mark.parametrize("name", ["acc.num-examples", "loss.num-examples"])
def test_a_metric_with_the_name_of_a_count_is_refused(name: str) -> None:
    """Where some batches lack ``acc``, its count has that name."""
    with pytest.raises(InvalidTask, match=f"{name}: so is reported .*-count'"):
        smart_split(task=replace(TASK, metrics_fn=lambda o, y: {name: 7.0, "acc": 1.0}))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"good": "x"}, "returns 'x' as 'good': return a number"),
        ({"good": None}, "returns None as 'good'"),
        ({"good": torch.ones(2)}, r"returns tensor.* as 'good'"),
        ([0.5], r"returns \[0.5\]: return a mapping"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused(found: Any, says: str) -> None:
    """At the start, by the name of the function; also if only a real batch shows it."""
    with pytest.raises(InvalidTask, match=f"metrics_fn {says}"):
        smart_split(task=replace(TASK, metrics_fn=lambda o, y: found))

    def picky(outputs: Tensor, targets: Tensor) -> Any:
        if not outputs.any():
            raise ValueError("all zero")
        return found

    task = replace(TASK, metrics_fn=picky)
    strategy = smart_split(task=task, fraction_evaluate=1.0, verify=False)
    made = run(apps([None] * 2, task=task), strategy, num_rounds=1)
    assert re.search(f"metrics_fn {says}", made.strategy.failures[0].cause)


def test_a_clash_that_zeros_do_not_show_is_named_at_the_first_batch() -> None:
    """Some functions need real outputs; then the evaluation fails, with the reason."""

    def picky(outputs: Tensor, targets: Tensor) -> dict[str, float]:
        if not outputs.any():
            raise ValueError("all zero")
        return {"seconds": 1.0}

    task = replace(TASK, metrics_fn=picky)
    strategy = smart_split(task=task, fraction_evaluate=1.0)
    made = run(apps([None] * 2, task=task), strategy, num_rounds=1)
    assert [kind for _, kind in made.kinds()] == ["failed"] * 2
    assert "metrics_fn returns seconds" in made.strategy.failures[0].cause


# --- counts of the sampler ------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """Examples one after the other, without positions."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        return iter(TensorDataset(*examples(0)[: self.size]))

    def __len__(self) -> int:
        return self.size


class Fewer(BatchSampler):
    """A batch sampler of the user's that stops early."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        return (batch for batch, _ in zip(super().__iter__(), range(2), strict=False))


def of_many() -> Dataset[Any]:
    """Make the data set of a whole fleet, of which a client has a part."""
    return TensorDataset(torch.randn(100, 1, 6, 6), torch.arange(100) % NUM_CLASSES)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "subset": lambda: DataLoader(of_many(), 4, sampler=SubsetRandomSampler(range(9))),
    "weighted": lambda: DataLoader(
        of_many(), 4, sampler=WeightedRandomSampler([1.0] * 100, 7)
    ),
    "drop_last": lambda: DataLoader(of_many(), 30, drop_last=True),
    "batch_sampler": lambda: DataLoader(
        of_many(),
        batch_sampler=BatchSampler(SubsetRandomSampler(range(9)), 4, drop_last=True),
    ),
    "own_batch_sampler": lambda: DataLoader(
        of_many(),
        batch_sampler=Fewer(SubsetRandomSampler(range(50)), 4, drop_last=False),
    ),
    "stream": lambda: DataLoader(Stream(9), 4),
    "plain": lambda: DataLoader(examples(0), 4),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_what_the_loader_draws_is_planned_and_weighs(kind: str) -> None:
    """The data set may be everybody's."""
    made = LOADERS[kind]()
    drawn = [len(targets) for _, targets in made]
    profile = SmartSplitNumPyClient(TASK, made, client_key="a").profile
    assert profile.num_examples == sum(drawn)
    assert profile.num_steps == len(drawn)
    fleet = [message_app(0, train_loader=made), message_app(1)]
    for each in in_both(fleet):
        assert each.kinds() == []
    if kind not in {"plain", "stream"}:
        assert len(made.dataset) != sum(drawn)  # The planted error would be seen.


@pytest.mark.parametrize("loader", [DataLoader(of_many(), batch_size=None), iter(())])
def test_a_loader_that_does_not_say_how_many_is_refused(loader: Any) -> None:
    """The data set of ready-made batches counts batches."""
    with pytest.raises(InvalidTask, match="give num_examples and batch_size"):
        SmartSplitNumPyClient(TASK, loader, client_key="a")
    with pytest.raises(InvalidTask, match="give num_examples and batch_size"):
        SmartSplitNumPyClient(TASK, loader, client_key="a", batch_size=4)


class Uneven:
    """A sampler that draws another number in each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(range(6 + self.passes % 2))

    def __len__(self) -> int:
        return 6


def test_passes_of_different_lengths_are_merged() -> None:
    """Device and edge count the same examples, whatever their mean is rounded to."""
    uneven = DataLoader(examples(0), 4, sampler=Uneven())
    fleet = [message_app(0, train_loader=uneven, local_epochs=2), message_app(1)]
    made = run(fleet, smart_split(choose_route=always(4)), num_rounds=2)
    assert made.kinds() == []


# --- evaluation at its own batch size -------------------------------------------------


@pytest.mark.parametrize("size", [9, 64])
def test_evaluation_is_priced_at_its_own_batch_size(size: int) -> None:
    """Forward only: under a budget for training small batches, larger ones go through.

    If they do not, the client sits out and says so.
    """
    budget = peak_of(Route.split(4))
    large = DataLoader(examples(size), batch_size=size)
    fleet = [message_app(0, budget, eval_loader=large), message_app(1)]
    rows: list[Any] = []
    for make, go in ((smart_split, run), (legacy_smart_split, run_legacy)):
        rows.clear()
        made = go(
            fleet, make(fraction_evaluate=1.0, on_row=[rows.append]), num_rounds=1
        )
        assert made.kinds() == []
        (row,) = (
            r for r in rows if r.get("client_key") == "c0" and r["phase"] == "evaluate"
        )
        assert row["status"] == ("accepted" if size == 9 else "sat_out")
        assert row.get("peak_bytes", 0) <= budget
        assert size == 9 or "batch size 64" in row["cause"]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": tiny_cnn,
    "wide": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 256), nn.ReLU(), nn.Linear(256, NUM_CLASSES)
    ),
    "in place": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 3)
    ),
    "views": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 32), nn.Unflatten(1, (2, 16)), nn.Flatten(1, 2),
        nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 3),
    ),
}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", MODELS)
def test_an_evaluation_holds_no_more_than_its_price(kind: str) -> None:
    """On every route, as the meter counts; and much less than training does."""
    task = replace(TASK, model_fn=MODELS[kind])
    chain, model, size = build_chain(task), MODELS[kind](), 16
    trained = profile_chain(chain, batch_size=size, task=task)
    profile = evaluation.forward_only(trained)
    routes = [Route.whole(), *map(Route.split, range(1, len(chain)))]
    if len(chain) > 2:
        routes.append(Route.u_shape(1, len(chain) - 1))
    for route in routes:
        price = predicted_peak_bytes(profile, route)
        rows: list[Any] = []
        fleet = [
            message_app(
                0,
                task=task,
                cap_mode="strict",
                eval_loader=DataLoader(examples(size), size, drop_last=True),
            )
        ]
        strategy = smart_split(
            task=task,
            choose_route=lambda request, route=route: route,
            on_row=[rows.append],
            fraction_evaluate=1.0,
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
        )
        run(fleet, strategy, num_rounds=1, arrays=to_array_record(state_of(model)))
        (row,) = (r for r in rows if r["kind"] == "client" and r["phase"] == "evaluate")
        assert row["status"] == "accepted", row
        assert (
            0.5 * price
            < row["peak_bytes"]
            <= price
            < predicted_peak_bytes(trained, route)
        ), (kind, str(route), price)


# --- names and numbers ----------------------------------------------------------------

KEYS = [
    "",
    " a ",
    "a\nb",
    "医" * 90,
    "n" * 400,
    "../up",
    "a/b?x=1&y=é",
    "%2F",
    3,
    np.int64(4),
]


def test_any_text_is_a_key_and_an_edges_name() -> None:
    """None of it becomes a file's name."""
    edges = tuple(LocalEdge(name=name) for name in ("münchen", "../a b", "e" * 300))

    def dealt(request: Any) -> Route:
        return Route.split(4, edge=request.edge)

    fleet = [
        message_app(index, edges=edges, client_key=key)
        for index, key in enumerate(KEYS)
    ]
    for made in in_both(fleet, edges=edges, choose_route=dealt):
        assert made.kinds() == []
        (plan,) = made.strategy.round_plans
        assert {a.client_key for a in plan.assignments} == set(map(str, KEYS))


@pytest.mark.parametrize("key", [None, b"x", True, 1.5, "\ud800"])
def test_what_is_no_text_is_no_key(key: Any) -> None:
    """Refused where it is given."""
    with pytest.raises((TypeError, ValueError), match="client_key is"):
        SmartSplitNumPyClient(TASK, loader(0), client_key=key)
    with pytest.raises(ValueError, match="give a text other than 'device'"):
        LocalEdge(name="device")


NUMBERS: list[Callable[[Any], Any]] = [
    np.int64,
    np.float32,
    np.array,
    torch.tensor,
    float,
]


@pytest.mark.every(3)
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_other_libraries_are_as_good(number: Callable[[Any], Any]) -> None:
    """The same run as with Python's own, bit for bit."""

    def task(n: Callable[[Any], Any]) -> Any:
        return replace(TASK, accumulate=n(1), max_gradient_norm=n(5))

    def client(index: int, n: Callable[[Any], Any]) -> Any:
        traits = DeviceTraits(
            flops_per_second=n(10**9),
            link=Link(up_bytes_per_second=n(10**6), latency_seconds=n(0)),
            label_counts=np.bincount([0, 1, 1, 2]) if n is not int else (1, 2, 1),
        )
        return message_app(
            index,
            n(10**6),
            task=task(n),
            traits=traits,
            num_examples=n(8 + index),
            batch_size=n(4),
            local_epochs=n(2),
            meter_every=n(3),
        )

    def strategies(n: Callable[[Any], Any]) -> dict[str, Any]:
        edge = LocalEdge(memory_bytes=n(10**8), flops_per_second=n(10**9))
        cut = (np.int64 if n is not int else int)(4)
        return {
            "edges": (edge,),
            "task": task(n),
            "seed": n(3),
            "num_threads": n(1),
            "min_device_units": n(1),
            "choose_route": lambda request: Route.split(cut),
        }

    (truth, _), given = (
        in_both([client(k, n) for k in range(2)], **strategies(n))
        for n in (int, number)
    )
    for made in given:
        assert made.kinds() == []
        assert differences(made.state, truth.state) == []


# --- observers and copies -------------------------------------------------------------


@pytest.mark.parametrize("case", ["removed", "full"])
def test_a_journal_that_cannot_be_written_does_not_end_the_run(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning, and the same result."""
    folder = tmp_path / "runs"
    path = Path("/dev/full") if case == "full" else folder / "journal.jsonl"
    strategy = smart_split(
        journal=path,
        between_rounds=lambda *_: shutil.rmtree(folder, ignore_errors=True),
    )
    made = run(apps([None] * 2), strategy)
    assert made.kinds() == []
    assert differences(made.state, run(apps([None] * 2)).state) == []
    warned = [r.getMessage() for r in caplog.records if "journal" in r.getMessage()]
    assert len([each for each in warned if "fails; the run goes on" in each]) == 1


def ignoring(outputs: Tensor, targets: Tensor) -> Tensor:
    """Ignore class 1: a batch of nothing else has no loss."""
    return nn.functional.cross_entropy(outputs, targets, ignore_index=1)


def test_every_line_of_a_journal_is_json(tmp_path: Path) -> None:
    """Also where a loss is not a number."""
    task, path = replace(TASK, loss_fn=ignoring), tmp_path / "journal.jsonl"
    inputs, targets = torch.randn(8, 1, 6, 6), torch.ones(8, dtype=torch.int64)
    empty = DataLoader(TensorDataset(inputs, targets), BATCH_SIZE)
    fleet = [message_app(0, task=task, eval_loader=empty), message_app(1, task=task)]
    run(
        fleet, smart_split(task=task, journal=path, fraction_evaluate=1.0), num_rounds=1
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    rows = [
        json.loads(line, parse_constant=refuse)
        for line in path.read_text().splitlines()
    ]
    losses = [row["loss"] for row in rows if row.get("phase") == "evaluate"]
    assert losses.count(None) == 1
    with pytest.raises(AssertionError, match="NaN is no JSON"):  # The planted error
        json.loads(json.dumps({"loss": float("nan")}), parse_constant=refuse)


class Saving(SmartSplit):
    """A subclass as Flower's how-to has it."""

    def __init__(self, *args: Any, folder: str, **changes: Any) -> None:
        super().__init__(*args, **changes)
        self.folder = folder


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda strategy: pickle.loads(pickle.dumps(strategy)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_strategy_does_the_same_run(how: str) -> None:
    """From the start, also after the original has run; its failures are not copied."""
    fleet = apps([None, 1])
    original = smart_split()
    truth = run(fleet, original)
    made = run(fleet, COPIES[how](original))
    assert differences(made.state, truth.state) == []
    assert len(made.strategy.round_plans) == len(truth.strategy.round_plans) == 2
    old = legacy_smart_split()
    assert differences(run_legacy(fleet, COPIES[how](old)).state, truth.state) == []
    saving = COPIES[how](Saving(TASK, folder="here", journal=None))
    assert saving.folder == "here"
    assert saving.round_plans == []


# --- a run that merges nothing --------------------------------------------------------


def shouting(optimizer: Any, config: Any) -> None:
    """Fail wherever it is used."""
    raise RuntimeError("no such schedule")


def test_a_run_that_merges_nothing_ends_in_an_error_in_both_apis() -> None:
    """At its end, with the causes; the initial model is no result."""
    task = replace(TASK, schedule_fn=shouting)
    fleet = apps([None] * 2, task=task)
    with pytest.raises(SmartSplitError, match=r"in any round.*4 x .*no such schedule"):
        run(fleet, smart_split(task=task), num_rounds=2)
    with pytest.raises(SmartSplitError, match=r"in any round.*no such schedule"):
        run_legacy(fleet, legacy_smart_split(task=task), num_rounds=2)
    with pytest.raises(SmartSplitError, match=r"in any round.*no route fits"):
        run_legacy(apps([1, 1]), num_rounds=1)


def test_one_bad_round_does_not_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    """All clients may be away for once; the log says so, loudly."""
    fail = {"on": True}

    def once(optimizer: Any, config: Any) -> None:
        if fail["on"]:
            raise RuntimeError("away")

    task = replace(TASK, schedule_fn=once)
    strategy = smart_split(task=task, between_rounds=lambda *_: fail.update(on=False))
    made = run(apps([None] * 2, task=task), strategy, num_rounds=2)
    assert len(made.strategy.failures) == 2
    assert differences(made.state, initial_state()) != []
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert ["Round 1 merged nothing" in each for each in errors] == [True]
