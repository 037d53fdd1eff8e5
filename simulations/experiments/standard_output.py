"""Standard output: kept for what the command prints, so that it can be piped."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
