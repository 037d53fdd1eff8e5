"""The leakage suite: what an edge learns of inputs and labels, by cut and defence."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from flwr_smartsplit import Defence, Route
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.types import Status
from simulations.attacks.hijacking import Hijacker, forging_edge
from simulations.attacks.inversion import Likeness, inverted
from simulations.attacks.labels import guessed, sent_gradients
from simulations.attacks.reports import ATTACKS, CHECK, MEAN, report_of
from simulations.attacks.victims import KINDS, U_SHAPED, State, Victim
from simulations.experiments.errors import ExperimentError
from simulations.studies.measurement import Item, Measurement, MeasurementOptions, Row
from simulations.studies.quickstart import quickstart

CUTS = ("relu1", "pool2", "pool3")
"""The units behind which the model is cut, and defended: the shallowest first."""
LABEL_CUT = "flatten"
"""Behind it, the model comes back to the device on a u-shaped route."""
DELTA = 1e-5
NUM_SHOWN = 6
CLIP = 10.0

Kept = dict[tuple[Defence | None, int], tuple[State, float]]


def defences(unit: str, *, is_small: bool) -> dict[str, Defence | None]:
    """List what may stand behind a unit, with a name for each."""
    found: dict[str, Defence | None] = {"none": None}
    found["NoPeek 2"] = Defence(after=unit, nopeek=2.0)
    for noise in (0.1,) if is_small else (0.02, 0.1):
        found[f"noise {noise:g}"] = Defence(after=unit, clip=CLIP, noise=noise)
    return found


def items(options: MeasurementOptions) -> list[Item]:
    """List the attacks by cut and defence, and the check's trials by kind."""
    if options.models is not None:
        raise ExperimentError("suite 'leakage' has one model: leave out --models.")
    small, seed = options.is_small, options.seed
    experiment = replace(quickstart(), seed=seed)
    victim = Victim.of(experiment, seed=seed)
    kept: Kept = {}
    found = [Item(key=MEAN, measure=_anywhere(partial(measure_mean, victim)))]
    for unit in CUTS[1:2] if small else CUTS:
        for name, defence in defences(unit, is_small=small).items():
            attack = partial(
                measure_attacks,
                victim.defended(defence),
                (unit, name),
                kept,
                epochs=2 if small else 6,
                num_steps=200 if small else 1000,
            )
            key = f"{ATTACKS}: {unit}, {name}"
            found.append(Item(key=key, measure=_anywhere(attack)))
    for kind in list(KINDS)[: 2 if small else None]:
        seeds = range(seed, seed + (1 if small else 10))
        measure = partial(measure_check, victim, kind, seeds, epochs=1 if small else 3)
        found.append(Item(key=f"{CHECK}: {kind}", measure=_anywhere(measure)))
    return found


def _anywhere(measure: Callable[[], Row]) -> Callable[[Path], Row]:
    """Measure without a folder."""
    return lambda _: measure()


def measure_mean(victim: Victim) -> Row:
    """Say how like the mean image of the attacker's is to each of the device's."""
    true = victim.pixels(victim.own.images)
    made = victim.pixels(victim.attackers.images).mean(dim=0).expand_as(true)
    shown = {"shown": _shown(true)}
    return {"part": MEAN, "inversion": Likeness.of(made, true).values(), **shown}


