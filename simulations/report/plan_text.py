"""Read routes and recompute plans back from the text that journals hold."""

import re
from functools import lru_cache

from flwr_smartsplit.types import KEEP_ALL, RecomputePlan, Rerun, Route
from simulations.experiments.errors import ExperimentError

_SEGMENT = re.compile(r"([^\[\]]+)\[(\d*):(\d*)\]")
_TOKEN = re.compile(r"\[(\d+):(\d+)|\]|selective((?: \d+)+)| ")
WHOLE = str(Route.whole())


@lru_cache(maxsize=1024)
def route_of(text: str) -> Route:
    """Read what ``str(route)`` wrote."""
    if text == WHOLE:
        return Route.whole()
    parts = [_SEGMENT.fullmatch(part) for part in text.split(" > ")]
    found = [part.groups() for part in parts if part is not None]
    if len(found) != len(parts) or not all(start for _, start, _ in found[1:]):
        raise ExperimentError(
            f"{text!r} is no route: a journal has 'whole', or segments such as "
            "'device[:3] > edge[3:]'."
        )
    cuts = tuple(int(start) for _, start, _ in found[1:])
    return Route(cuts, tuple(place for place, _, _ in found))


@lru_cache(maxsize=1024)
def recompute_of(text: str) -> RecomputePlan:
    """Read what ``str(plan)`` wrote."""
    if text == str(KEEP_ALL):
        return KEEP_ALL
    stack: list[tuple[int, int, list[Rerun]]] = [(0, 0, [])]
    selective: tuple[int, ...] = ()
    position = 0
    while token := _TOKEN.match(text, position):
        if token[1]:
            stack.append((int(token[1]), int(token[2]), []))
        elif token[3]:
            selective = tuple(map(int, token[3].split()))
        elif token[0] == "]" and len(stack) == 1:
            break
        elif token[0] == "]":
            start, stop, inner = stack.pop()
            stack[-1][2].append(Rerun(start, stop, tuple(inner)))
        position = token.end()
    if position < len(text) or len(stack) > 1:
        raise ExperimentError(
            f"{text!r} is no recompute plan: a journal has 'none', or parts such as "
            "'[0:3] [4:9 [6:8]] selective 1 2'."
        )
    return RecomputePlan(tuple(stack[0][2]), selective)
