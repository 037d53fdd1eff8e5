"""Progress bars on standard error, and a standard output that is ours alone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show how far something is, where somebody looks."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as progress:
        yield progress


@contextmanager
def only_ours_on_stdout() -> Iterator[None]:
    """Send what other programs and libraries print to stderr, whatever way they do.

    Ray's processes and torchvision's downloads write to the file descriptor itself.
    """
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)
