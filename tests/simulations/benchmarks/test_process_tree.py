"""The tree of processes: children count, and one that ends meanwhile does no harm."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from simulations.benchmarks import process_tree

BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\n"


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[str]]:
    """Run a script; it lives until its input ends."""
    words = [sys.executable, "-c", f"{code}\ninput()", "a_named_child"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


def test_a_childs_time_counts() -> None:
    """What a child computes is in the sum, and its name finds it."""
    before = process_tree.cpu_seconds()
    with child(BUSY) as process:
        assert process.stdout
        assert process.stdout.readline() == "done\n"
        assert process_tree.cpu_seconds() - before > 0.2  # Of 0.3, in ticks
        assert process_tree.child_pid("a_named_child") == process.pid
        assert process_tree.child_pid("no such child") is None


def test_a_child_that_ended_is_passed_over() -> None:
    """A zombie has no command line: reading it raises, and the sum goes on."""
    with child("print('here', flush=True)") as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        process.stdin.close()
        zombie = psutil.Process(process.pid)
        while zombie.status() != psutil.STATUS_ZOMBIE:
            pass
        with pytest.raises(psutil.ZombieProcess):
            zombie.cmdline()
        assert process_tree.child_pid("a_named_child") is None
        assert process_tree.cpu_seconds() > 0


def test_a_child_gone_between_list_and_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child listed a moment ago may no longer be there at all."""
    with child("") as process:
        listed = [psutil.Process(process.pid)]
        assert process.stdin
        process.stdin.close()
    monkeypatch.setattr(process_tree, "_children", lambda: listed)
    assert process_tree.child_pid("a_named_child") is None
    assert process_tree.cpu_seconds() > 0
