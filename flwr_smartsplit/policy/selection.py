"""Who takes part in a round: a uniform sample, as FedAvg draws it."""

from collections.abc import Sequence
from random import Random


def sample_clients(
    client_keys: Sequence[str], *, num_clients: int, rng: Random
) -> frozenset[str]:
    """Draw clients without replacement; the order they are listed in is no matter.

    Parameters
    ----------
    client_keys : Sequence[str]
        Who could take part.
    num_clients : int
        How many to draw; all, if there are no more.
    rng : random.Random
        Where chance comes from.

    Examples
    --------
    >>> sorted(sample_clients(["b", "a"], num_clients=5, rng=Random(0)))
    ['a', 'b']
    """
    candidates = sorted(client_keys)
    return frozenset(rng.sample(candidates, min(num_clients, len(candidates))))
