"""Freed memory stays in the process, so that no step takes its pages anew."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")

LOOK = """
import json, resource, sys
from flwr_smartsplit.memory.allocator import keep_freed_memory

import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

told = keep_freed_memory() if "keep" in sys.argv else None
for _ in range(3):  # Blocks such as a layer's gradients, which live and die together
    blocks = [torch.ones(12_000_000) for _ in range(3)]
    del blocks
before = faults()
for _ in range(5):
    blocks = [torch.ones(12_000_000) for _ in range(3)]
    del blocks
print(json.dumps([told, (faults() - before) / 5]))
"""


def looked(*arguments, **variables):
    """Take and free 144 MB several times in a process; return page faults a time."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | variables,
    )
    return json.loads(done.stdout)


def test_what_is_freed_is_not_taken_from_the_system_again():
    """By default it is, page by page."""
    told, faults = looked("keep")
    assert told is True
    assert faults < 100
    assert looked()[1] > 30_000


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.perturb=0")],
)
def test_the_environment_has_the_last_word(name, value):
    """Who sets the allocator up by hand is not overruled."""
    told, faults = looked("keep", **{name: value})
    assert told is False
    assert faults > 30_000
