"""Parts: what a session has of a boundary and a gradient that cross in slices.

The boundary is laid together as its parts come, and is then the one that would have
come whole. The gradient is kept until its last part has gone.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flwr_smartsplit.edge import part_messages as messages
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import EdgeError
from flwr_smartsplit.split.segment import Batch
from flwr_smartsplit.train.slicing import dense_slice, room_for


@dataclass
class Parts:
    """The parts that came and go in the present step of one session.

    Parameters
    ----------
    offset : int
        The sample that comes or goes next.
    """

    offset: int = 0
    _tensors: list[Tensor] = field(default_factory=list)
    _gradient: Tensor | None = None

    def answer(
        self, request: messages.BoundaryPart | messages.GradientPart
    ) -> messages.Taken | messages.Gradient:
        """Take a part, or give one away."""
        if isinstance(request, messages.BoundaryPart):
            return self._put(request)
        return self._get(request)

    def _put(self, request: messages.BoundaryPart) -> messages.Taken:
        """Lay a part of the boundary to the others.

        Raises
        ------
        EdgeError
            If it does not fit them.
        """
        came = [part.unpack() for part in (request.boundary, *request.context)]
        if not self._tensors:
            self._tensors = [room_for(part, request.num_examples) for part in came]
        start, stop = request.start, request.start + int(came[0].shape[0])
        wanted = [tensor[start:stop] for tensor in self._tensors]
        kinds = [[(t.shape, t.dtype) for t in tensors] for tensors in (came, wanted)]
        total = int(self._tensors[0].shape[0])
        if kinds[0] != kinds[1] or total != request.num_examples or stop == start:
            raise EdgeError(
                f"session {request.session}: samples [{start}, {stop}) of a boundary "
                f"of {request.num_examples} do not fit the parts before: a step's "
                "slices have one shape and type. Use one version everywhere."
            )
        for target, part in zip(wanted, came, strict=True):
            target.copy_(part)
        return messages.Taken(stop)

    def take(self) -> Batch:
        """Give away the whole boundary, with its context if it has one."""
        tensors, self._tensors = tuple(self._tensors), []
        return tensors if len(tensors) > 1 else tensors[0]

    def keep(self, gradient: WireTensor) -> None:
        """Keep a gradient until it has been asked for."""
        self._gradient = gradient.unpack()

    def _get(self, request: messages.GradientPart) -> messages.Gradient:
        """Return a part of the gradient, and with the last one forget it.

        Raises
        ------
        EdgeError
            If there are no such samples.
        """
        total = 0 if self._gradient is None else int(self._gradient.shape[0])
        if self._gradient is None or not request.start < request.stop <= total:
            raise EdgeError(
                f"session {request.session}: samples [{request.start}, {request.stop}) "
                f"of a gradient of {total} were asked for. Use one version everywhere."
            )
        part = dense_slice(self._gradient, request.start, request.stop)
        if request.stop == total:
            self._gradient = None
        return messages.Gradient(WireTensor.pack(part))

    def advance(self, request: Any) -> int:
        """Go on after a message; return by how many half steps."""
        match request:
            case messages.BoundaryPart():
                self.offset = request.start + request.boundary.shape[0]
                return 0
            case messages.GradientPart():
                self.offset = request.stop if self._gradient is not None else 0
                return int(self._gradient is None)
        self.offset = messages.WHOLE if isinstance(request, wire.ForwardStep) else 0
        is_whole = isinstance(request, wire.TrainStep | messages.EvaluateParts)
        return messages.PER_STEP if is_whole else 1
