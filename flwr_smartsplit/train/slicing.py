"""Slices: a front does its part of a step a few samples at a time.

Each slice runs forward twice: once without a graph, to send its boundary, and once
more when its gradient comes. So neither the boundary nor its gradient nor the
activations of the whole batch are ever on the device at once.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from flwr_smartsplit.errors import InvalidRoute, InvalidTask
from flwr_smartsplit.split.layout import is_dense
from flwr_smartsplit.split.segment import (
    Batch,
    Boundary,
    Streams,
    as_boundary,
    no_streams,
)
from flwr_smartsplit.train.segment_runner import SegmentRunner

Send = Callable[[int, Boundary], None]
"""``send(start, boundary)`` sends the boundary of the samples from ``start`` on."""

Receive = Callable[[int, int], Tensor]
"""``receive(start, stop)`` makes the gradient of these samples' boundary."""


class SlicedRunner:
    """Let a front do its part of steps slice by slice.

    Parameters
    ----------
    runner : SegmentRunner
        Runs the front and has its optimizer; its units must be samplewise.
    slice_size : int
        Samples per slice; the last slice of a batch may have fewer.
    streams : Streams
        As the runner's: a dropout that keeps all draws numbers nevertheless.

    Notes
    -----
    A weight's gradient is the sum of the slices' gradients, in their order, so it
    differs in its last bits from that of a step of the whole batch.
    """

    def __init__(
        self, runner: SegmentRunner, slice_size: int, *, streams: Streams = no_streams
    ) -> None:
        self._whole = runner
        self._slice_size = slice_size
        # Without an optimizer, it neither frees gradients nor updates: they add up.
        self._part = SegmentRunner(
            runner.segment, runner.task, streams=streams, is_trained=False
        )

    def covers(self, targets: Tensor) -> bool:
        """Say whether a batch is more than one slice; else a plain step does it."""
        return int(targets.shape[0]) > self._slice_size

    def forward(self, inputs: Batch, *, step: int, send: Send) -> None:
        """Send the boundary of each slice, and keep nothing."""
        self._whole.release_gradients()
        for start, stop in self._bounds(inputs):
            send(start, self._light(inputs, start, stop, step))

    def backward(self, inputs: Batch, *, step: int, receive: Receive) -> None:
        """End the step from the gradients; update, unless that has to wait."""
        for start, stop in self._bounds(inputs):
            part = sliced(inputs, start, stop)
            self._part_step(part, partial(receive, start, stop), step)
        if self._whole.task.max_gradient_norm is None:
            self._whole.update()

    def evaluate(self, inputs: Batch, *, send: Send) -> None:
        """Send the boundary of each slice in evaluation mode."""
        for start, stop in self._bounds(inputs):
            part = sliced(inputs, start, stop)
            outputs = self._part.evaluate(part)
            send(start, _checked(as_boundary(outputs), stop - start))
            del outputs

    def _part_step(self, part: Batch, receive: Callable[[], Tensor], step: int) -> None:
        """Run a slice forward again and backward, to add to the gradients."""
        self._part.forward(part, step=step, inputs_are_boundary=False)
        self._part.backward(receive)

    def _light(self, inputs: Batch, start: int, stop: int, step: int) -> Boundary:
        with torch.no_grad():
            boundary = self._part.forward(
                sliced(inputs, start, stop), step=step, inputs_are_boundary=False
            )
        return _checked(boundary, stop - start)

    def _bounds(self, inputs: Batch) -> Iterator[tuple[int, int]]:
        sizes = {
            int(leaf.shape[0]) if leaf.dim() else 0 for leaf in tree_leaves(inputs)
        }
        if len(sizes) != 1:
            raise InvalidTask(
                f"the batch's inputs have {sorted(sizes)} samples in dimension 0: "
                "they cannot be sliced. Train without slice_size."
            )
        (num_examples,) = sizes
        starts = range(0, num_examples, self._slice_size)
        return pairwise([*starts, num_examples])


def sliced(batch: Batch, start: int, stop: int) -> Batch:
    """Look at some samples of a batch; nothing is copied."""
    part: Batch = tree_map(lambda tensor: tensor[start:stop], batch)
    return part


def dense_slice(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Take some samples of a tensor, copied only if they would span gaps."""
    part = tensor[start:stop]
    return part if is_dense(tuple(part.shape), part.stride()) else part.contiguous()


def room_for(part: Tensor, num_examples: int) -> Tensor:
    """Make an empty tensor for a batch whose first part came, and lies as it would.

    Samples follow each other in it as they do in a part whose memory has no gaps; for
    other parts it is contiguous.

    Examples
    --------
    >>> part = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    >>> room_for(part, 8).stride() == part.stride()
    True
    """
    shape = (num_examples, *part.shape[1:])
    size, inner = part[0].numel(), part.stride()[1:]
    follow = part.shape[0] == 1 or part.stride(0) == size
    if follow and is_dense(shape[1:], inner):
        return torch.empty_strided(shape, (size, *inner), dtype=part.dtype)
    return torch.empty(shape, dtype=part.dtype)


def _checked(boundary: Boundary, num_examples: int) -> Boundary:
    """Make sure that each tensor of a boundary has a slice's samples.

    Raises
    ------
    InvalidRoute
        If one has not, such as a size that the model read off the batch.
    """
    for tensor in boundary:
        if tensor.dim() == 0 or tensor.shape[0] != num_examples:
            raise InvalidRoute(
                f"a slice of {num_examples} samples gives a boundary with a tensor of "
                f"shape {tuple(tensor.shape)}, which cannot be put together again. "
                "Choose another cut, or no slice_size."
            )
    return boundary
