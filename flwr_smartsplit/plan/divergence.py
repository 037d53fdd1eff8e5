"""How far labels are from those of all clients, and what the server's data then count.

References
----------
Zhang, Liu, Jia, Zhou, Dai, Dou: FedDUAP: Federated Learning with Dynamic Update and
Adaptive Pruning Using Shared Insensitive Data. IJCAI 2022. arXiv:2204.11536.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt

from flwr_smartsplit.plan.selection.label_coverage import divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Somebody's examples: how many, and how unlike those of all clients.

    Parameters
    ----------
    num_examples : int
        How many.
    noniid : float
        The divergence of their labels from those of all clients, in bits, from 0 to 1.
    """

    num_examples: int
    noniid: float


def pooled(counts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Add up label counts; classes that somebody does not count have 0 there.

    Examples
    --------
    >>> pooled([(1, 2), (3, 0, 4)])
    (4, 2, 4)
    """
    every = list(counts)
    total = [0] * max(map(len, every), default=0)
    for each in every:
        for label, count in enumerate(each):
            total[label] += count
    return tuple(total)


def divergence_bits(one: Sequence[int], other: Sequence[int]) -> float:
    """Compute the Jensen-Shannon divergence of two label counts.

    With shares p and q, and their mean m, it is ``(KL(p, m) + KL(q, m)) / 2``, to the
    base 2: 0 if both have the same shares, 1 if they have no class in common.

    Parameters
    ----------
    one, other : Sequence[int]
        Examples of each class, at least one of them.

    Returns
    -------
    float
        Bits, from 0 to 1.

    Examples
    --------
    >>> divergence_bits((2, 2), (1, 1)), divergence_bits((5,), (0, 3))
    (0.0, 1.0)
    """
    size = max(len(one), len(other))
    p, q = _padded(one, size), _padded(other, size)
    return min(float(divergence(p, q / q.sum())) / log(2), 1.0)


def server_weight(accuracy: float, *, server: Holding, clients: Holding) -> float:
    """Say how much the server's training counts, before strength and decay.

    FedDU's ``(1 - accuracy) * n0 * D(P') / (n0 * D(P') + n' * D(P0))``: the more, the
    less the model can do yet, the more examples the server has, and the more unlike the
    labels of the round are to those of all clients, against the server's.

    Parameters
    ----------
    accuracy : float
        The merged model's on the server's data, from 0 to 1.
    server : Holding
        The server's examples: n0 and D(P0).
    clients : Holding
        Those of the round's clients: n' and D(P').

    Examples
    --------
    >>> server = Holding(num_examples=100, noniid=0.125)
    >>> clients = Holding(num_examples=300, noniid=0.375)
    >>> server_weight(0.5, server=server, clients=clients)
    0.25
    """
    ours = server.num_examples * clients.noniid
    theirs = clients.num_examples * server.noniid
    if ours + theirs == 0:  # Both are like all: only the numbers are left.
        ours, theirs = server.num_examples, clients.num_examples
    return (1 - accuracy) * ours / (ours + theirs)


def _padded(counts: Sequence[int], size: int) -> npt.NDArray[np.float64]:
    padded = np.zeros(size)
    padded[: len(counts)] = counts
    return padded
