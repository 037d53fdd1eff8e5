"""Random chains of stages, and every plan that they can have."""

from collections.abc import Iterator
from random import Random

from flwr_smartsplit.plan.checkpointing.stages import Stage, StageRun
from flwr_smartsplit.types import RecomputePlan, Rerun


def random_stages(rng: Random, size: int) -> tuple[Stage, ...]:
    """Draw a chain of stages whose sizes are small whole numbers."""
    return tuple(_random_stage(rng, index) for index in range(size))


def _random_stage(rng: Random, index: int) -> Stage:
    output, inside = rng.randint(1, 5), rng.randint(0, 6)
    gradient = rng.randint(1, 5)
    cost = rng.randint(0, 9)
    saved = output + inside
    plain = StageRun(
        saved_bytes=saved,
        kept_bytes=rng.randint(0, saved),
        forward_peak_bytes=saved + rng.randint(0, 3),
        rerun_peak_bytes=rng.randint(0, saved),
        backward_peak_bytes=saved + gradient + rng.randint(0, 5),
    )
    runs = (plain,) if rng.random() < 0.7 else (plain, _selective(plain, index, rng))
    return Stage(
        start=index,
        stop=index + 1,
        runs=runs,
        passing_peak_bytes=output + rng.randint(0, 4),
        output_bytes=output,
        arriving_bytes=gradient,
        left_bytes=rng.randint(0, 2),
        cost=cost,
        rerun_cost=rng.randint(0, cost),
        can_rerun=rng.random() < 0.9,
    )


def _selective(plain: StageRun, index: int, rng: Random) -> StageRun:
    less = rng.randint(0, plain.kept_bytes)
    return StageRun(
        saved_bytes=plain.saved_bytes - less,
        kept_bytes=plain.kept_bytes - less,
        forward_peak_bytes=plain.forward_peak_bytes,
        rerun_peak_bytes=plain.rerun_peak_bytes,
        backward_peak_bytes=plain.backward_peak_bytes,
        extra_cost=rng.randint(0, 3),
        selective=(index,),
    )


def every_plan(stages: tuple[Stage, ...]) -> Iterator[RecomputePlan]:
    """List all nested plans of a chain, selective stages included."""
    for reruns in nested(0, len(stages)):
        for selective in _subsets([w.selective[0] for s in stages for w in s.runs[1:]]):
            yield RecomputePlan(reruns, selective)


def _subsets(items: list[int]) -> Iterator[tuple[int, ...]]:
    if not items:
        yield ()
        return
    for rest in _subsets(items[1:]):
        yield rest
        yield (items[0], *rest)


def nested(
    start: int, stop: int, *, inside: tuple[int, int] | None = None
) -> Iterator[tuple[Rerun, ...]]:
    """List the ways to rerun parts of units, which may be the inside of a rerun."""
    if start == stop:
        yield ()
        return
    for rest in nested(start + 1, stop):
        yield rest
    for end in range(start + 1, stop + 1):
        if (start, end) == inside:
            continue  # The same units twice in a row.
        for inner in nested(start, end, inside=(start, end)):
            for rest in nested(end, stop):
                yield (Rerun(start, end, inner), *rest)
