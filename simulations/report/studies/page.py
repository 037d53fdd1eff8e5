"""The page of a study: pictures first, one table per claim, a chapter per case."""

from pathlib import Path
from typing import Any

from simulations.report.pages import embedded, render
from simulations.report.plots import svg_of
from simulations.report.studies.claims import CLAIMS
from simulations.report.studies.curves import gains_of_all_cases
from simulations.report.studies.lines import StudyLines
from simulations.report.studies.reading import CaseResults, read_case
from simulations.report.studies.tables import headline, notes
from simulations.studies.folder import STUDY
from simulations.studies.suites import STUDIES

TEMPLATE = "study.html.jinja"


def html_page(folder: Path, study: StudyLines) -> str:
    """Make one HTML page that needs no other file and no network.

    Parameters
    ----------
    folder : Path
        The study's folder, whose journals are read again case by case.
    study : StudyLines
        What was found in it.
    """
    config = study.config
    overview = svg_of(gains_of_all_cases, study.cases())
    return render(
        TEMPLATE,
        name=config[STUDY],
        headline=headline(study),
        overview=embedded(overview) if overview else "",
        chapters=[
            _chapter(read_case(folder, name), STUDIES[config[STUDY]].claims)
            for name in config["cases"]
        ],
        settings=settings_rows(config),
    )


def _chapter(case: CaseResults, claims: tuple[str, ...]) -> dict[str, Any]:
    """Make what is said of one case."""
    sections = []
    for claim in (CLAIMS[name] for name in claims):
        rows = claim.rows(case.lines)
        picture = svg_of(claim.picture, case)
        if rows or picture:
            sections.append((claim, embedded(picture) if picture else "", rows))
    lines = case.lines
    return {"case": lines, "notes": notes(lines), "sections": sections}


def settings_rows(config: Any) -> list[tuple[str, str]]:
    """Flatten the configuration into names and values."""
    return [
        ("command", config["command"]),
        ("date", config["date"]),
        *(
            (f"{name}: {key}", str(value))
            for name, case in config["cases"].items()
            for key, value in {**case["settings"], "seeds": case["seeds"]}.items()
        ),
        *((f"version of {name}", v) for name, v in config["versions"].items()),
        *config["hardware"].items(),
    ]
