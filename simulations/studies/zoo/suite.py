"""The zoo suite: every torchvision classifier, cut and compared bit for bit.

Each is trained whole in a plain loop and along cut routes, over the bytes of the wire.
Predicted peaks are set against measured ones.
"""

from collections.abc import Sequence
from functools import partial

from simulations.studies.measurement import (
    Item,
    Measurement,
    MeasurementOptions,
    Report,
    Row,
)
from simulations.studies.zoo.cases import (
    SUBSET,
    Outcome,
    all_cases,
    classifiers,
    measured_case,
)

COLUMNS = ("model", "optimizer", "cuts compared", "differ", "worst prediction")
MOST_PROBLEMS = 5


def items(options: MeasurementOptions) -> list[Item]:
    """List models and optimizers; ``--small`` takes four models."""
    names = options.models or (SUBSET if options.is_small else classifiers())
    return [
        Item(key=case.key, measure=partial(measured_case, case))
        for case in all_cases(names, seed=options.seed)
    ]


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
        )
        for outcome in outcomes
    ]
    cuts = sum(outcome.num_cuts for outcome in outcomes)
    differ = sum(len(outcome.differences) for outcome in outcomes)
    worst = max((outcome.worst_error for outcome in outcomes), default=0.0)
    models = f"{len({outcome.model for outcome in outcomes})} models"
    return Report(
        headline=f"zoo: {models}, {cuts} cuts compared, {differ} differ",
        columns=COLUMNS,
        cells=[*cells, (models, "", str(cuts), str(differ), f"{worst:.3%}")],
        problems=[
            f"{outcome.model}, {outcome.optimizer}: {text}"
            for outcome in outcomes
            for text in outcome.differences[:MOST_PROBLEMS]
        ],
    )


def figures(rows: Sequence[Row]) -> dict[str, Row]:
    """Return the least peak of each model and optimizer, over the cuts compared."""
    return {
        f"{each.model}, {each.optimizer}": {"device_peak_bytes": each.least_peak_bytes}
        for each in map(Outcome.from_values, rows)
    }


ZOO = Measurement(
    name="zoo",
    summary="Every torchvision classifier cut, and compared to the last bit.",
    items_fn=items,
    report_fn=report_of,
    figures_fn=figures,
    in_processes=True,
)
