"""The folder of a suite's results: its configuration, and what may be added to it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simulations.experiments.errors import ExperimentError, writing_to
from simulations.experiments.marks import write_whole
from simulations.experiments.provenance import Provenance
from simulations.report.summary import CONFIG
from simulations.studies.study import Case

STUDY, MEASUREMENT, SINGLE = "study", "measurement", "experiment"
"""The key of a configuration says of what kind the suite is."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a results folder; empty if it has none."""
    try:
        read = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return read if isinstance(read, dict) else {}


def begin_folder(
    folder: Path,
    kind: str,
    suite: str,
    *,
    cases: Sequence[Case] = (),
    is_small: bool,
    provenance: Provenance,
) -> None:
    """Start the folder of a suite, or make sure that it is one to go on with.

    Cases, methods and seeds may be added to what is there; settings and versions must
    be the same, since otherwise its numbers could not be compared.
    """
    now = {
        kind: suite,
        "is_small": is_small,
        "cases": {case.name: _case_values(case) for case in cases},
        **asdict(provenance),
    }
    before = read_config(folder)
    if before:
        _refuse_another(folder, before, now, kind=kind)
        now["cases"] = _joined(before["cases"], now["cases"])
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG, json.dumps(now, indent=2) + "\n")


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, path: str = ""
) -> list[str]:
    """Say where two nested mappings differ, leaf by leaf."""
    found: list[str] = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, path=f"{path}{name}.")
        elif old != new:
            found.append(f"{path}{name} is {old!r} there and {new!r} now")
    return found


def _case_values(case: Case) -> dict[str, Any]:
    return {
        "title": case.title,
        "claim": case.claim,
        "target_accuracy": case.target_accuracy,
        "settings": case.settings(),
        "methods": list(case.methods),
        "missing": list(case.missing),
        "seeds": list(range(case.num_seeds)),
    }


def _refuse_another(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, kind: str
) -> None:
    """Refuse a folder of another suite, or of other settings or versions."""
    if kind not in before:
        raise ExperimentError(
            f"{str(folder)!r} holds results of another suite: name another folder with "
            "--out."
        )
    shared = before["cases"].keys() & now["cases"].keys()

    def identity(one: Mapping[str, Any]) -> dict[str, Any]:
        same = ("settings", "target_accuracy")
        cases = {name: {k: one["cases"][name][k] for k in same} for name in shared}
        return {**{k: one[k] for k in (kind, "is_small", "versions")}, **cases}

    found = differences(identity(before), identity(now))
    if found:
        raise ExperimentError(
            f"{str(folder)!r} was begun with another configuration: {'; '.join(found)}"
            ". Name another folder with --out, or remove it."
        )


def _joined(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Add what is new to the cases that are there."""
    joined = dict(before)
    for name, case in now.items():
        old = before.get(name, case)
        methods = [*dict.fromkeys([*old["methods"], *case["methods"]])]
        missing = [*dict.fromkeys([*old["missing"], *case["missing"]])]
        joined[name] = case | {
            "methods": methods,
            "missing": [method for method in missing if method not in methods],
            "seeds": sorted({*old["seeds"], *case["seeds"]}),
        }
    return joined
