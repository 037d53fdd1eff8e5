"""The number of torch threads a step runs with.

Devices and edges need the same number: between one thread and two, gradients differ in
their last bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Run torch with a fixed number of threads, and restore it afterwards."""
    before = torch.get_num_threads()
    if before != num_threads:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        if before != num_threads:
            torch.set_num_threads(before)