def measure_attacks(
    victim: Victim,
    where: tuple[str, str],
    kept: Kept,
    *,
    epochs: int,
    num_steps: int,
) -> Row:
    """Train with a defence, then attack; and let an edge hijack another training."""
    unit, name = where
    defence, cut = victim.task.defence, victim.cut_after(unit)
    if (defence, epochs) not in kept:  # Without a defence, all cuts share a training.
        state = dict(victim.train(Route.whole(), epochs=epochs).state)
        kept[defence, epochs] = state, victim.accuracy(state)
    state, accuracy = kept[defence, epochs]
    true = victim.pixels(victim.own.images)
    own, known = (
        victim.boundaries(state, cut, each.images)
        for each in (victim.own, victim.attackers)
    )
    pairs = known, victim.attackers.images
    made = inverted(own, pairs, num_steps=num_steps, seed=victim.seed)
    boundaries, gradients = sent_gradients(
        victim, state, victim.cut_after(LABEL_CUT), victim.own
    )
    hijacked, boundary = hijack(victim, cut, epochs=epochs)
    noisy = defence if defence is not None and defence.noise else None
    return {
        "part": ATTACKS,
        "cut": unit,
        "defence": name,
        "num_values": boundary[0].numel(),
        "accuracy": accuracy,
        "epsilon": noisy and noisy.epsilon(DELTA, num_crossings=epochs),
        "inversion": Likeness.of(victim.pixels(made), true).values(),
        "hijacking": Likeness.of(victim.pixels(hijacked), true).values(),
        "labels_by_gradient": guessed(gradients, victim.own.classes),
        "labels_by_boundary": guessed(boundaries, victim.own.classes),
        "shown": _shown(victim.pixels(made)),
    }


def hijack(victim: Victim, cut: int, *, epochs: int) -> tuple[Tensor, Tensor]:
    """Let an edge hijack a training; return its reconstructions, and the boundaries."""
    hijacker = _hijacker(victim, cut)
    edge = forging_edge(hijacker)
    outcome = victim.train(Route.split(cut), epochs=epochs, edge=edge)
    boundary = victim.boundaries(dict(outcome.state), cut, victim.own.images)
    return hijacker.invert(boundary), boundary


def measure_check(victim: Victim, kind: str, seeds: range, *, epochs: int) -> Row:
    """Count how often honest and hijacking edges are accused, at every cut.

    An edge may turn out unchecked where too little could be said in a round.
    """
    counts = {"honest": 0, "accused": 0, "hijacking": 0, "noticed": 0}
    batches = []
    for seed in seeds:
        task = KINDS[kind](victim.task)
        own = replace(victim, task=task, seed=seed)
        for unit in CUTS:
            cut, last = own.cut_after(unit), len(build_chain(task)) - 1
            is_u = kind == U_SHAPED
            route = Route.u_shape(cut, last) if is_u else Route.split(cut)
            honest = own.train(route, epochs=epochs, is_checked=True)
            counts["honest"] += 1
            counts["accused"] += honest.report.status is not Status.OK
            edge = forging_edge(_hijacker(own, cut))
            forged = own.train(route, epochs=epochs, edge=edge, is_checked=True)
            counts["hijacking"] += 1
            if forged.report.status is not Status.OK:
                counts["noticed"] += 1
                batches.append(forged.report.num_steps + 1)
    noticed_after = median(batches) if batches else None
    return {"part": CHECK, "kind": kind, **counts, "noticed_after": noticed_after}


def _hijacker(victim: Victim, cut: int) -> Hijacker:
    with torch.no_grad():
        state = {k: v.numpy() for k, v in victim.task.model_fn().state_dict().items()}
        boundary = victim.boundaries(state, cut, victim.own.images[:1])
    size = boundary[0].numel()
    return Hijacker(victim.attackers.images, size, seed=victim.seed)


def _shown(pixels: Tensor) -> list[list[list[int]]]:
    """Keep a few images, as grey values from 0 to 255."""
    found: list[list[list[int]]]
    found = (255 * pixels[:NUM_SHOWN].mean(dim=1)).round().int().tolist()
    return found


def figures(rows: list[Row]) -> dict[str, Row]:
    """Return the figures of each row by its key."""
    left_out = {"key", "part", "shown"}
    return {
        row["key"]: {name: x for name, x in row.items() if name not in left_out}
        for row in rows
    }


LEAKAGE = Measurement(
    name="leakage",
    summary="What an edge learns of inputs and labels, by cut and defence.",
    items_fn=items,
    report_fn=report_of,
    figures_fn=figures,
    options=frozenset({"small", "seed"}),
)
