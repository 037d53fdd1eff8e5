"""The truth that predictors are compared with: the whole model, in evaluation mode."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from flwr_smartsplit import Offer, Prediction, Predictor, Serving, Task
from flwr_smartsplit.edge.hosts.edge import Edge
from tests.tasks import BATCH_SIZE, SHAPE, TASK, initial_state

STATE = initial_state()


def batch(seed: int = 0, size: int = BATCH_SIZE) -> Tensor:
    """Draw a batch of the tiny task."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(size, *SHAPE, generator=chance)


def whole(inputs: Any, state: Mapping[str, Any] = STATE, task: Task = TASK) -> Any:
    """Run the stock model; one of transformers keeps no cache, as its chain does."""
    model = task.model_fn().eval()
    if hasattr(getattr(model, "config", None), "use_cache"):
        model.config.use_cache = False
    tensors = {n: torch.as_tensor(a) for n, a in state.items()}
    model.load_state_dict(tensors)
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def difference(found: Prediction, truth: Any) -> str:
    """Say in what a prediction differs from the truth, to the last bit."""
    if found.is_fallback:
        return f"the fallback answered: {found.cause}"
    (mine, how), (theirs, as_well) = map(tree_flatten, (found.outputs, truth))
    if how != as_well or type(found.outputs) is not type(truth):
        return f"{how} instead of {as_well}"
    same = (
        torch.equal(one, other) and one.dtype == other.dtype
        if isinstance(one, Tensor)
        else one == other
        for one, other in zip(mine, theirs, strict=True)
    )
    return "" if all(same) else "another value"


@contextmanager
def served(
    *edges: Edge, state: Mapping[str, Any] = STATE, task: Task = TASK, **offer: Any
) -> Iterator[tuple[Serving, Offer]]:
    """Serve a state, with one offer."""
    offer = {"batch_size": BATCH_SIZE} | offer
    with Serving(task, state, edges) as serving:
        yield serving, serving.offer(**offer)


def predictor(offer: Offer, *edges: Edge, task: Task = TASK, **how: Any) -> Predictor:
    """Make a predictor that meters all that it does, of an offer that was sent."""
    sent = Offer.from_bytes(offer.to_bytes())
    return Predictor(task, sent, edges=edges, **{"cap_mode": "strict"} | how)
