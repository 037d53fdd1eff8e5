"""What each model of torchvision gives as a chain: the rows of docs/models.md."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection, optical_flow, segmentation, video

from flwr_smartsplit.cli.specs import torchvision_fn
from flwr_smartsplit.errors import SmartSplitError
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.template import parameters_on_meta
from simulations.studies.zoo.cases import Outcome, image_shape

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

FAMILIES: dict[str, tuple[ModuleType, tuple[tuple[int, ...], ...]]] = {
    "segmentation": (segmentation, ((3, 64, 64),)),
    "video": (video, ((3, 16, 112, 112),)),
    "optical flow": (optical_flow, ((3, 128, 128), (3, 128, 128))),
    "detection": (detection, ((3, 64, 64),)),
}
"""Other kinds of models, and the shapes of one example's inputs."""

VIDEO_SHAPES = {"mvit": (3, 16, 224, 224), "s3d": (3, 16, 224, 224)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one model gave when it was read as a chain."""

    kind: str
    model: str
    num_parameters: int  # Numbers in its parameters
    num_units: int  # Units of its chain; 0 if it cannot be read
    reason: str  # Why there is no cut, or at how many places there is none and why


def readings() -> Iterator[Reading]:
    """Read every model, one at a time, without allocating its parameters."""
    for name in models.list_models(module=models):
        shape = image_shape(name)
        build = torchvision_fn(name, shape)
        yield read("classification", name, build, torch.zeros(1, *shape))
    for kind, (module, shapes) in FAMILIES.items():
        for name in models.list_models(module=module):
            prefix = name.partition("_")[0]
            own = (VIDEO_SHAPES[prefix],) if prefix in VIDEO_SHAPES else shapes
            yield read(kind, name, other_fn(name), zeros(own))


def zeros(shapes: Sequence[tuple[int, ...]]) -> Inputs:
    """Make a batch of one example; several inputs make a tuple."""
    tensors = tuple(torch.zeros(1, *shape) for shape in shapes)
    return tensors if len(tensors) > 1 else tensors[0]


def other_fn(name: str) -> Callable[[], nn.Module]:
    """Return the function that builds a model that is no classifier of images."""
    family = models.get_model_builder(name).__module__.split(".")[2]
    arguments: dict[str, Any] = {"weights": None}
    if family in ("segmentation", "detection"):
        arguments["weights_backbone"] = None
    return lambda: models.get_model(name, **arguments)


def read(
    kind: str, name: str, build: Callable[[], nn.Module], inputs: Inputs
) -> Reading:
    """Read one model as a chain, or note why it cannot be read."""
    num_parameters = num_units = 0
    try:
        with parameters_on_meta():
            model = build()
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        chain = Chain.from_module(model, inputs)
        num_units, reason = len(chain), refusal_text(chain)
    except SmartSplitError as error:
        reason = str(error).splitlines()[0].partition(". Its forward")[0]
    except RuntimeError as error:
        if num_parameters:
            raise
        reason = f"it computes with its parameters while it is built: {error}"
    return Reading(
        kind=kind,
        model=name,
        num_parameters=num_parameters,
        num_units=num_units,
        reason=reason,
    )


def refusal_text(chain: Chain) -> str:
    """Sum up the places that look like cuts and are none."""
    if len(chain) == 1:
        return "; ".join(f"{n}: {why}" for n, why in chain.refusals.items())
    counts = Counter(kind_of(reason) for reason in chain.refusals.values())
    return "; ".join(f"{count}: {reason}" for reason, count in counts.most_common())


def kind_of(reason: str) -> str:
    """Strip what differs from place to place off a reason."""
    reason = reason.partition(";")[0]
    if "writes into it" in reason:
        return "written in place later"
    if reason.startswith("both sides of it use"):
        return "tied weights on both sides"
    return reason


def page(found: Sequence[Reading], proofs: Sequence[Outcome], *, origin: str) -> str:
    """Write the page: a sentence with the counts, then a table for each kind."""
    legend = (
        "*Places* is where a model can be cut. A place needs a single live tensor; of "
        "those that have one, the last column counts which must not be cut and why. "
        "*Compared* is the cuts that were trained over the wire and set beside the "
        "stock model, to the last bit, over all optimizers "
        "(`python -m simulations run zoo`)."
    )
    made = f"Made by `python -m simulations.studies.zoo`; {origin}. Do not edit."
    lines = ["# Models", "", made, "", legend]
    for kind in dict.fromkeys(reading.kind for reading in found):
        group = [reading for reading in found if reading.kind == kind]
        cuttable = sum(reading.num_units > 1 for reading in group)
        lines += ["", f"## {kind.capitalize()}: {cuttable} of {len(group)} cut", ""]
        lines += table_lines(group, proofs)
    return "\n".join(lines) + "\n"


def millions(number: int) -> str:
    """Write a number of parameters, if it is known."""
    return f"{number / 1e6:.1f} M" if number else "–"


def table_lines(found: Sequence[Reading], proofs: Sequence[Outcome]) -> list[str]:
    """Write one kind's table in Markdown."""
    lines = [
        "| model | parameters | places | compared | differ | no cut at |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for reading in found:
        mine = [proof for proof in proofs if proof.model == reading.model]
        compared = sum(proof.num_cuts for proof in mine)
        differ = sum(len(proof.differences) for proof in mine)
        lines.append(
            f"| {reading.model} | {millions(reading.num_parameters)} "
            f"| {max(reading.num_units - 1, 0)} | {compared or '–'} "
            f"| {differ if mine else '–'} | {reading.reason.replace('|', '/')} |"
        )
    return lines
