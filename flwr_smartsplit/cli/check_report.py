"""The report of ``smartsplit check``: which routes are exact and well predicted."""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import RenderableType

from flwr_smartsplit.cli.specs import first_line
from flwr_smartsplit.cli.subject import Subject, empty_table
from flwr_smartsplit.errors import InvalidTask, SmartSplitError, bytes_text
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.coding import codecs_of
from flwr_smartsplit.types import RAW, Packed, Route, is_lossless
from flwr_smartsplit.verify.equivalence import CutCheck, RouteChecker, example_batches
from flwr_smartsplit.verify.guard import route_trials

_LEFT = ("route", "after", "numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteResult:
    """One route, compared with the stock model and with its predicted peak.

    ``tolerance`` is the accepted relative error of the prediction.
    """

    check: CutCheck
    predicted_peak_bytes: int
    tolerance: float
    is_bound: bool = False  # Whether the prediction is the most that it may be

    @property
    def is_exact(self) -> bool:
        """Whether every number is the stock model's."""
        return not self.check.differences

    @property
    def relative_error(self) -> float | None:
        """Relative error of the prediction; None if nothing was measured."""
        measured_bytes = self.check.measured_peak_bytes
        if not measured_bytes:
            return None
        return (self.predicted_peak_bytes - measured_bytes) / measured_bytes

    @property
    def is_predicted(self) -> bool:
        """Whether the prediction is within the tolerance."""
        error = self.relative_error
        if error is None:
            return False
        return -self.tolerance <= error and (self.is_bound or error <= self.tolerance)

    def facts(self) -> dict[str, Any]:
        """Collect everything for JSON."""
        return {
            "route": str(self.check.route),
            "cuts": self.check.route.cuts,
            "is_exact": self.is_exact,
            "differences": self.check.differences,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "measured_peak_bytes": self.check.measured_peak_bytes,
            "relative_error": self.relative_error,
            "is_predicted": self.is_predicted,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """A model, and the result of each route that was checked."""

    subject: Subject
    seed: int
    results: Sequence[RouteResult]
    merge_differences: Sequence[str]

    @property
    def is_good(self) -> bool:
        """Whether nothing differs anywhere."""
        return not self.merge_differences and all(
            result.is_exact and result.is_predicted for result in self.results
        )

    def as_json(self) -> str:
        """Write everything as one JSON object."""
        facts = self.subject.facts() | {
            "seed": self.seed,
            **({} if self.subject.codec == RAW else {"codec": str(self.subject.codec)}),
            "is_good": self.is_good,
            "merge_differences": list(self.merge_differences),
            "routes": [result.facts() for result in self.results],
        }
        return json.dumps(facts)

    def for_people(self) -> RenderableType:
        """Lay the routes out as a table, with a summary below."""
        table = empty_table((*_LEFT, "predicted", "measured", "error"), left=_LEFT)
        for result in self.results:
            check, error = result.check, result.relative_error
            table.add_row(
                str(check.route),
                self.subject.last_unit(check.route) if check.route.cuts else "",
                _text(check.differences),
                bytes_text(result.predicted_peak_bytes),
                bytes_text(check.measured_peak_bytes),
                "unknown" if error is None else f"{error:.2g}",
            )
        num = len(self.results)
        exact = sum(result.is_exact for result in self.results)
        predicted = sum(result.is_predicted for result in self.results)
        codec = self.subject.codec
        with_codec = "" if codec == RAW else f" with {codec} at the cut"
        summary = (
            f"{exact} of {num} {'route' if num == 1 else 'routes'} gave the stock "
            f"model's numbers{with_codec} to the last bit; {predicted} of {num} "
            "predictions hold."
        )
        merged = f"Two clients merged, loaded into it: {_text(self.merge_differences)}."
        return self.subject.page(table, summary, merged, self.subject.no_cut_reason)


def trained_checker(subject: Subject, *, seed: int) -> RouteChecker:
    """Train the stock model on batches drawn by a seed, to compare routes with."""
    batch_size = subject.profile.batch_size
    batches = example_batches(subject.task, batch_size=batch_size, seed=seed)
    try:
        return RouteChecker(subject.task, batches)
    except SmartSplitError:
        raise
    except Exception as error:
        raise InvalidTask(
            f"the stock model of {subject.model} cannot be trained: {first_line(error)}"
        ) from error


def check_routes(
    subject: Subject, cuts: Sequence[int], checker: RouteChecker, *, tolerance: float
) -> Generator[RouteResult]:
    """Train along the whole route and each cut; yield each result when it is known."""
    with checker:
        for route in (Route.whole(), *map(Route.split, cuts)):
            yield RouteResult(
                check=_checked(subject, route, checker),
                predicted_peak_bytes=predicted_peak_bytes(subject.profile, route),
                tolerance=tolerance,
                is_bound=isinstance(subject.codec, Packed) and bool(route.cuts),
            )


def _checked(subject: Subject, route: Route, checker: RouteChecker) -> CutCheck:
    """Check a route as it is; then with recomputation, and with a cut that moves.

    The stock model has the codec, if it rounds, at the route's cut, which then cannot
    move.
    """
    codecs = codecs_of(subject.profile, route)
    check = checker.check(route, codecs=codecs)
    differences = [*check.differences]
    for trial in route_trials(subject.profile, route):
        if not is_lossless(subject.codec) and trial.move_to is not None:
            continue
        found = trial.run(checker, codecs).differences
        differences += [f"{trial.change()}: {each}" for each in found]
    return replace(check, differences=tuple(differences))


def _text(differences: Sequence[str]) -> str:
    if not differences:
        return "exact"
    first = " ".join(differences[0].split())
    if len(differences) == 1:
        return f"differ: {first}"
    return f"{len(differences)} differ, first: {first}"
