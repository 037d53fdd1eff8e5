"""Models of timm: a sample over its families, with random weights.

timm is no dependency of ours; who wants this installs it.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from itertools import chain, zip_longest
from random import Random
from typing import Any

import torch
from torch import nn

from flwr_smartsplit import Task
from flwr_smartsplit.cli.specs import NUM_CLASSES, classification
from simulations.experiments.errors import ExperimentError

SIDES = (32, 64, 96, 128, 160, 192, 224, 256, 384)
"""Sides of images; a model is trained on the smallest that it takes."""


def names(num_models: int, *, seed: int) -> list[str]:
    """Choose the smallest model of each family, then others of its smaller half.

    The families take turns; the smallest models come first, whatever their family.
    """
    library, rng = _library(), Random(seed)
    families = []
    for module in library.list_modules():
        members = sorted(library.list_models(module=module), key=num_parameters)
        smallest, *others = members[: (len(members) + 1) // 2] or [None]
        rng.shuffle(others)
        families.append([smallest, *others])
    turns = chain.from_iterable(zip_longest(*families))
    chosen = [name for name in turns if name is not None][:num_models]
    return sorted(chosen, key=num_parameters)


@cache
def num_parameters(name: str) -> int:
    """Count a model's parameters, without memory for them where that works."""
    return sum(p.numel() for p in _on_meta(partial(_built, name)).parameters())


def task_of_model(name: str, optimizer: str) -> Task:
    """Train a model on the smallest images that it takes."""
    build, shape = _smallest(name)
    return classification(build, shape, optimizer, num_classes=NUM_CLASSES)


def _built(name: str, **options: Any) -> nn.Module:
    model: nn.Module = _library().create_model(name, num_classes=NUM_CLASSES, **options)
    return model


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # It looks at values.
        return build()


def _smallest(name: str) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    """Find the smallest images that a model takes, by trying them without memory."""
    for build, model, shape in _candidates(name):
        inputs = torch.zeros(2, *shape, device="meta")
        try:
            model.train()(inputs)
            model.eval()(inputs)
        except Exception:
            continue
        return build, shape
    # It takes none of them, or looks at values.
    default: Any = _library().get_pretrained_cfg(name)
    return partial(_built, name), tuple(default.input_size)


def _candidates(
    name: str,
) -> Iterator[tuple[Callable[[], nn.Module], nn.Module, tuple[int, ...]]]:
    plain = partial(_built, name)
    model = _on_meta(plain).to("meta")
    for side in SIDES:
        yield plain, model, (3, side, side)
        sized = partial(_built, name, img_size=side)
        try:
            yield sized, _on_meta(sized).to("meta"), (3, side, side)
        except Exception:  # It has no such option, or not for this side.
            continue


@cache
def _library() -> Any:
    try:
        return import_module("timm")
    except ImportError as error:
        raise ExperimentError(
            "--library timm needs timm, which is not installed: pip install timm"
        ) from error
