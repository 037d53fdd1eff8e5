"""Keep freed memory for the next step, where glibc would give it back to the system.

A training step frees about as much as it takes. By default glibc returns large blocks
at once, and the system has to find and clear each page again in the next step: a fifth
of the time of a step of ResNet-18 with small images.
"""

import ctypes
import os
import sys
from functools import cache

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # As malloc.h numbers them
_MOST_BYTES = 2**30, 2**25  # Older releases of glibc take 32 MiB at most.
_SETTINGS = frozenset(
    """MALLOC_TRIM_THRESHOLD_ MALLOC_MMAP_THRESHOLD_ MALLOC_TOP_PAD_ MALLOC_MMAP_MAX_
    GLIBC_TUNABLES LD_PRELOAD""".split()
)


@cache
def keep_freed_memory() -> bool:
    """Tell the allocator of this process to keep what is freed; once and for all.

    Only glibc on Linux is told, and not if the environment says otherwise, by
    ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES`` or another allocator in
    ``LD_PRELOAD``. The process then stays as large as it once was.

    Returns
    -------
    bool
        Whether it was told.
    """
    if sys.platform != "linux" or not _SETTINGS.isdisjoint(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # Another C library
        return False
    # Either alone would end glibc's own choice of the other, at 128 KiB.
    return any(mallopt(_MMAP_THRESHOLD, size) for size in _MOST_BYTES) and bool(
        mallopt(_TRIM_THRESHOLD, _MOST_BYTES[0])
    )
