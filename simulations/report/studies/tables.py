"""Tables: each claim's numbers, the terminal's table and the JSON, all from lines."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import fmean, median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table

from simulations.report.studies.lines import CaseLines, StudyLines
from simulations.report.studies.statistics import (
    Estimate,
    estimate,
    geometric_mean_ratio,
    paired_difference,
)
from simulations.report.summary import (
    bytes_text,
    joules_text,
    percent_text,
    ratio_text,
    seconds_text,
)
from simulations.studies.folder import STUDY

OURS, BOUND, CEILING = "smartsplit", "drop_weak", "fedavg"
"""Our method; what is usually done; the bound that ignores memory."""

FINAL, TAIL = "accuracy", "accuracy_last5"
NOTHING = "–"
Rows = list[tuple[str, ...]]


def gain(case: CaseLines, method: str, reference: str, figure: str) -> Estimate | None:
    """Estimate a method's figure minus that of a reference, seed by seed."""
    if method == reference:
        return None
    return paired_difference(
        case.values(method, figure), case.values(reference, figure)
    )


def gain_text(found: Estimate | None) -> str:
    """Print a gain in points, or a dash."""
    return NOTHING if found is None else found.text()


def mean_of(case: CaseLines, method: str, figure: str) -> float | None:
    """Average a figure over the seeds that know it."""
    values = case.values(method, figure)
    return fmean(values.values()) if values else None


def accuracy_rows(case: CaseLines) -> Rows:
    """Return final accuracy and the mean of the last five evaluations."""
    return [
        (
            method,
            _percent_estimate(case, method, FINAL),
            _percent_estimate(case, method, TAIL),
            _rounds_text(case, method),
            str(len(case.finished[method])),
        )
        for method in case.finished
    ]


def gain_rows(case: CaseLines) -> Rows:
    """Return paired differences to the methods that matter."""
    return [
        (
            method,
            gain_text(gain(case, OURS, method, FINAL)),
            gain_text(gain(case, OURS, method, TAIL)),
            gain_text(gain(case, method, BOUND, FINAL)),
            gain_text(gain(case, method, BOUND, TAIL)),
            gain_text(gain(case, method, CEILING, TAIL)),
        )
        for method in case.finished
    ]


def class_rows(case: CaseLines) -> Rows:
    """Return the accuracy of each class, averaged over the seeds."""
    return [
        (method, *map(_bare_percent, per_class(case, method)))
        for method in case.finished
    ]


def per_class(case: CaseLines, method: str) -> list[float | None]:
    """Average the accuracy of each class over the seeds that have examples of it."""
    rows = [
        line.figures["per_class_accuracy"] for line in case.finished[method].values()
    ]
    classes = [[row[i] for row in rows] for i in range(min(map(len, rows), default=0))]
    known = [[v for v in values if v is not None] for values in classes]
    return [fmean(values) if values else None for values in known]


def participation_rows(case: CaseLines) -> Rows:
    """Count the clients that ever took part."""
    return [
        (
            method,
            _participants_text(case, method),
            _range_text(case, method, "participants"),
        )
        for method in case.finished
    ]


def route_rows(case: CaseLines) -> Rows:
    """List the routes of all updates, with their shares; the smallest part first."""
    found: Rows = []
    for method, lines in case.finished.items():
        counts: Counter[str] = Counter()
        for line in lines.values():
            counts.update(line.figures["routes"])
        texts = [
            f"{name} {counts[name] / counts.total():.0%}"
            for name in sorted(counts, key=depth_of)
        ]
        found.append((method, ", ".join(texts) or NOTHING))
    return found


def depth_of(route: str) -> tuple[bool, str, float]:
    """Order routes by kind, and from the smallest part of the model to the whole of it.

    Examples
    --------
    >>> sorted(["whole", "width 1", "device[:10]", "width 0.5", "device[:2]"],
    ...        key=depth_of)
    ['device[:2]', 'device[:10]', 'width 0.5', 'width 1', 'whole']
    """
    kind, number = re.match(r"(\D*)([\d.]*)", route).groups()  # type: ignore[union-attr]
    return (route == "whole", kind, float(number or 0))


