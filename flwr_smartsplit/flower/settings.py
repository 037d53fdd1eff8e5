"""Settings: what both strategies are given besides Flower's own arguments."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp.strategy import FedAvg

from flwr_smartsplit.flower.journal.journal import DEFAULT_JOURNAL, OnRow
from flwr_smartsplit.flower.observations import ClientSeconds
from flwr_smartsplit.plan.routes import ChooseRoute
from flwr_smartsplit.plan.selection.selection import Select
from flwr_smartsplit.plan.selection.utility import BY_UTILITY


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What both strategies are given besides Flower's own arguments.

    Parameters
    ----------
    seed : int
        Root of sampling and of every random stream of the clients.
    num_threads : int
        Torch threads at every place.
    select : Callable[[SelectionRequest], Selection]
        Chooses the clients that train, and their routes.
    choose_route : Callable[[RouteRequest], Route], optional
        Chooses the route of one client beforehand.
    min_device_units : int
        How many units a cut leaves on the device at least.
    recompute : bool
        Whether a device may recompute activations.
    refine : bool
        Whether edges may move cuts and release slow, unimportant clients in a round.
    client_seconds : Callable[[ClientPlan, StepReport], float], optional
        How long a client's part took, for the selections to come.
    server_optimizer : FedAvg, optional
        One of Flower's adaptive strategies, applied after the merge.
    journal : str or Path, optional
        File for one JSON line per client and round, as ``Journal`` takes it.
    on_row : Sequence[Callable[[Mapping], None]]
        Told each of these lines, too.
    clock : Callable[[], float]
        Seconds that only move forward.
    """

    seed: int = 0
    num_threads: int = 1
    select: Select = BY_UTILITY
    choose_route: ChooseRoute | None = None
    min_device_units: int = 1
    recompute: bool = True
    refine: bool = True
    client_seconds: ClientSeconds | None = None
    server_optimizer: FedAvg | None = None
    journal: str | Path | None = DEFAULT_JOURNAL
    on_row: Sequence[OnRow] = ()
    clock: Callable[[], float] = time.perf_counter


def check_settings(settings: Settings) -> None:
    """Refuse what cannot choose clients or routes.

    Raises
    ------
    TypeError
        Saying what would do.
    """
    choose_route = settings.choose_route
    if choose_route is not None and not callable(choose_route):
        raise TypeError(
            f"choose_route is {choose_route!r}; give a function of a "
            "RouteRequest, such as deepest_split or deepest_u_shape, or None."
        )
    if not callable(settings.select):
        raise TypeError(
            f"select is {settings.select!r}; give a function of a "
            "SelectionRequest, such as SelectByUtility() or select_at_random."
        )
