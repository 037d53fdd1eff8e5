"""On a second torch device, all that a place computes with is there, and exact.

The device is compiled, and belongs to its process for good: hence one of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("c++") is None or shutil.which("ninja") is None,
        reason="needs a C++ compiler and ninja",
    ),
]


def test_every_place_computes_on_a_device_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/second_device/checks.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
