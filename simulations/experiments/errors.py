"""What goes wrong because of what was asked for, so that the reader can mend it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ExperimentError(Exception):
    """What was asked, against what it failed, and what to do next.

    Every function that checks what a reader asked for raises it.
    """


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Explain a results folder that cannot be written to."""
    try:
        yield
    except OSError as error:
        raise ExperimentError(
            f"results cannot be written to {str(folder)!r} ({error}): name another "
            "folder with --out."
        ) from error
