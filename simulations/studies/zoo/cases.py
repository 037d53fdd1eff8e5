"""Which models and cuts are compared, and what comparing one of them gives."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Self

from torchvision import models

from flwr_smartsplit import Route, Task, predicted_peak_bytes, profile_chain
from flwr_smartsplit.cli.specs import TORCHVISION, task_of
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.plan.coding import codecs_of, coded_profile
from flwr_smartsplit.types.codecs import codec_from_text
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from flwr_smartsplit.verify.reference import Batches
from simulations.studies.zoo import timm_models, transformers_models

EVERY_CUT = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet"),
    *("inception_v3", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"),
    *("regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t"),
    *("vgg11_bn", "vit_b_32"),
)
"""One model of each family, checked at every cut with every optimizer."""

SUBSET = ("squeezenet1_1", "mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5")
"""What a quick look compares: few parameters, and most of what can go wrong."""

IMAGE_SIDE = 64
IMAGE_SIDES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}
"""The sides of images that are small, yet large enough."""

NUM_RANDOM_CUTS = 5
BATCH_SIZE = 3


SAMPLED = {"timm": timm_models, "transformers": transformers_models}
"""Other libraries, of which a sample of models is compared."""

SAMPLE_SIZE = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model under one optimizer, and the cuts to compare."""

    model: str
    optimizer: str
    is_every_cut: bool
    seed: int
    library: str = "torchvision"
    codec: str = "raw"

    @property
    def key(self) -> str:
        """What it is called in a results folder."""
        codec = "" if self.codec == "raw" else f", {self.codec}"
        return f"{self.model}, {self.optimizer}, seed {self.seed}{codec}"

    def task(self) -> Task:
        """Make the task of training the model on the smallest inputs."""
        if self.library in SAMPLED:
            make: Callable[[str, str], Task] = SAMPLED[self.library].task_of_model
            return make(self.model, self.optimizer)
        shape = image_shape(self.model)
        name = f"{TORCHVISION}{self.model}"
        return task_of(name, input_shape=shape, optimizer=self.optimizer)

    def cuts(self, num_units: int) -> list[int]:
        """Choose cuts; 0 is the whole model on the device."""
        inner = range(1, num_units)
        if self.is_every_cut or len(inner) <= NUM_RANDOM_CUTS:
            return [0, *inner]
        chosen = {1, num_units // 2, num_units - 1}
        if self.library in SAMPLED:
            return sorted({0} | chosen)
        others = [cut for cut in inner if cut not in chosen]
        rng = Random(f"{self.seed}/{self.model}")
        return sorted(chosen | set(rng.sample(others, min(5, len(others)))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one case gave."""

    model: str
    optimizer: str
    num_units: int
    num_parameters: int
    num_cuts: int  # That were compared
    differences: list[str]  # What was not the stock model's, cut by cut
    worst_error: float  # The largest relative one of a predicted peak
    seconds: float  # How long it took
    least_peak_bytes: int | None = None  # Measured, over all cuts
    shortfalls: list[str] = field(default_factory=list)  # Predictions that are too low
    refusal: str = ""  # Why it is not cut
    failure: str = ""  # What went wrong before anything was compared
    edge_bytes: int = 0  # That crossed in all cuts compared, at the wire
    plain_edge_bytes: int = 0  # What that would be without a codec

    @property
    def kind(self) -> str:
        """Sum it up in a word."""
        if self.failure or self.differences:
            return "failed"
        return "refused" if self.refusal else "exact"

    @classmethod
    def from_values(cls, row: Mapping[str, Any]) -> Self:
        """Read a row of a results file."""
        return cls(**{n: row[n] for n in cls.__dataclass_fields__ if n in row})


def image_shape(model: str) -> tuple[int, int, int]:
    """Return the shape of the small images that a model is checked with."""
    side = IMAGE_SIDES.get(model, IMAGE_SIDE)
    return 3, side, side


def run_case(case: Case) -> Outcome:
    """Compare the chosen cuts of one model with the stock model."""
    started = time.perf_counter()
    outcome = Outcome(
        model=case.model,
        optimizer=case.optimizer,
        num_units=0,
        num_parameters=0,
        num_cuts=0,
        differences=[],
        worst_error=0.0,
        seconds=0.0,
    )
    try:
        outcome = _compared(case, outcome)
    except SmartSplitError as error:
        outcome = replace(outcome, refusal=str(error))
    except Exception as error:
        outcome = replace(outcome, failure=f"{type(error).__name__}: {error}")
    return replace(outcome, seconds=time.perf_counter() - started)


def _compared(case: Case, outcome: Outcome) -> Outcome:
    task, codec = case.task(), codec_from_text(case.codec)
    with RouteChecker(task, _batches(task, case.seed)) as checker:
        if not checker.is_finite:
            text = "the stock model's own loss or state is not finite after its steps"
            return replace(outcome, failure=text)
        chain = checker.chain
        plain = profile_chain(chain, batch_size=BATCH_SIZE, task=task)
        profile = coded_profile(plain, (codec,) * (len(chain) - 1))
        routes = [
            Route.split(cut) if cut else Route.whole() for cut in case.cuts(len(chain))
        ]
        checks = [
            checker.check(route, codecs=codecs_of(profile, route)) for route in routes
        ]
    try:
        refusal = ""
        chain.require_cuts()
    except SmartSplitError as error:
        refusal = str(error)
    peaks = [check.measured_peak_bytes for check in checks]
    predicted = [predicted_peak_bytes(profile, route) for route in routes]
    pairs = list(zip(peaks, predicted, strict=True))
    return replace(
        outcome,
        num_units=len(chain),
        num_parameters=sum(p.numel() for p in chain.model.parameters()),
        num_cuts=len(checks),
        differences=[f"{c.route}: {text}" for c in checks for text in c.differences],
        worst_error=max(abs(most - peak) / max(peak, 1) for peak, most in pairs),
        least_peak_bytes=min(peaks),
        shortfalls=[
            f"{route}: {most} bytes, but {peak} needed"
            for route, (peak, most) in zip(routes, pairs, strict=True)
            if most < peak
        ],
        refusal=refusal,
        edge_bytes=sum(check.edge_bytes for check in checks),
        plain_edge_bytes=sum(check.plain_edge_bytes for check in checks),
    )


def _batches(task: Task, seed: int) -> Batches:
    """Draw batches; where there is a mask, half of the examples are padded."""
    batches = example_batches(task, batch_size=BATCH_SIZE, seed=seed)
    for inputs, _ in batches:
        if isinstance(inputs, dict) and "attention_mask" in inputs:
            inputs["attention_mask"][::2, -2:] = 0
    return batches


def measured_case(case: Case, folder: Path) -> dict[str, Any]:
    """Compare one model in a process of its own."""
    del folder
    return asdict(run_case(case))


def classifiers() -> list[str]:
    """List torchvision's classification models, the smallest first."""
    return sorted(models.list_models(module=models), key=_num_parameters)


def _num_parameters(name: str) -> int:
    # The weights' descriptions are at hand without the weights.
    weights: Any = next(iter(models.get_model_weights(name)))
    return int(weights.meta["num_params"])


def all_cases(names: Iterable[str], *, seed: int) -> Iterator[Case]:
    """List the cases of models: three optimizers where every cut is compared."""
    for name in names:
        is_every_cut = name in EVERY_CUT
        optimizers = ("sgd", "momentum", "adam")[0 if is_every_cut else 1 :]
        for optimizer in optimizers:
            yield Case(
                model=name, optimizer=optimizer, is_every_cut=is_every_cut, seed=seed
            )


def sampled_cases(
    library: str, names: Iterable[str] | None, *, num_models: int, seed: int
) -> list[Case]:
    """List the cases of some models of another library, or of a sample of it."""
    names = names or SAMPLED[library].names(num_models, seed=seed)
    return [
        Case(
            model=name,
            optimizer="momentum",
            is_every_cut=False,
            seed=seed,
            library=library,
        )
        for name in names
    ]


def read_outcomes(path: Path | None) -> list[Outcome]:
    """Read a results file, if there is one."""
    if path is None or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Outcome.from_values(json.loads(line)) for line in lines]
