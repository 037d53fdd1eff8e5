"""Run a short suite on the corners of the versions that are supported.

``make test-matrix`` runs it; only the standard library is needed. Each corner gets an
environment of its own, of about 6.5 GB, one after the other; it is deleted afterwards
unless ``KEEP=1``. ``CORNERS="newest oldest"`` runs some of them.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Some three minutes of a CPU: both APIs of Flower and its engine, cuts, memory, edges.
SUITE = (
    "tests/test_packaging.py",
    "tests/cli/test_app.py",
    "tests/split/test_chain.py",
    "tests/split/test_fake_tensors.py",
    "tests/task_digest/test_facts.py",
    "tests/memory/test_meter.py",
    "tests/edge/test_message_bytes.py",
    "tests/edge/test_tensors.py",
    "tests/edge/coding/test_crossing.py",
    "tests/device/test_local_training.py",
    "tests/flower/test_client_app.py",
    "tests/flower/test_codecs.py",
    "tests/flower/test_strategy.py",
    "tests/flower/test_legacy_strategy.py",
    "tests/edge/hosts/test_ray.py",
    "tests/test_simulation.py",
)
TOOLS = (
    "hypothesis>=6.100",
    "matplotlib>=3.9",
    "pytest>=9",
    "pytest-xdist>=3.6",
    "scikit-learn>=1.5",
)
_NEEDED_BYTES = 9 * 10**9


@dataclass(frozen=True)
class Corner:
    """An interpreter, and the versions to take; the newest of what is not named."""

    name: str
    python: str
    pins: tuple[str, ...] = ()


OLD_FLWR = ("flwr==1.40.0",)
OLD_TORCH = ("torch==2.9.0", "torchvision==0.24.0")
OLD_OTHERS = (
    "cryptography==50.0.0",
    "numpy==2.0.0",
    "psutil==5.9.0",
    "rich==14.0.0",
    "safetensors==0.7.0",
    "typer==0.18.0",
)
CORNERS = (
    Corner("oldest", "3.11", (*OLD_FLWR, *OLD_TORCH, *OLD_OTHERS)),
    Corner("newest", "3.13"),
    Corner("old-flwr", "3.12", OLD_FLWR),
    Corner("old-torch", "3.13", OLD_TORCH),
)


def interpreter(version: str) -> str | None:
    """Find a Python of a version, on the path or among pyenv's."""
    roots = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(roots.glob(f"{version}.*/bin/python{version}"))
    if found:
        return str(found[-1])
    return shutil.which(f"python{version}")


def run(*command: str | Path, log: Path) -> bool:
    """Run a command into a log; return whether it succeeded."""
    # Each process would compile torch anew where bytecode is not to be kept.
    settings = {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=os.environ | settings,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return done.returncode == 0


def outcome(corner: Corner) -> str:
    """Build a corner's environment and run the suite in it; say how it went."""
    python = interpreter(corner.python)
    if python is None:
        return f"skipped: no Python {corner.python} here"
    if shutil.disk_usage(ROOT).free < _NEEDED_BYTES:
        return "skipped: less than 9 GB of free disk"
    folder = ROOT / f".venv-matrix-{corner.name}"
    log = ROOT / "out" / f"matrix-{corner.name}.log"
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if not run(python, "-m", "venv", folder, log=log):
            return f"no environment, see {log}"
        own = folder / "bin" / "python"
        # Nothing is compiled that is not imported.
        pip = (own, "-m", "pip", "install", "--quiet", "--no-compile")
        install = (*pip, "--editable", ".")
        if not run(*install, *TOOLS, *corner.pins, log=log):
            return f"not installed, see {log}"
        found = versions(own)
        passed = run(own, "-m", "pytest", "-q", *SUITE, *sys.argv[1:], log=log)
        (*_, last) = log.read_text().splitlines()
        word = "passed" if passed else "FAILED"
        return f"{word} with {found}: {last}" + ("" if passed else f", see {log}")
    finally:
        if os.environ.get("KEEP") != "1":
            shutil.rmtree(folder, ignore_errors=True)


def versions(python: Path) -> str:
    """Say which versions an environment has."""
    names = ("flwr", "torch", "torchvision", "ray", "numpy")
    code = (
        "import sys, importlib.metadata as m; "
        "print('Python ' + sys.version.split()[0], *"
        f"[n + ' ' + m.version(n) for n in {names!r}], sep=', ')"
    )
    done = subprocess.run(
        [python, "-c", code], check=False, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr.strip()


def main() -> int:
    """Run the corners; return 1 unless all that could run passed, and one did."""
    known = {corner.name: corner for corner in CORNERS}
    names = os.environ.get("CORNERS", "").split() or list(known)
    if unknown := [name for name in names if name not in known]:
        sys.stdout.write(
            f"no corner {', '.join(unknown)}; there is {', '.join(known)}\n"
        )
        return 1
    failed, passed = [], []
    for name in names:
        start = time.monotonic()
        result = outcome(known[name])
        seconds = time.monotonic() - start
        sys.stdout.write(f"{name}: {result} ({seconds:.0f} s with its environment)\n")
        sys.stdout.flush()
        if not result.startswith("skipped"):
            (passed if result.startswith("passed") else failed).append(name)
    if failed:
        sys.stdout.write(f"failed: {', '.join(failed)}\n")
    return int(bool(failed) or not passed)


if __name__ == "__main__":
    sys.exit(main())
