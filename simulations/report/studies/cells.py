"""What the tables and the JSON of a study are made of, all from lines."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from simulations.report.studies.lines import CaseLines, StudyLines
from simulations.report.summary import finite, percent_text
from simulations.studies.folder import STUDY

LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean, and how far the truth may be from it."""

    mean: float  # Over the seeds
    half_width: float | None  # Half of the 95 % t interval; None with a single seed
    num: int  # Seeds

    def text(self, *, scale: float = 100.0, sign: str = "+") -> str:
        """Print mean and half width, in points if not told otherwise."""
        mean = f"{scale * self.mean:{sign}.1f}"
        if self.half_width is None:
            return mean
        return f"{mean} ± {scale * self.half_width:.1f}"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean with its t interval; None of nothing."""
    if not values:
        return None
    num = len(values)
    if num == 1:
        return Estimate(mean=values[0], half_width=None, num=1)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, num - 1))
    half_width = quantile * stdev(values) / math.sqrt(num)
    return Estimate(mean=fmean(values), half_width=half_width, num=num)


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float]
) -> Estimate | None:
    """Estimate ``first - second`` from the seeds that both have."""
    return estimate([first[seed] - second[seed] for seed in first if seed in second])


def geometric_mean_ratio(
    first: Mapping[int, float], second: Mapping[int, float]
) -> float | None:
    """Return the geometric mean of ``first / second`` over the seeds that both have."""
    logs = [
        math.log(first[seed] / second[seed])
        for seed in first
        if seed in second and first[seed] > 0 and second[seed] > 0
    ]
    return math.exp(fmean(logs)) if logs else None


OURS, BOUND, CEILING = "smartsplit", "drop_weak", "fedavg"
"""Our method; what is usually done; the bound that ignores memory."""

UNCODED = "raw"
"""The method whose boundary crosses as it is."""

FINAL, TAIL = "accuracy", "accuracy_last5"
NOTHING = "–"


def gain(case: CaseLines, method: str, reference: str, figure: str) -> Estimate | None:
    """Estimate a method's figure minus that of a reference, seed by seed."""
    if method == reference:
        return None
    return paired_difference(
        case.values(method, figure), case.values(reference, figure)
    )


def mean_of(case: CaseLines, method: str, figure: str) -> float | None:
    """Average a figure over the seeds that know it."""
    values = case.values(method, figure)
    return fmean(values.values()) if values else None


def crossed_bytes(case: CaseLines, method: str, *directions: str) -> float | None:
    """Average what crossed a cut over all updates; both ways if none is named."""
    names = directions or ("edge_bytes_up", "edge_bytes_down")
    total = [sum(case.values(method, name).values()) for name in names]
    lines = case.finished.get(method, {}).values()
    num_updates = sum(sum(line.figures["routes"].values()) for line in lines)
    return sum(total) / num_updates if num_updates and any(total) else None


def per_class(case: CaseLines, method: str) -> list[float | None]:
    """Average the accuracy of each class over the seeds that have examples of it."""
    rows = [
        line.figures["per_class_accuracy"] for line in case.finished[method].values()
    ]
    classes = [[row[i] for row in rows] for i in range(min(map(len, rows), default=0))]
    known = [[v for v in values if v is not None] for values in classes]
    return [fmean(values) if values else None for values in known]


def participants_text(case: CaseLines, method: str) -> str:
    """Say how many clients ever took part, on average over the seeds."""
    mean = mean_of(case, method, "participants") or 0.0
    num_clients = next(iter(case.finished[method].values())).num_clients
    return f"{mean:.{0 if mean.is_integer() else 1}f} of {num_clients}"


def bare_percent(fraction: float | None) -> str:
    """Print a share in percent without the sign."""
    return percent_text(fraction).removesuffix(" %")


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


def headline(study: StudyLines) -> str:
    """Describe a study in one line."""
    config = study.config
    size = "small" if config["is_small"] else "full"
    finished = sum(line.is_finished for line in study.lines)
    wanted = sum(len(c["methods"]) * len(c["seeds"]) for c in config["cases"].values())
    num_cases = len(config["cases"])
    return (
        f"{config[STUDY]} ({size}): {num_cases} case{'s' * (num_cases != 1)}, "
        f"{finished} of {wanted} runs finished"
    )


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
    summaries = {case.name: _case_summary(case) for case in cases}
    first = summaries[cases[0].name]["methods"] if cases else {}
    return {STUDY: study.config[STUDY], "methods": first, "cases": summaries}


def study_figures(study: StudyLines) -> dict[str, dict[str, Any]]:
    """Return the figures of every method; a later case's are ``CASE/METHOD``."""
    return {
        method if not index else f"{case.name}/{method}": _method_summary(case, method)
        for index, case in enumerate(study.cases())
        for method in case.finished
    }


def _case_summary(case: CaseLines) -> dict[str, Any]:
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
        **{name: finite(mean_of(case, method, name)) for name in names},
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
