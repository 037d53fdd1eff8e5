"""Provenance: which program on which machine made a result, when and how."""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

PACKAGES = ("flwr-smartsplit", "flwr", "ray", "torch", "torchvision", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a result comes from."""

    command: str  # What was typed
    date: str  # When, in ISO 8601 with the time zone
    versions: dict[str, str]  # Of Python and of every package that matters
    hardware: dict[str, str]  # Processor, cores and memory

    @classmethod
    def of_this_process(cls, arguments: Sequence[str], *, now: datetime) -> Self:
        """Describe the process, started with ``arguments``."""
        return cls(
            command=shlex.join(["python", "-m", "simulations", *arguments]),
            date=now.isoformat(timespec="seconds"),
            versions={
                "python": platform.python_version(),
                **{name: _version(name) for name in PACKAGES},
            },
            hardware={
                "processor": _processor(),
                "cores": str(os.cpu_count()),
                "memory": _memory(),
                "system": f"{platform.system()} {platform.release()}",
            },
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed, run from its source"


def _processor() -> str:
    """Name the processor; Linux keeps it in a file, others tell Python."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    """Say how much memory the machine has, where the system tells."""
    if sys.platform == "win32":
        return "unknown"
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{total_bytes / 2**30:.1f} GiB"
