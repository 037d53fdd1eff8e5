"""The zoo suite: a library's models, cut and compared bit for bit.

Each is trained whole in a plain loop and along cut routes, over the bytes of the wire.
Predicted peaks are set against measured ones.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from simulations.experiments.errors import ExperimentError
from simulations.studies.measurement import (
    Item,
    Measurement,
    MeasurementOptions,
    Report,
    Row,
)
from simulations.studies.zoo.cases import (
    SAMPLE_SIZE,
    SAMPLED,
    SUBSET,
    Case,
    Outcome,
    all_cases,
    classifiers,
    measured_case,
    sampled_cases,
)

COLUMNS = ("model", "optimizer", "cuts compared", "differ", "worst prediction", "is")
MOST_PROBLEMS = 5


def items(options: MeasurementOptions) -> list[Item]:
    """List models and optimizers; ``--small`` takes four models."""
    return [
        Item(key=case.key, measure=partial(measured_case, case))
        for case in _cases(options)
    ]


def _cases(options: MeasurementOptions) -> Sequence[Case]:
    library, num_models = options.library or "torchvision", options.num_models
    if library in SAMPLED:
        num_models = len(SUBSET) if options.is_small else num_models or SAMPLE_SIZE
        return sampled_cases(
            library, options.models, num_models=num_models, seed=options.seed
        )
    if library != "torchvision":
        raise ExperimentError(
            f"--library {library!r} is not known: choose one of "
            f"{', '.join(['torchvision', *SAMPLED])}."
        )
    names = options.models or (SUBSET if options.is_small else classifiers())
    return list(all_cases(names[:num_models], seed=options.seed))


def report_of(rows: Sequence[Row]) -> Report:
    """Lay out what was compared, a line for each model and optimizer."""
    outcomes = sorted(
        map(Outcome.from_values, rows), key=lambda o: (o.model, o.optimizer)
    )
    cells = [
        (
            outcome.model,
            outcome.optimizer,
            f"{outcome.num_cuts} of {outcome.num_units}",
            str(len(outcome.differences)),
            f"{outcome.worst_error:.3%}",
            outcome.kind,
        )
        for outcome in outcomes
    ]
    cuts = sum(outcome.num_cuts for outcome in outcomes)
    differ = sum(len(outcome.differences) for outcome in outcomes)
    worst = max((outcome.worst_error for outcome in outcomes), default=0.0)
    models = f"{len({outcome.model for outcome in outcomes})} models"
    kinds = Counter(outcome.kind for outcome in outcomes)
    result = ", ".join(
        f"{kinds[kind]} {kind}" for kind in ("exact", "refused", "failed")
    )
    return Report(
        headline=f"zoo: {models}, {cuts} cuts compared, {differ} differ ({result})",
        columns=COLUMNS,
        cells=[*cells, (models, "", str(cuts), str(differ), f"{worst:.3%}", result)],
        caption=_reasons(outcomes),
        problems=[
            f"{outcome.model}, {outcome.optimizer}: {text}"
            for outcome in outcomes
            for text in _problems(outcome)[:MOST_PROBLEMS]
        ],
    )


def _problems(outcome: Outcome) -> list[str]:
    failure = [outcome.failure] if outcome.failure else []
    return [*failure, *outcome.differences, *outcome.shortfalls]


def _reasons(outcomes: Sequence[Outcome]) -> str:
    """Count why models are refused."""
    reasons = Counter(_reason(each.refusal) for each in outcomes if each.refusal)
    return "; ".join(f"{count} refused: {why}" for why, count in reasons.most_common())


def _reason(refusal: str) -> str:
    """Strip names off a refusal."""
    return refusal.partition(": ")[2].partition(". ")[0].partition(";")[0]


def figures(rows: Sequence[Row]) -> dict[str, Row]:
    """Return the least peak of each model and optimizer, over the cuts compared."""
    return {
        f"{each.model}, {each.optimizer}": {"device_peak_bytes": each.least_peak_bytes}
        for each in map(Outcome.from_values, rows)
    }


ZOO = Measurement(
    name="zoo",
    summary="Models of three libraries cut, and compared to the last bit.",
    items_fn=items,
    report_fn=report_of,
    figures_fn=figures,
    options=frozenset({"models", "small", "seed", "workers", "library", "sample"}),
    in_processes=True,
    preload=("simulations.studies.zoo.cases", "timm", "transformers"),
)
