"""The report of ``smartsplit profile``: costs, refused cuts, what fits a budget."""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from flwr_smartsplit.cli.subject import Subject, empty_table
from flwr_smartsplit.errors import NoFeasibleRoute, bytes_text
from flwr_smartsplit.plan.routes import deepest_route
from flwr_smartsplit.types import EDGE, RAW, ChainProfile, Route, UnitCost

MAX_REFUSALS = 5
_HEADERS = (
    "cut",
    "last unit\non the device",
    "param-\neters",
    "gradi-\nents",
    "optim.\nstate",
    "saved\nactiv.",
    "bound-\nary",
    "fwd.\nFLOPs",
    "device\npeak",
    "whole\n/ peak",
)
_FITS = "\nfits"
_BOUNDARY = _HEADERS.index("bound-\nary")
_CODED_HEADERS = (
    *_HEADERS[:_BOUNDARY],
    *("bound-\nary", "gradient\nback", "times\nless"),
    *_HEADERS[_BOUNDARY + 1 :],
)
"""With a codec: what crosses in each direction, and what would, over both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReport:
    """A profiled model, and the memory that a device's tensors may take, if given."""

    subject: Subject
    budget_bytes: int | None

    def as_json(self) -> str:
        """Write everything as one JSON object."""
        subject, profile = self.subject, self.subject.profile
        facts = {
            **subject.facts(),
            **self._numbers(),
            "whole_peak_bytes": profile.units[-1].device_peak_bytes,
            "least_memory_cut": least_memory_cut(profile),
            "refusals": subject.refusals,
            "budget_bytes": self.budget_bytes,
        }
        if self.budget_bytes is not None:
            route = self._deepest_route()
            facts["cuts_within_budget"] = self._fitting_cuts()
            facts["deepest_route"] = None if route is None else str(route)
        return json.dumps(facts)

    def _numbers(self) -> dict[str, Any]:
        """Collect the profile's numbers; with a codec, also what crosses with it."""
        profile, codec = self.subject.profile, self.subject.codec
        numbers: dict[str, Any] = json.loads(profile.to_json())
        if codec != RAW:
            numbers["codec"] = str(codec)
            for values, unit in zip(numbers["units"], profile.units, strict=True):
                values["sent_bytes"], values["back_bytes"] = _crossing(unit)
        return numbers

    def for_people(self) -> RenderableType:
        """Lay the costs out as a table, with a summary below."""
        lines = self._memory_lines()
        if self.budget_bytes is not None:
            lines.append(self._budget_text(self.budget_bytes))
        lines.append(self._refusals_text())
        return self.subject.page(self._table(), *lines)

    def _fitting_cuts(self) -> list[int]:
        units = self.subject.profile.units[:-1]
        return [cut for cut, unit in enumerate(units, start=1) if self._fits(unit)]

    def _deepest_route(self) -> Route | None:
        """Choose the route that the strategy would take; None if nothing fits."""
        profile, budget_bytes = self.subject.profile, self.budget_bytes
        try:
            return deepest_route(profile, budget_bytes=budget_bytes, edge=EDGE)
        except NoFeasibleRoute:
            return None

    def _fits(self, unit: UnitCost) -> bool:
        budget_bytes = self.budget_bytes
        return budget_bytes is not None and unit.device_peak_bytes <= budget_bytes

    def _table(self) -> Table:
        """Show one row per unit; the last is the whole model."""
        units = self.subject.profile.units
        whole_bytes = units[-1].device_peak_bytes
        has_budget = self.budget_bytes is not None
        is_coded = self.subject.codec != RAW
        headers = _CODED_HEADERS if is_coded else _HEADERS
        headers = (*headers, _FITS) if has_budget else headers
        table = empty_table(headers, left=(_HEADERS[1], _FITS))
        table.columns[1].no_wrap = True
        for cut, unit in enumerate(units, start=1):
            is_whole = cut == len(units)
            cells = [
                "whole" if is_whole else str(cut),
                unit.name,
                bytes_text(unit.parameter_bytes),
                bytes_text(unit.gradient_bytes),
                bytes_text(unit.optimizer_state_bytes),
                bytes_text(unit.saved_bytes),
                *self._boundary_cells(unit, is_whole=is_whole),
                count_text(unit.forward_flops),
                bytes_text(unit.device_peak_bytes),
                f"{whole_bytes / unit.device_peak_bytes:.3g}",
            ]
            if has_budget:
                cells.append("yes" if self._fits(unit) else "no")
            table.add_row(*cells)
        return table

    def _boundary_cells(self, unit: UnitCost, *, is_whole: bool) -> list[str]:
        """Show what crosses the cut; with a codec, both ways, and what it saves."""
        if self.subject.codec == RAW:
            return ["" if is_whole else bytes_text(unit.boundary_bytes)]
        if is_whole:
            return ["", "", ""]
        sent, back = _crossing(unit)
        plain = sent + back + unit.coding.saved_bytes + unit.coding.saved_back_bytes
        return [bytes_text(sent), bytes_text(back), f"{plain / (sent + back):.3g}"]

    def _memory_lines(self) -> list[str]:
        profile = self.subject.profile
        whole_bytes = profile.units[-1].device_peak_bytes
        whole_text, batch_text = map(bytes_text, (whole_bytes, profile.batch_bytes))
        lines = [
            f"The whole model needs {whole_text} on the device; a batch, {batch_text}."
        ]
        cut = least_memory_cut(profile)
        if cut is not None:
            unit = profile.units[cut - 1]
            ratio = whole_bytes / unit.device_peak_bytes
            lines.append(
                f"Cut {cut} (after {unit.name}) needs the least: "
                f"{bytes_text(unit.device_peak_bytes)}, {ratio:.3g} times less."
            )
        return lines

    def _refusals_text(self) -> str:
        if self.subject.no_cut_reason is not None:
            return self.subject.no_cut_reason
        refusals = list(self.subject.refusals.items())
        if not refusals:
            return "Every place where a single tensor passes can be cut."
        lines = [f"{len(refusals)} more places look like a cut and must not be one:"]
        lines += [f"  {name}: {reason}" for name, reason in refusals[:MAX_REFUSALS]]
        if len(refusals) > MAX_REFUSALS:
            lines.append(
                f"  and {len(refusals) - MAX_REFUSALS} more; --json lists them all"
            )
        return "\n".join(lines)

    def _budget_text(self, budget_bytes: int) -> str:
        units, route = self.subject.profile.units, self._deepest_route()
        if route is None:
            least = min(unit.device_peak_bytes for unit in units)
            return (
                f"Nothing fits {bytes_text(budget_bytes)}: it takes at least "
                f"{bytes_text(least)}. Lower the batch size or raise the budget."
            )
        cuts = self._fitting_cuts()
        fitting = [f"cuts {spans_text(cuts)}"] if cuts else []
        if self._fits(units[-1]):
            fitting.append("the whole model")
        where = f", after {units[route.cuts[0] - 1].name}" if route.cuts else ""
        return (
            f"Within {bytes_text(budget_bytes)} fit {' and '.join(fitting)}. "
            f"The deepest route: {route}{where}."
        )


