"""The zoo: every classifier is listed and can be read, and a difference is reported."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models
from typer.testing import CliRunner

from flwr_smartsplit.cli.specs import task_of, torchvision_fn
from flwr_smartsplit.edge.coding import packed_codes
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.split.chain import Chain
from simulations.__main__ import app
from simulations.experiments.errors import ExperimentError
from simulations.experiments.provenance import Provenance
from simulations.studies.folder import MEASUREMENT, begin_folder
from simulations.studies.measurement import ROWS, MeasurementOptions
from simulations.studies.zoo import timm_models, transformers_models
from simulations.studies.zoo.cases import (
    EVERY_CUT,
    SUBSET,
    Case,
    Outcome,
    all_cases,
    classifiers,
    image_shape,
    read_outcomes,
    run_case,
)
from simulations.studies.zoo.reading import page, read, refusal_text
from simulations.studies.zoo.suite import ZOO, items

CASE = Case(model="squeezenet1_1", optimizer="adam", is_every_cut=False, seed=0)


def test_every_classifier_is_a_case_and_the_families_have_every_cut():
    """The list is torchvision's own; sixteen models stand for their families."""
    names = classifiers()
    assert sorted(names) == sorted(models.list_models(module=models))
    assert set(EVERY_CUT) <= set(names)
    assert set(SUBSET) <= set(names)
    cases = list(all_cases(names, seed=0))
    assert len(cases) == 3 * len(EVERY_CUT) + 2 * (len(names) - len(EVERY_CUT))
    assert {case.optimizer for case in cases if not case.is_every_cut} == {
        "momentum",
        "adam",
    }


def test_first_middle_last_and_five_random_cuts_are_compared():
    """The seed and the model choose the random ones; every cut includes none."""
    cuts = CASE.cuts(40)
    assert cuts == CASE.cuts(40) == sorted(set(cuts))
    assert {1, 20, 39} <= set(cuts)
    assert len(cuts) == 3 + 5
    assert cuts != replace(CASE, seed=1).cuts(40)
    assert cuts != replace(CASE, model="resnet18").cuts(40)
    assert replace(CASE, is_every_cut=True).cuts(40) == list(range(40))
    assert CASE.cuts(4) == [0, 1, 2, 3]
    assert CASE.cuts(1) == [0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("squeezenet1_1", "adam"),
        ("mobilenet_v3_small", "momentum"),
    ],
)
def test_a_few_models_are_exact_and_known_to_the_byte(model, optimizer):
    """What CI compares of the proof; the rest is a command of its own."""
    found = run_case(replace(CASE, model=model, optimizer=optimizer))
    assert found.num_cuts == 8
    assert found.differences == []
    assert found.worst_error == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("model", SUBSET)
def test_the_subset_is_exact_at_every_cut(model):
    """Every cut of a few small models, with momentum."""
    found = run_case(
        replace(CASE, model=model, optimizer="momentum", is_every_cut=True)
    )
    assert found.differences == []
    assert found.worst_error == 0.0


def test_an_outcome_survives_its_file(tmp_path: Path):
    """Results are read back as they were written; no file means none."""
    outcome = Outcome(
        model="m",
        optimizer="sgd",
        num_units=3,
        num_parameters=10,
        num_cuts=3,
        differences=["device[:1] > edge[1:]: loss 1.0, not 2.0"],
        worst_error=0.25,
        seconds=1.5,
    )
    path = tmp_path / "results.jsonl"
    assert read_outcomes(path) == read_outcomes(None) == []
    path.write_text(2 * (json.dumps(asdict(outcome)) + "\n"))
    assert read_outcomes(path) == [outcome, outcome]


def spoil(monkeypatch: Any) -> None:
    unpack = WireTensor.unpack

    def unpack_bent(self: WireTensor) -> torch.Tensor:
        values = unpack(self)
        return values * (1 + 1e-6) if values.is_floating_point() else values

    monkeypatch.setattr(WireTensor, "unpack", unpack_bent)


def test_a_difference_ends_in_exit_1_and_is_shown(monkeypatch, tmp_path):
    """A wire that bends values is found in every split, and named."""
    spoil(monkeypatch)
    found = run_case(CASE)
    assert len({text.split(": ")[0] for text in found.differences}) == 8
    provenance = Provenance(command="", date="", versions={}, hardware={})
    begin_folder(tmp_path, MEASUREMENT, "zoo", is_small=True, provenance=provenance)
    rows = tmp_path / ROWS
    other = replace(found, optimizer="momentum", differences=[])
    rows.write_text("".join(json.dumps(asdict(o)) + "\n" for o in (found, other)))
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "squeezenet1_1, adam: device[:1] > edge[1:" in result.stderr
    assert "16 cuts compared" in result.stdout
    rows.write_text(json.dumps(asdict(other)) + "\n")
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0


