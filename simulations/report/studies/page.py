"""The page of a study, a chapter per case, and its tables for the terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from simulations.report.pages import (
    Section,
    html_page,
    picture_of,
    settings_rows,
    terminal_table,
)
from simulations.report.studies.cells import headline, notes
from simulations.report.studies.claims import CLAIMS, TERMINAL, TERMINAL_SINGLE
from simulations.report.studies.curves import gains_of_all_cases
from simulations.report.studies.lines import CaseLines, StudyLines
from simulations.report.studies.reading import CaseResults, read_case
from simulations.report.summary import reasons_to_stay_out
from simulations.studies.folder import SINGLE, STUDY

OVERVIEW = (
    "Right of the line, smartsplit is better. Small dots: seeds; large dots: their "
    "mean, with its 95 % t interval. drop_weak is far off, and in the tables."
)


def study_page(folder: Path, study: StudyLines, claims: Sequence[str]) -> str:
    """Make the page of a study."""
    config = study.config
    overview = picture_of(gains_of_all_cases, study.cases())
    sections = [Section(picture=overview, text=OVERVIEW)] if overview else []
    for name in config["cases"]:
        sections += _chapter(read_case(folder, name), claims)
    settings = [
        (f"{name}: {key}", str(value))
        for name, case in config["cases"].items()
        for key, value in {**case["settings"], "seeds": case["seeds"]}.items()
    ]
    return html_page(
        config[STUDY],
        headline(study),
        sections,
        limits="study",
        settings=[*settings, *settings_rows(config)],
    )


def _chapter(case: CaseResults, claims: Sequence[str]) -> Iterator[Section]:
    """Say what there is to say of one case."""
    lines = case.lines
    yield Section(
        title=lines.title, text=lines.claim, notes=notes(lines), is_chapter=True
    )
    for claim in (CLAIMS[name] for name in claims):
        rows, picture = claim.rows(lines), picture_of(claim.picture, case)
        if rows or picture:
            yield Section(
                title=claim.title,
                text=claim.text,
                picture=picture,
                columns=claim.columns,
                rows=rows,
            )
    stayed_out = [
        (run.method, key, reason)
        for seed in case.seeds[:1]
        for run in seed.results.runs
        for key, reason in reasons_to_stay_out(run).items()
    ]
    yield Section(
        title="Who never took part, and why" if stayed_out else "",
        columns=("method", "client", "the last reason, first seed"),
        rows=stayed_out,
        has_words=True,
    )


def case_table(case: CaseLines, config: Any) -> Table:
    """Put the methods of a case side by side, for a terminal."""
    cells = TERMINAL_SINGLE if SINGLE in config else TERMINAL
    caption = (
        "Peak: the most a device held while training; peak / budget: the worst case. "
        "Simulated: the slowest client on its device, median. Wall-clock: on this "
        "machine, median from round 2 on."
        if SINGLE in config
        else "Accuracy: means over the seeds. Gains: points of the mean of the last 5 "
        "evaluations, seed by seed, ± half of the 95 % t interval. Took part: those "
        "with an accepted update. Peak / budget: the worst case. Slowest device of a "
        "round: simulated, median."
    )
    rows = [
        (method, *(cell(case, method) for cell in cells.values()))
        for method in case.finished
    ]
    return terminal_table(
        ("method", *cells),
        rows,
        title=f"{case.title} ({case.num_rounds} rounds)",
        caption=caption,
    )
