"""The whole model with cuts in it: what split training along a route computes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flwr_smartsplit.edge.coding.crossing import Crossing
from flwr_smartsplit.errors import InvalidRoute
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import as_boundary
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.segment_runner import blocks_gradient
from flwr_smartsplit.types import Codec


def with_crossing(task: Task, cut: int, codec: Codec) -> nn.Module:
    """Make the model that is trained if one cut has a codec.

    It has the names of the task's model, so it loads the same states. A model that was
    trained with ``TopK`` is as good as it was only with the codec in it: use it in an
    ``evaluate_fn``, or to serve.

    Parameters
    ----------
    task : Task
        Of the model.
    cut : int
        The first unit behind the cut.
    codec : Codec
        What the boundary and its gradient go through.

    Raises
    ------
    InvalidRoute
        If the chain has no such cut.

    Examples
    --------
    >>> from flwr_smartsplit import Integer
    >>> task = Task(
    ...     model_fn=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
    ...     loss_fn=nn.functional.cross_entropy,
    ...     optimizer_fn=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ...     example_inputs=torch.zeros(1, 4),
    ...     example_targets=torch.zeros(1, dtype=torch.int64),
    ... )
    >>> model = with_crossing(task, 2, Integer(bits=4))
    >>> list(model.state_dict())
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    chain, model = build_chain(task, anew=True), task.model_fn()
    let_cross(model, chain, {cut: (codec, ())})
    return model


def let_cross(
    model: nn.Module,
    chain: Chain,
    codecs: Mapping[int, tuple[Codec, tuple[int | str, ...]]],
) -> "CrossedForward":
    """Have a chain's model run with codecs at cuts, each with the seed of its draws."""
    for cut in codecs:
        if not 0 < cut < len(chain):
            raise InvalidRoute(
                f"cut {cut} is outside a chain of {len(chain)} units: choose one in "
                f"1..{len(chain) - 1}.",
                cut=cut,
                num_units=len(chain),
            )
    forward = CrossedForward(model, chain, codecs)
    model.forward = forward
    return forward


class CrossedForward:
    """The forward of a model with both ends of a crossing at some cuts.

    ``step`` names the training step, for what a codec draws.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        codecs: Mapping[int, tuple[Codec, tuple[int | str, ...]]],
    ) -> None:
        self._model = model
        self._segment = chain.segment(0, len(chain), source=model)
        self.step: int | str = 0
        self._codecs = codecs
        self._gradients = [unit.gradients for unit in chain.units]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the model on a batch, given as to the model itself."""
        batch = named or (inputs if len(inputs) > 1 else inputs[0])
        self._segment.train(self._model.training)
        result = self._segment(batch, observe=self._crossed)
        if self._model.training and isinstance(self.step, int):
            self.step += 1
        return result

    def _crossed(self, index: int, value: Any) -> Any:
        if index + 1 not in self._codecs:
            return value
        codec, seed = self._codecs[index + 1]
        boundary, is_trained = as_boundary(value), self._model.training
        near = Crossing(codec, seed=seed, is_trained=is_trained)
        far = Crossing(codec, is_trained=is_trained)
        blocks = tuple(map(blocks_gradient, boundary))
        how = self._gradients[index], blocks, self.step
        came: tuple[Tensor, ...] = _Crossing.apply((near, far), how, *boundary)
        return came if type(value) is tuple else came[0]


class _Crossing(torch.autograd.Function):
    """Code and decode a boundary, and its gradients on their way back."""

    @staticmethod
    def forward(ctx: Any, ends: Any, how: Any, *boundary: Tensor) -> tuple[Tensor, ...]:
        """Return the boundary as it arrives."""
        (near, far), (flags, blocks, step) = ends, how
        ctx.set_materialize_grads(False)
        ctx.ends, ctx.flags = ends, flags
        sent = near.encode(boundary, gradients=flags, blocks=blocks, step=step)
        came: tuple[Tensor, ...] = far.decode(sent, gradients=flags)
        return came

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients as they arrive; an empty tensor stands for none."""
        near, far = ctx.ends
        flags = (*ctx.flags, *(False,) * len(gradients))
        given = [
            torch.empty(0) if each is None else each
            for each, flag in zip(gradients, flags, strict=False)
            if flag
        ]
        came = iter(near.decode_gradients(far.encode_gradients(given)))
        back = [
            next(came) if flag else None
            for _, flag in zip(gradients, flags, strict=False)
        ]
        found = [None if each is None or not each.numel() else each for each in back]
        return None, None, *found
