"""The zoo suite: a library's models, cut and compared bit for bit.

Each is trained whole in a plain loop and along cut routes, over the bytes of the wire.
Predicted peaks are set against measured ones.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from flwr_smartsplit.types.codecs import codec_from_text
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

COLUMNS = (
    *("model", "optimizer", "cuts compared", "differ", "worst prediction"),
    *("times less crosses", "is"),
)
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
        sample = sampled_cases(
            library, options.models, num_models=num_models, seed=options.seed
        )
        return _coded(sample, options.codec)
    if library != "torchvision":
        raise ExperimentError(
            f"--library {library!r} is not known: choose one of "
            f"{', '.join(['torchvision', *SAMPLED])}."
        )
    names = options.models or (SUBSET if options.is_small else classifiers())
    return _coded(all_cases(names[:num_models], seed=options.seed), options.codec)


def _coded(cases: Iterable[Case], codec: str) -> list[Case]:
    """Have a codec at each cut, with one optimizer, of which it does not know."""
    try:
        codec_from_text(codec)
    except ValueError as error:
        raise ExperimentError(f"--codec {error}") from None
    if codec == "raw":
        return list(cases)
    return [replace(c, codec=codec) for c in cases if c.optimizer == "momentum"]


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
            times_less([outcome]),
            outcome.kind,
        )
        for outcome in outcomes
    ]
    cuts = sum(outcome.num_cuts for outcome in outcomes)
    differ = sum(len(outcome.differences) for outcome in outcomes)
    worst = max((outcome.worst_error for outcome in outcomes), default=0.0)
    models = f"{len({outcome.model for outcome in outcomes})} models"
    less, kinds = times_less(outcomes), Counter(o.kind for o in outcomes)
    result = ", ".join(
        f"{kinds[kind]} {kind}" for kind in ("exact", "refused", "failed")
    )
    return Report(
        headline=f"zoo: {models}, {cuts} cuts compared, {differ} differ ({result})",
        columns=COLUMNS,
        cells=[
            *cells,
            (models, "", str(cuts), str(differ), f"{worst:.3%}", less, result),
        ],
        caption=_reasons(outcomes),
        problems=[
            f"{outcome.model}, {outcome.optimizer}: {text}"
            for outcome in outcomes
            for text in _problems(outcome)[:MOST_PROBLEMS]
        ],
    )


def times_less(outcomes: Sequence[Outcome]) -> str:
    """Say how many times less crosses all cuts with the codec than without."""
    sent = sum(outcome.edge_bytes for outcome in outcomes)
    plain = sum(outcome.plain_edge_bytes for outcome in outcomes)
    return f"{plain / sent:.2f}" if sent else ""


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
    options=frozenset(
        {"models", "small", "seed", "workers", "library", "sample", "codec"}
    ),
    in_processes=True,
    preload=("simulations.studies.zoo.cases", "timm", "transformers"),
)
