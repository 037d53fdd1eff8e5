"""Freed memory stays in the process, so that no step takes its pages anew."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")

LOOK = """
import json, sys
from flwr_smartsplit.memory.allocator import keep_freed_memory
from flwr_smartsplit.memory.process import process_bytes

import torch

told = keep_freed_memory() if "keep" in sys.argv else None
before = process_bytes("VmData")
blocks = [torch.ones(12_000_000) for _ in range(3)]  # Such as a layer's gradients
del blocks
print(json.dumps([told, process_bytes("VmData") - before]))
"""
TAKEN_BYTES = 3 * 48_000_000


def looked(*arguments, **variables):
    """Take and free 144 MB in a process; return what it has more afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables,
    )
    return json.loads(done.stdout)


def test_what_is_freed_stays():
    """By default it goes back to the system."""
    told, more_bytes = looked("keep")
    assert told is True
    assert more_bytes > 0.9 * TAKEN_BYTES
    assert looked()[1] < TAKEN_BYTES / 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "0"),
        ("GLIBC_TUNABLES", "glibc.malloc.perturb=0"),
        ("GLIBC_TUNABLES", ""),
    ],
)
def test_the_environment_has_the_last_word(name, value):
    """Who sets the allocator up by hand is not overruled."""
    told, more_bytes = looked("keep", **{name: value})
    assert told is False
    assert more_bytes < TAKEN_BYTES / 10