def memory_rows(case: CaseLines) -> Rows:
    """Set peaks against budgets, at worst over the seeds."""
    return [
        (
            method,
            bytes_text(_worst(case, method, "device_peak_bytes") or 0),
            ratio_text(_worst(case, method, "peak_over_budget")),
            f"{_worst(case, method, 'devices_over_budget') or 0:.0f}",
        )
        for method in case.finished
    ]


def traffic_rows(case: CaseLines) -> Rows:
    """Count bytes of the whole run, averaged over the seeds."""
    figures = ("bytes_down", "bytes_up", "comm_bytes_total")
    return [
        (method, *(bytes_text(mean_of(case, method, name) or 0) for name in figures))
        for method in case.finished
    ]


def time_rows(case: CaseLines) -> Rows:
    """Return simulated seconds, and their ratios to FedAvg."""
    return [
        (
            method,
            seconds_text(mean_of(case, method, "simulated_seconds_per_round")),
            seconds_text(_worst(case, method, "simulated_seconds_slowest_round")),
            _ratio_to_ceiling(case, method, "simulated_seconds_per_round"),
            seconds_text(_median_of(case, method, "simulated_seconds_to_target")),
            _reached_text(case, method, "simulated_seconds_to_target"),
            _ratio_to_ceiling(case, method, "simulated_seconds_to_target"),
        )
        for method in case.finished
        if case.values(method, "simulated_seconds_per_round")
    ]


def energy_rows(case: CaseLines) -> Rows:
    """Return simulated joules of the whole run, averaged over the seeds."""
    return [
        (
            method,
            *(
                joules_text(joules)
                for joules in (
                    mean_of(case, method, "simulated_device_joules"),
                    mean_of(case, method, "simulated_edge_joules"),
                )
            ),
        )
        for method in case.finished
        if case.values(method, "simulated_device_joules")
    ]


def headline(study: StudyLines) -> str:
    """Describe a study in one line."""
    config = study.config
    size = "small" if config["is_small"] else "full"
    finished = sum(line.is_finished for line in study.lines)
    wanted = sum(len(c["methods"]) * len(c["seeds"]) for c in config["cases"].values())
    return (
        f"{config[STUDY]} ({size}): {len(config['cases'])} cases, {finished} of "
        f"{wanted} runs finished"
    )


COLUMNS = (
    "method",
    "final\n%",
    "last 5\n%",
    f"{OURS}\ngains on it",
    f"it gains on\n{BOUND}",
    "took\npart",
    "peak /\nbudget",
    "devices\nreceived",
    "slowest\ndevice",
)
"""Heads of the terminal's table, with the line breaks that make it narrow."""


