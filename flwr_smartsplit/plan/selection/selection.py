"""Who takes part in a round, and on which route: what any selection gets and gives.

A selection is a function of a ``SelectionRequest``. It ranks the candidates and lets
``SelectionRequest.take`` find each of them a place; ``select_at_random`` is one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from flwr_smartsplit.plan.placement import Places
from flwr_smartsplit.plan.selection.candidates import Candidate
from flwr_smartsplit.plan.selection.history import NO_HISTORY, History
from flwr_smartsplit.types import Assignment, EdgeProfile, RouteOption

NOT_SAMPLED = "not sampled in this round"
EDGES_FULL = "no edge has room for the rest of its model in this round"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Who was chosen, and why the others were not.

    Parameters
    ----------
    chosen : Sequence[Assignment]
        In any order.
    passed : Mapping[str, str]
        For every other candidate the reason, by client_key.
    """

    chosen: Sequence[Assignment]
    passed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRequest:
    """What a selection knows when it chooses a round's clients.

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
        The source of randomness.
    """

    candidates: Sequence[Candidate]
    num_clients: int
    round_number: int
    edges: Sequence[EdgeProfile] = ()
    history: History = NO_HISTORY
    rng: Random

    def home(self, index: int) -> str | None:
        """Name the edge where a candidate was last, or else whose turn it is."""
        seen = self.history.latest.get(self.candidates[index].client_key)
        if seen is not None and seen.edge is not None:
            return seen.edge
        return self.edges[index % len(self.edges)].name if self.edges else None

    def take(
        self,
        ranked: Iterable[Candidate],
        options: Callable[[Candidate], Iterable[RouteOption]] = Candidate.preferred,
    ) -> Selection:
        """Take candidates in this order, as long as clients are wanted.

        Parameters
        ----------
        ranked : Iterable[Candidate]
            Some or all of the candidates, the most wanted first.
        options : Callable[[Candidate], Iterable[RouteOption]]
            A candidate's options, the most wanted first; by default those of
            ``Candidate.preferred``.

        Returns
        -------
        Selection
            Each client with its first option for which an edge has room.
        """
        places = Places(self.edges)
        index_of = {each.client_key: i for i, each in enumerate(self.candidates)}
        passed = dict.fromkeys(index_of, NOT_SAMPLED)
        chosen: list[Assignment] = []
        for each in ranked:
            if len(chosen) == self.num_clients:
                break
            key = each.client_key
            home = self.home(index_of[key])
            option = places.place(each.device, options(each), home)
            if option is None:
                passed[key] = EDGES_FULL
            else:
                chosen.append(each.assigned(option))
                del passed[key]
        return Selection(chosen=chosen, passed=passed)


Select = Callable[[SelectionRequest], Selection]
"""Chooses a round's clients."""


def select_at_random(request: SelectionRequest) -> Selection:
    """Draw clients uniformly, as FedAvg does; each takes its best option.

    Parameters
    ----------
    request : SelectionRequest
        The candidates, in client_key order.
    """
    return request.take(sampled(request))


def sampled(request: SelectionRequest) -> list[Candidate]:
    """Draw as many candidates as are wanted; return them in client_key order."""
    drawn = sample_clients(
        [each.client_key for each in request.candidates],
        num_clients=request.num_clients,
        rng=request.rng,
    )
    return [each for each in request.candidates if each.client_key in drawn]


def sample_clients(
    client_keys: Sequence[str], *, num_clients: int, rng: Random
) -> frozenset[str]:
    """Draw clients without replacement, or take all; in any order."""
    candidates = sorted(client_keys)
    return frozenset(rng.sample(candidates, min(num_clients, len(candidates))))
