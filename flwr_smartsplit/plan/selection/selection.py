"""Who takes part in a round, and on which route: what any selection gets and gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from flwr_smartsplit.plan.menu import Offer
from flwr_smartsplit.plan.placement import Places
from flwr_smartsplit.plan.selection.candidates import Candidate
from flwr_smartsplit.plan.selection.history import NO_HISTORY, History
from flwr_smartsplit.types import EdgeProfile

NOT_SAMPLED = "not sampled in this round"
EDGES_FULL = "no edge has room for the rest of its model in this round"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRequest:
    """What there is to know when a round's clients are chosen.

    Parameters
    ----------
    candidates : Sequence[Candidate]
        Every client that has a route, in client_key order.
    num_clients : int
        How many to choose.
    round_number : int
        The round, counted from 1.
    edges : Sequence[EdgeProfile]
        The edges that are ready.
    history : History
        What earlier rounds brought.
    rng : random.Random
        Where chance comes from.
    """

    candidates: Sequence[Candidate]
    num_clients: int
    round_number: int
    edges: Sequence[EdgeProfile] = ()
    history: History = NO_HISTORY
    rng: Random

    def home(self, index: int) -> str | None:
        """Name the edge where a candidate was last, or else whose turn it is."""
        seen = self.history.latest.get(self.candidates[index].device.client_key)
        if seen is not None and seen.edge is not None:
            return seen.edge
        return self.edges[index % len(self.edges)].name if self.edges else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One chosen client.

    Parameters
    ----------
    candidate : Candidate
        The client.
    offer : Offer
        What it does.
    edge : str or None
        Where the rest of the model is; None if it has all of it.
    why : str
        For the journal.
    features : tuple[float, ...]
        What the surrogate knew.
    """

    candidate: Candidate
    offer: Offer
    edge: str | None = None
    why: str = ""
    features: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Who was chosen, and why the others were not.

    Parameters
    ----------
    chosen : Sequence[Chosen]
        In any order.
    passed : Mapping[str, str]
        For every other candidate the reason, by client_key.
    """

    chosen: Sequence[Chosen]
    passed: Mapping[str, str] = field(default_factory=dict)


Select = Callable[[SelectionRequest], Selection]
"""Chooses a round's clients."""


def select_at_random(request: SelectionRequest) -> Selection:
    """Draw clients uniformly, as FedAvg does; each takes its best offer.

    Parameters
    ----------
    request : SelectionRequest
        The candidates, in client_key order.
    """
    drawn = sample_clients(
        [each.device.client_key for each in request.candidates],
        num_clients=request.num_clients,
        rng=request.rng,
    )
    places = Places(request.edges)
    chosen: list[Chosen] = []
    passed: dict[str, str] = {}
    for index, each in enumerate(request.candidates):
        key = each.device.client_key
        if key not in drawn:
            passed[key] = NOT_SAMPLED
            continue
        placed = place(each, [each.best, *each.fits], places, request.home(index))
        if placed is None:
            passed[key] = EDGES_FULL
        else:
            chosen.append(placed)
    return Selection(chosen=chosen, passed=passed)


def place(
    candidate: Candidate, wanted: Sequence[int], places: Places, home: str | None
) -> Chosen | None:
    """Give a client the first of some offers for which an edge has room.

    Parameters
    ----------
    candidate : Candidate
        The client.
    wanted : Sequence[int]
        Places in its menu, the most wanted first.
    places : Places
        The edges, and what is taken of them.
    home : str or None
        The edge where it was before.
    """
    for index in wanted:
        offer = candidate.menu.offers[index]
        if not offer.route.cuts or offer.is_placed:
            return Chosen(candidate=candidate, offer=offer)
        edge = places.find(candidate.device, offer, home)
        if edge is not None:
            places.take(edge, offer)
            return Chosen(candidate=candidate, offer=offer, edge=edge.name)
    return None


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
