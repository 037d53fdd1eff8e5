"""Lines: what a study found, one JSON line per case, seed and method.

Every table of a report is made from lines and nothing else, so a file of lines that is
kept in ``simulations/results/`` can print them again without the journals.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from simulations.experiments.errors import ExperimentError
from simulations.experiments.marks import write_whole
from simulations.studies.folder import STUDY

HEADER = "config"
DIGITS = 5
"""Digits that count of the numbers in a kept file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What one method did with one seed of a case."""

    case: str
    method: str
    seed: int  # Root of all chance in this run
    num_clients: int  # Size of the fleet
    state_sha256: str  # Of the final global state; empty if the run was cut short
    figures: Mapping[str, Any]  # ``summary.Figures``, and what is known of targets
    accuracies: Sequence[float]  # After each round, from the first model on
    slowest_seconds: Sequence[float] = ()  # Simulated, by round; empty if unknown

    @property
    def is_finished(self) -> bool:
        """Whether the run got to its end."""
        return bool(self.state_sha256)


@dataclass(frozen=True, kw_only=True)
class CaseLines:
    """The lines of one case, with what is to be known of it."""

    name: str
    title: str
    claim: str  # What it is to show
    methods: tuple[str, ...]  # In the order of reports
    missing: tuple[str, ...]  # Methods that it names and that nobody has written
    target_accuracy: float  # What time-to-accuracy waits for
    num_rounds: int  # Rounds of a finished run
    num_seeds: int  # Seeds that were asked for
    lines: tuple[Line, ...]  # Of runs that have ended and of runs that were cut short

    @classmethod
    def of(
        cls, config: Mapping[str, Any], name: str, lines: Sequence[Line]
    ) -> "CaseLines":
        """Put a case's lines beside what the study's configuration says of it."""
        case = config["cases"][name]
        same = ("title", "claim", "target_accuracy")
        return cls(
            name=name,
            methods=tuple(case["methods"]),
            missing=tuple(case["missing"]),
            num_rounds=case["settings"]["num_rounds"],
            num_seeds=len(case["seeds"]),
            lines=tuple(line for line in lines if line.case == name),
            **{field: case[field] for field in same},
        )

    @cached_property
    def finished(self) -> dict[str, dict[int, Line]]:
        """The finished runs by method and seed, without methods that have none."""
        found: dict[str, dict[int, Line]] = {method: {} for method in self.methods}
        for line in sorted(self.lines, key=lambda line: line.seed):
            if line.is_finished and line.method in found:
                found[line.method][line.seed] = line
        return {method: lines for method, lines in found.items() if lines}

    def unfinished(self) -> list[str]:
        """Say of every run that was cut short how far it got."""
        return [
            f"{self.name}, seed {line.seed}, {line.method}: "
            f"{line.figures['num_rounds']} of {self.num_rounds} rounds"
            for line in self.lines
            if not line.is_finished
        ]

    def values(self, method: str, figure: str) -> dict[int, float]:
        """Return a figure of a method by seed, where it is known."""
        found = {
            seed: line.figures.get(figure)
            for seed, line in self.finished.get(method, {}).items()
        }
        return {seed: float(v) for seed, v in found.items() if v is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyLines:
    """All lines of a study, with its configuration."""

    config: Mapping[str, Any]
    lines: tuple[Line, ...]

    def cases(self) -> tuple[CaseLines, ...]:
        """Return the cases in their order."""
        return tuple(
            CaseLines.of(self.config, name, self.lines) for name in self.config["cases"]
        )


def write_lines(path: Path, study: StudyLines) -> None:
    """Keep a study in one file: its configuration first, then its finished runs."""
    rows = [{HEADER: study.config}]
    rows += [rounded(asdict(line)) for line in study.lines if line.is_finished]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> StudyLines:
    """Read a file that ``write_lines`` has written."""
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        config = json.loads(first)[HEADER]
        lines = tuple(Line(**json.loads(line)) for line in rest)
        if STUDY not in config:
            raise KeyError(STUDY)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{str(path)!r} is no file of a study's lines ({error!r}): give one that "
            "`archive` has written, or a results folder."
        ) from error
    return StudyLines(config=config, lines=lines)


def rounded(value: Any) -> Any:
    """Shorten every float in nested JSON values to five digits that count.

    Examples
    --------
    >>> rounded({"accuracy": [0.12345678, 1]})
    {'accuracy': [0.12346, 1]}
    """
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return value
