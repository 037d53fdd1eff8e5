"""Notice an edge whose gradients are not those of a loss that sees the labels.

An edge that hijacks training returns gradients of an aim of its own, which pull the
device's boundary towards one that it can invert (Pasquini et al., CCS 2021). It
has no use for the labels. The gradients of an honest loss follow them: examples of one
class are pulled alike, those of two classes apart (Fu et al., NDSS 2023). So the check
asks how far the gradients of a batch depend on its labels, beyond what the boundary
explains: by partial distance correlation (Székely and Rizzo, 2014), near 0 for a
hijacker. It costs two matrices of examples by examples, and changes no number.
"""

from collections.abc import MutableMapping, Sequence
from logging import getLogger
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flwr_smartsplit.errors import InvalidTask, SuspectEdge
from flwr_smartsplit.memory.meter import unmetered
from flwr_smartsplit.split.segment import Boundary

LEAST_DEPENDENCE = 0.2
"""What an honest edge does not stay below: it was above 0.37 in every mean of 16."""
LEAST_RATED, MOST_RATED = 8, 32
"""Batches to judge an edge by; the last ones count."""
MOST_EXAMPLES = 64
"""Of a batch, the first ones are looked at."""
# Under BatchNorm, one hard example leaves an echo in the gradients of all others, which
# follows no labels. So only examples count that pull half as much as the strongest.
_LEAST_SHARE, _LEAST_EXAMPLES = 0.5, 5
_ERRORS = 3  # Standard errors of the mean
_BLOCK = 2**18  # Values that are copied at a time

Matrix = npt.NDArray[np.float64]
Ratings = MutableMapping[str, Sequence[float]]
"""How far the gradients of each place's last batches depended on the labels."""

_log = getLogger("flwr")


class GradientCheck:
    """Judge one edge by the gradients of its latest batches, for one client.

    ``ratings`` are those of earlier rounds by place, and are added to: an edge that was
    suspect stays so. Raises ``InvalidTask`` unless the task's ``example_targets`` are
    one class for each example.
    """

    def __init__(
        self, place: str, example_targets: Any, ratings: Ratings, *, client: str
    ) -> None:
        check_classes(example_targets)
        self.place, self.client = place, client
        self._ratings = ratings
        self._num_seen = self._num_rated = 0
        self._products: Matrix | None = None
        self._labels: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self.judge()

    def sent(self, boundary: Boundary, labels: Tensor) -> Boundary:
        """Remember how alike the examples of an outgoing boundary are; return it."""
        self._labels = labels[:MOST_EXAMPLES].cpu().numpy()
        self._products = _products(boundary, len(labels))
        return boundary

    def came(self, gradients: Boundary) -> Boundary:
        """Rate the gradients of that boundary; return them."""
        boundary, self._products = self._products, None
        products = _products(gradients, len(self._labels))
        self._num_seen += 1
        if boundary is not None and products is not None:
            rating = _rating(boundary, products, self._labels)
            if rating is not None:
                self._num_rated += 1
                known = [*self._ratings.get(self.place, ()), rating]
                self._ratings[self.place] = known[-MOST_RATED:]
        return gradients

    def judge(self) -> None:
        """Raise ``SuspectEdge`` if the gradients are not those of the loss."""
        ratings = self._ratings.get(self.place, ())
        count = len(ratings)
        if count < LEAST_RATED:
            return
        mean = float(np.mean(ratings))
        error = float(np.std(ratings, ddof=1)) / count**0.5
        if mean + _ERRORS * error < LEAST_DEPENDENCE:
            raise SuspectEdge(
                f"the gradients of edge {self.place!r} are not those of a loss of the "
                f"labels: over the last {count} batches they depend on them by "
                f"{mean:.2f} ± {error:.2f}, and those of an honest edge by more than "
                f"{LEAST_DEPENDENCE}. It may pull the boundary towards one that it can "
                f"invert. Client {self.client!r} sends it nothing more: find out what "
                "it runs, or plan without it.",
                place=self.place,
                dependence=mean,
                num_batches=count,
            )

    def conclude(self) -> None:
        """Warn if nothing could be said of a whole round."""
        if self._num_seen and not self._num_rated:
            _log.warning(
                "client %r could not check edge %r: none of %d batches had %d examples "
                "of several classes whose gradients are about as strong.",
                *(self.client, self.place, self._num_seen, _LEAST_EXAMPLES),
            )