def case_table(case: CaseLines) -> Table:
    """Put the methods of a case side by side."""
    table = Table(
        title=f"{case.title} ({case.num_rounds} rounds)",
        caption="Accuracy: means over the seeds. Gains: points of the mean of the last "
        "5 evaluations, seed by seed, ± half of the 95 % t interval. Took part: those "
        "with an accepted update. Peak / budget: the worst case. Slowest device of a "
        "round: simulated, median.",
        caption_justify="left",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    for name in COLUMNS:
        justify: JustifyMethod = "left" if name == "method" else "right"
        is_name = name == "method"
        table.add_column(name, justify=justify, no_wrap=not is_name, overflow="fold")
    for method in case.finished:
        table.add_row(
            method,
            _bare_percent(mean_of(case, method, FINAL)),
            _bare_percent(mean_of(case, method, TAIL)),
            gain_text(gain(case, OURS, method, TAIL)),
            gain_text(gain(case, method, BOUND, TAIL)),
            _participants_text(case, method).partition(" ")[0],
            ratio_text(_worst(case, method, "peak_over_budget")),
            bytes_text(mean_of(case, method, "bytes_down") or 0),
            seconds_text(mean_of(case, method, "simulated_seconds_per_round")),
        )
    return table


def notes(case: CaseLines) -> list[str]:
    """Say what a reader of a case's numbers must know."""
    found = []
    if case.missing:
        found.append(f"{case.name}: not there yet: {', '.join(case.missing)}")
    left = case.num_seeds * len(case.methods) - len(case.lines)
    if left:
        found.append(f"{case.name}: {left} runs have not begun")
    found += [f"unfinished, not counted: {text}" for text in case.unfinished()]
    if case.num_seeds == 1:
        found.append(f"{case.name}: one seed is one draw, so there are no intervals")
    return found


def study_summary(study: StudyLines) -> dict[str, Any]:
    """Return a study's figures as JSON values, the first case's methods on top."""
    cases = study.cases()
    summaries = {case.name: case_summary(case) for case in cases}
    first = summaries[cases[0].name]["methods"] if cases else {}
    return {STUDY: study.config[STUDY], "methods": first, "cases": summaries}


def case_summary(case: CaseLines) -> dict[str, Any]:
    """Return a case's figures as JSON values."""
    return {
        "title": case.title,
        "missing_methods": list(case.missing),
        "unfinished": case.unfinished(),
        "methods": {method: _method_summary(case, method) for method in case.finished},
    }


def _method_summary(case: CaseLines, method: str) -> dict[str, Any]:
    """Average every number over the seeds, and give accuracies seed by seed."""
    lines = case.finished[method]
    names = dict.fromkeys(
        name
        for line in lines.values()
        for name, value in line.figures.items()
        if isinstance(value, int | float)
    )
    return {
        **{name: _finite(mean_of(case, method, name)) for name in names},
        "num_clients": next(iter(lines.values())).num_clients,
        "seeds": list(lines),
        "accuracy_by_seed": list(case.values(method, FINAL).values()),
        "accuracy_last5_by_seed": list(case.values(method, TAIL).values()),
        "per_class_accuracy": per_class(case, method),
        "state_sha256_by_seed": [line.state_sha256 for line in lines.values()],
        **{
            f"{label}_{figure}": _estimate_values(gain(case, one, other, figure))
            for figure in (FINAL, TAIL)
            for label, one, other in (
                (f"{OURS}_minus_this", OURS, method),
                (f"this_minus_{BOUND}", method, BOUND),
                (f"this_minus_{CEILING}", method, CEILING),
            )
        },
    }


def _estimate_values(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"mean": found.mean, "half_width_95": found.half_width, "seeds": found.num}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _percent_estimate(case: CaseLines, method: str, figure: str) -> str:
    found = estimate(list(case.values(method, figure).values()))
    return NOTHING if found is None else f"{found.text(sign='')} %"


def _rounds_text(case: CaseLines, method: str) -> str:
    """Say in which round the target is reached, and by how many seeds."""
    values = case.values(method, "rounds_to_target")
    if not values:
        return "never"
    reached = _reached_text(case, method, "rounds_to_target")
    return f"{median(values.values()):g} ({reached})"


def _reached_text(case: CaseLines, method: str, figure: str) -> str:
    return f"{len(case.values(method, figure))} of {len(case.finished[method])}"


def _bare_percent(fraction: float | None) -> str:
    return percent_text(fraction).removesuffix(" %")


def _participants_text(case: CaseLines, method: str) -> str:
    mean = mean_of(case, method, "participants") or 0.0
    num_clients = next(iter(case.finished[method].values())).num_clients
    return f"{mean:.{0 if mean.is_integer() else 1}f} of {num_clients}"


def _range_text(case: CaseLines, method: str, figure: str) -> str:
    values = case.values(method, figure).values()
    return f"{min(values):.0f} to {max(values):.0f}" if values else NOTHING


def _reduced(
    case: CaseLines,
    method: str,
    figure: str,
    *,
    reduce: Callable[[Iterable[float]], float],
) -> float | None:
    values = case.values(method, figure)
    return reduce(values.values()) if values else None


def _worst(case: CaseLines, method: str, figure: str) -> float | None:
    return _reduced(case, method, figure, reduce=max)


def _median_of(case: CaseLines, method: str, figure: str) -> float | None:
    return _reduced(case, method, figure, reduce=median)


def _ratio_to_ceiling(case: CaseLines, method: str, figure: str) -> str:
    ratio = geometric_mean_ratio(
        case.values(method, figure), case.values(CEILING, figure)
    )
    return ratio_text(ratio)