def _crossing(unit: UnitCost) -> tuple[int, int]:
    """Return the bytes of a boundary and of its gradient, as the codec writes them."""
    back = sum(each.num_bytes for each in unit.crossing if each.has_gradient)
    coding = unit.coding
    return unit.boundary_bytes - coding.saved_bytes, back - coding.saved_back_bytes


def least_memory_cut(profile: ChainProfile) -> int | None:
    """Find the cut with the least peak on the device; None if there is no cut."""
    peaks = [unit.device_peak_bytes for unit in profile.units[:-1]]
    return peaks.index(min(peaks)) + 1 if peaks else None


def count_text(count: int) -> str:
    """Write a count for a person, with three digits.

    Examples
    --------
    >>> count_text(0), count_text(950), count_text(1_814_073_344)
    ('0', '950', '1.81 G')
    """
    size, prefix = float(count), ""
    for larger in ("k", "M", "G", "T"):
        if size < 999.5:  # noqa: PLR2004 - three digits
            break
        size, prefix = size / 1000, larger
    return f"{count}" if not prefix else f"{size:.3g} {prefix}"


def spans_text(numbers: list[int]) -> str:
    """Write ascending numbers, with neighbours joined.

    Examples
    --------
    >>> spans_text([1, 2, 3, 7])
    '1–3, 7'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("–".join(map(str, span)) for span in spans)
