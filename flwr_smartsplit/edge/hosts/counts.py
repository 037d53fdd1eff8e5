"""Counts: what an edge has done, for Prometheus."""

from collections import Counter
from collections.abc import Mapping
from threading import Lock

_HELP = {
    "requests_total": "Requests answered, by kind; each Forward is a step.",
    "request_seconds_total": "Seconds that they took.",
    "refused_total": "Requests refused or failed, by the error's name.",
    "received_bytes_total": "Bytes of requests.",
    "sent_bytes_total": "Bytes of replies.",
    "streams": "Open connections of clients and strategies.",
    "runs": "Runs that have begun and not ended.",
    "sessions": "Open sessions.",
    "reserved_bytes": "Memory that open sessions reserve, where it is limited.",
    "memory_bytes": "Memory of the edge's process.",
    "spill_bytes": "Disk that held states and sealed tails take.",
    "draining": "1 while the edge takes no new sessions.",
}
Label = tuple[str, str, str]  # Metric, label and its value


class Counts:
    """Numbers that only grow; thread-safe."""

    def __init__(self) -> None:
        self._found: Counter[Label] = Counter()
        self._lock = Lock()

    def add(
        self, metric: str, amount: float = 1, *, label: str = "", value: str = ""
    ) -> None:
        """Add to a metric, or to the part of it that a label names."""
        with self._lock:
            self._found[metric, label, value] += amount  # type: ignore[assignment]

    def text(self, present: Mapping[str, float]) -> str:
        """Write what was counted, and the present values, as Prometheus reads them."""
        with self._lock:
            found: dict[Label, float] = dict(self._found)
        found |= {(metric, "", ""): value for metric, value in present.items()}
        lines, metrics = [], {metric for metric, _, _ in found}
        for metric in (name for name in _HELP if name in metrics):
            kind = "counter" if metric.endswith("_total") else "gauge"
            name = f"smartsplit_edge_{metric}"
            lines += [f"# HELP {name} {_HELP[metric]}", f"# TYPE {name} {kind}"]
            for (which, label, value), number in sorted(found.items()):
                if which == metric:
                    labels = f'{{{label}="{value}"}}' if label else ""
                    lines.append(f"{name}{labels} {number:.17g}")
        return "\n".join([*lines, ""])
