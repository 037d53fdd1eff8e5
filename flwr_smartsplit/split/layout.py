"""How a tensor's elements fill its memory: without gaps, or with gaps or overlap."""

from functools import lru_cache

ALIGNMENT = 64
"""Bytes; torch's allocator on the CPU begins each storage at a multiple of them.

Kernels choose by it how they begin, and so their order of summation.
"""


@lru_cache(maxsize=1024)  # The same few layouts cross in every step.
def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Say whether the elements fill their memory without gaps or repetitions."""
    if 0 in shape:
        return True  # There is nothing to lay out.
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@lru_cache(maxsize=1024)
def num_spanned(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Count the elements of the memory that a tensor spans."""
    if 0 in shape:
        return 0
    steps = zip(shape, strides, strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)
