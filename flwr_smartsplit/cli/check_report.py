"""What ``smartsplit check`` says of each route: exact or not, predicted or not."""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from flwr_smartsplit.cli.profile_report import versions
from flwr_smartsplit.cli.specs import first_line
from flwr_smartsplit.cli.subject import Subject
from flwr_smartsplit.errors import InvalidTask, SmartSplitError, bytes_text
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import CutCheck, RouteChecker, example_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteResult:
    """One route beside the stock model, and beside its prediction.

    Parameters
    ----------
    check : CutCheck
        What training along the route gave.
    predicted_peak_bytes : int
        What the profile says that the device holds at most.
    tolerance : float
        The relative error of the prediction that counts as none.
    """

    check: CutCheck
    predicted_peak_bytes: int
    tolerance: float

    @property
    def is_exact(self) -> bool:
        """Whether every number is the stock model's."""
        return not self.check.differences

    @property
    def relative_error(self) -> float | None:
        """How far the prediction is off, as a fraction; None if not measured."""
        measured_bytes = self.check.measured_peak_bytes
        if not measured_bytes:
            return None
        return (self.predicted_peak_bytes - measured_bytes) / measured_bytes

    @property
    def is_predicted(self) -> bool:
        """Whether the prediction is as good as was asked for."""
        error = self.relative_error
        return error is not None and abs(error) <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """A model, and how each checked route of it did."""

    subject: Subject
    seed: int
    results: Sequence[RouteResult]

    @property
    def is_good(self) -> bool:
        """Whether nothing differs anywhere."""
        return all(result.is_exact and result.is_predicted for result in self.results)

    def as_json(self) -> str:
        """Write everything as one JSON object."""
        subject = self.subject
        facts = {
            "model": subject.model,
            "input_shapes": subject.input_shapes,
            "batch_size": subject.profile.batch_size,
            "optimizer": subject.optimizer,
            "versions": versions(),
            "seed": self.seed,
            "is_good": self.is_good,
            "no_cut_reason": subject.no_cut_reason,
            "routes": [self._facts(result) for result in self.results],
        }
        return json.dumps(facts)

    def for_people(self) -> RenderableType:
        """Lay the routes out as a table, with the sum of it below."""
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        for header in ("route", "after", "numbers"):
            table.add_column(header, overflow="fold")
        for header in ("predicted", "measured", "error"):
            table.add_column(header, justify="right", overflow="fold")
        for result in self.results:
            check, error = result.check, result.relative_error
            table.add_row(
                str(check.route),
                self._last_unit(check.route),
                _differences_text(check.differences),
                bytes_text(result.predicted_peak_bytes),
                bytes_text(check.measured_peak_bytes),
                "unknown" if error is None else f"{error:.2g}",
            )
        reason = self.subject.no_cut_reason
        lines = [self._verdict(), *([reason] if reason else [])]
        heading = self.subject.heading()
        return Group(f"{heading}\n", table, *(f"\n{line}" for line in lines))

    def _verdict(self) -> str:
        num = len(self.results)
        exact = sum(result.is_exact for result in self.results)
        predicted = sum(result.is_predicted for result in self.results)
        return (
            f"{exact} of {num} {'route' if num == 1 else 'routes'} gave the stock "
            f"model's numbers to the last bit; {predicted} of {num} predictions hold."
        )

    def _last_unit(self, route: Route) -> str:
        units = self.subject.profile.units
        return units[route.cuts[0] - 1].name if route.cuts else ""

    def _facts(self, result: RouteResult) -> dict[str, Any]:
        check = result.check
        return {
            "route": str(check.route),
            "cuts": check.route.cuts,
            "is_exact": result.is_exact,
            "differences": check.differences,
            "predicted_peak_bytes": result.predicted_peak_bytes,
            "measured_peak_bytes": check.measured_peak_bytes,
            "relative_error": result.relative_error,
            "is_predicted": result.is_predicted,
        }


def trained_checker(subject: Subject, *, seed: int) -> RouteChecker:
    """Train the stock model on batches drawn by a seed, to compare routes with.

    Raises
    ------
    InvalidTask
        If it cannot be trained.
    """
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
    """Train along the whole route and each cut, one after the other.

    Parameters
    ----------
    subject : Subject
        What to check.
    cuts : Sequence[int]
        Where to cut, each on a route of its own.
    checker : RouteChecker
        The subject's, not yet entered.
    tolerance : float
        The relative error of a prediction that counts as none.

    Yields
    ------
    RouteResult
        One per route, as soon as it is known.
    """
    with checker:
        for route in (Route.whole(), *map(Route.split, cuts)):
            yield RouteResult(
                check=checker.check(route),
                predicted_peak_bytes=predicted_peak_bytes(subject.profile, route),
                tolerance=tolerance,
            )


def _differences_text(differences: Sequence[str]) -> str:
    if not differences:
        return "exact"
    first = " ".join(differences[0].split())
    if len(differences) == 1:
        return f"differ: {first}"
    return f"{len(differences)} differ, first: {first}"