def test_the_suite_compares_all_models_or_some_or_a_quick_few():
    provenance = Provenance(command="", date="", versions={}, hardware={})
    plain = MeasurementOptions(provenance=provenance)

    def models_of(**changes):
        return {item.key.split(",")[0] for item in items(replace(plain, **changes))}

    assert models_of() == set(classifiers())
    assert models_of(is_small=True) == set(SUBSET)
    assert models_of(models=("resnet18",)) == {"resnet18"}
    assert ZOO.in_processes
    coded = items(replace(plain, models=("resnet18",), codec="packed"))
    assert [item.key for item in coded] == ["resnet18, momentum, seed 0, packed"]
    with pytest.raises(ExperimentError, match=r"--codec .*nope"):
        items(replace(plain, codec="nope"))


def small_relu_net() -> nn.Module:
    """Build a model with a ReLU that most cuts lie behind."""
    layers = nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(256, 10))


def test_a_lossless_codec_is_compared_with_the_stock_model(monkeypatch):
    """Less crosses, and nothing differs; a bit that gets lost is seen."""
    name = f"{__name__}:small_relu_net"
    task = task_of(name, input_shape=(3, 64, 64), optimizer="momentum")
    monkeypatch.setattr(Case, "task", lambda self: task)
    case = replace(CASE, is_every_cut=True, codec="packed")
    found = run_case(case)
    assert (found.kind, found.differences, found.shortfalls) == ("exact", [], [])
    assert 0 < found.edge_bytes < found.plain_edge_bytes
    scattered = packed_codes._scattered

    def bent(*args: Any, **named: Any) -> torch.Tensor:
        return scattered(*args, **named) * (1 + 1e-6)

    monkeypatch.setattr(packed_codes, "_scattered", bent)
    assert run_case(case).differences != []


# --- samples of other libraries -------------------------------------------------------

TIMM = {  # Families, and the width of each of their models
    "plain": {"plain_large": 9, "plain_small": 2, "plain_base": 4, "plain_huge": 99},
    "sized": {"sized_tiny": 3},
    "empty": {},
}