def check_classes(example_targets: Any) -> None:
    """Raise ``InvalidTask`` unless targets are one class for each example."""
    is_class = (
        isinstance(example_targets, Tensor)
        and example_targets.dim() == 1
        and not example_targets.is_floating_point()
    )
    if not is_class:
        raise InvalidTask(
            "check_gradients needs one class for each example, as an integer tensor of "
            "shape (batch,), since it compares gradients by class; the task's "
            f"example_targets are {_text(example_targets)}. Leave it out."
        )


def _text(targets: Any) -> str:
    if isinstance(targets, Tensor):
        return f"{targets.dtype} of shape {tuple(targets.shape)}"
    return f"a {type(targets).__name__}"


def _products(tensors: Boundary, num_examples: int) -> Matrix | None:
    """Multiply each example with each other one, over all tensors that have examples.

    None if one has not, or if there is nothing.
    """
    size = min(num_examples, MOST_EXAMPLES)
    tensors = tuple(t for t in tensors if t.is_floating_point() and t.numel())
    if not tensors or any(t.dim() < 2 or len(t) != num_examples for t in tensors):  # noqa: PLR2004
        return None
    with unmetered(), torch.no_grad():
        total = torch.zeros(size, size, device=tensors[0].device)
        for tensor in tensors:
            rows = tensor[:size]
            width = max(1, _BLOCK * rows.shape[1] // rows.numel())
            for block in rows.split(width, dim=1):
                flat = block.flatten(1).float()
                total += flat @ flat.T
        return total.cpu().double().numpy()


def _rating(boundary: Matrix, gradients: Matrix, labels: Any) -> float | None:
    """Return the partial distance correlation of gradients' directions and labels."""
    norms = np.sqrt(np.maximum(gradients.diagonal(), 0))
    if not np.isfinite(norms).all() or not np.isfinite(boundary).all():
        return None
    (kept,) = np.nonzero((norms > 0) & (norms >= _LEAST_SHARE * norms.max()))
    if len(kept) < _LEAST_EXAMPLES:
        return None
    part, labels = np.ix_(kept, kept), labels[kept]
    label = _centred((labels[:, None] != labels[None]).astype(np.float64))
    if not (label * label).sum() > _TINY:  # All alike, or all different
        return None
    boundary = boundary[part]
    given = [_centred(_distances(each)) for each in (boundary, _directions(boundary))]
    direction = _centred(_distances(_directions(gradients[part])))
    one, other = (_unexplained(each, given) for each in (direction, label))
    return float((one * other).sum())


def _directions(products: Matrix) -> Matrix:
    """Return the products of vectors of length 1."""
    norms = np.sqrt(np.maximum(products.diagonal(), _TINY))
    return np.asarray(products / np.outer(norms, norms))


def _unexplained(distances: Matrix, given: list[Matrix]) -> Matrix:
    """Take out what others explain, and scale the rest to 1 if any is left."""
    columns = np.stack([each.ravel() for each in given], axis=1)
    explained = columns @ np.linalg.lstsq(columns, distances.ravel(), rcond=None)[0]
    rest = distances - explained.reshape(distances.shape)
    size, whole = (float(np.linalg.norm(each)) for each in (rest, distances))
    return rest / size if size > _LEAST_REST * whole else np.zeros_like(rest)


_TINY, _LEAST_REST = 1e-9, 1e-3


def _distances(products: Matrix) -> Matrix:
    """Turn products of vectors into their distances."""
    squares = products.diagonal()
    apart = squares[:, None] + squares[None] - 2 * products
    return np.asarray(np.sqrt(np.maximum(apart, 0)))


def _centred(distances: Matrix) -> Matrix:
    """Centre distances so that their products are unbiased: means of 0, no diagonal."""
    size = len(distances)
    means = distances.sum(axis=0) / (size - 2)
    mean = distances.sum() / ((size - 1) * (size - 2))
    centred = distances - means[None] - means[:, None] + mean
    np.fill_diagonal(centred, 0)
    return np.asarray(centred)