class FromImages(nn.Module):
    """Takes images of 64 pixels; one family must be told, the other must not."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.body = nn.Conv2d(3, width, 8, stride=8)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == self.side == 64
        return self.head(self.body(x).mean((2, 3)))


def create_model(name: str, num_classes: int, **options: int) -> nn.Module:
    assert num_classes == 10
    family = name.partition("_")[0]
    side = options.pop("img_size", 224) if family == "sized" else 64
    if options:
        raise TypeError("img_size is unknown")
    return FromImages(TIMM[family][name], side)


@pytest.fixture
def small_timm(monkeypatch):
    """Put a library of two families in place of timm."""
    library = SimpleNamespace(
        list_modules=lambda: list(TIMM),
        list_models=lambda module: list(TIMM[module]),
        create_model=create_model,
    )
    monkeypatch.setitem(sys.modules, "timm", library)
    for function in (timm_models._library, timm_models.num_parameters):
        function.cache_clear()
    yield
    timm_models._library.cache_clear()
    timm_models.num_parameters.cache_clear()


def test_the_smallest_model_of_each_family_is_taken_first(small_timm):
    """Then families take turns with others of their smaller half."""
    assert timm_models.names(2, seed=0) == ["plain_small", "sized_tiny"]
    assert timm_models.names(9, seed=0) == ["plain_small", "sized_tiny", "plain_base"]


@pytest.mark.parametrize("name", ["plain_small", "sized_tiny"])
def test_a_model_of_timm_gets_the_smallest_images_that_it_takes(small_timm, name):
    """Some are built for a size, others take any from some size on."""
    found = run_case(replace(CASE, model=name, library="timm"))
    assert timm_models.task_of_model(name, "sgd").example_inputs.shape[-1] == 64
    assert (found.kind, found.num_cuts, found.shortfalls) == ("exact", 3, [])


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    """The command says what to install; an unknown library is refused."""
    monkeypatch.setitem(sys.modules, "timm", None)
    timm_models._library.cache_clear()
    for library, text in {"timm": "pip install timm", "keras": "choose one"}.items():
        asked = ["run", "zoo", "--library", library, "--out", "unused"]
        result = CliRunner().invoke(app, asked)
        assert (result.exit_code, text in result.stderr) == (2, True)


@pytest.mark.slow
def test_models_of_transformers_are_exact_or_refused_with_the_reason():
    """One of each; the rest is a command of its own."""
    model = "DistilBertForTokenClassification"
    case = replace(CASE, library="transformers", model=model)
    found = run_case(case)
    assert (found.kind, found.num_cuts) == ("exact", 5)
    assert found.differences == found.shortfalls == []
    refused = run_case(replace(case, model="DebertaV2ForMaskedLM"))
    assert refused.kind == "refused"
    assert "torch.fx cannot trace" in refused.refusal


def test_a_model_that_fails_is_a_failure_not_a_refusal(monkeypatch, tmp_path):
    """It ends in exit 1, as a prediction below what is measured does."""
    monkeypatch.setitem(transformers_models.MODELS, "NoSuchModel", None)
    case = replace(CASE, library="transformers", model="NoSuchModel")
    found = run_case(case)
    assert found.kind == "failed"
    short = replace(found, failure="", shortfalls=["whole: 1 bytes, but 2 needed"])
    report = ZOO.report_fn([asdict(found), asdict(short)])
    assert "1 exact, 0 refused, 1 failed" in report.headline
    assert [text.partition(": ")[2] for text in report.problems] == [
        found.failure,
        *short.shortfalls,
    ]


# --- the page -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(models.list_models(module=models)))
def test_every_classifier_can_be_cut(name):
    """All of them, read without memory for their parameters."""
    shape = image_shape(name)
    reading = read(
        "classification", name, torchvision_fn(name, shape), torch.zeros(1, *shape)
    )
    assert reading.num_units > 10


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def meta_sum() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Linear(2, int(layer.weight.sum()))


@pytest.mark.parametrize(
    ("build", "num_units", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 2, ""),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(True), nn.Linear(2, 2)),
            2,
            "1: written in place later",
        ),
        (Branching, 0, "torch.fx cannot trace Branching: "),
        (meta_sum, 0, "it computes with its parameters while it is built: "),
    ],
)
def test_a_reading_says_how_many_places_or_why_not(
    build: Callable[[], nn.Module], num_units: int, reason: str
):
    """Each model gives a row, whatever happens to it."""
    reading = read("own", "model", build, torch.zeros(1, 2))
    assert reading.num_units == num_units
    assert reading.reason.startswith(reason)


def test_the_page_counts_what_cuts_and_what_was_compared():
    """One table a kind, with the proofs of all optimizers added up."""
    reading = read("own", "two", lambda: nn.Sequential(nn.Linear(2, 2)), torch.zeros(2))
    cut = replace(reading, model="cut", num_units=5, num_parameters=2_500_000)
    proof = Outcome(
        model="cut",
        optimizer="sgd",
        num_units=5,
        num_parameters=1,
        num_cuts=4,
        differences=["x"],
        worst_error=0.0,
        seconds=0.0,
    )
    text = page([cut, reading], [proof, proof], origin="torch 0")
    assert "## Own: 1 of 2 cut" in text
    assert "| cut | 2.5 M | 4 | 8 | 2 |" in text
    assert "| two | 0.0 M | 0 | – | – |" in text


def test_reasons_are_counted_by_kind():
    """Near-identical refusals become one line."""
    model = nn.Sequential(
        *(nn.Linear(2, 2), nn.ReLU(True), nn.Linear(2, 2), nn.ReLU(True)),
        nn.Linear(2, 2),
    )
    chain = Chain.from_module(model, torch.zeros(1, 2))
    assert refusal_text(chain) == "2: written in place later"


class Overflows(nn.Module):
    """Its buffer becomes infinite in training, as a small batch's variance may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 10)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        """Forget all sense of proportion."""
        if self.training:
            self.scale.mul_(torch.inf)
        return self.layer(x.flatten(1))


def test_a_stock_model_that_diverges_is_no_difference(monkeypatch):
    """Edges refuse what is not finite, as they should; nothing can be compared."""
    task = replace(
        task_of("torchvision:resnet18", input_shape=(3, 32, 32), optimizer="sgd"),
        model_fn=Overflows,
    )
    monkeypatch.setattr(Case, "task", lambda self: task)
    found = run_case(CASE)
    assert found.failure == (
        "the stock model's own loss or state is not finite after its steps"
    )
    assert (found.kind, found.differences, found.num_cuts) == ("failed", [], 0)
