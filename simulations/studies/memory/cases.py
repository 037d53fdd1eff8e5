"""Which models are measured, on images of which size."""

from collections.abc import Sequence
from dataclasses import dataclass

from flwr_smartsplit import Task
from flwr_smartsplit.cli.specs import TORCHVISION, task_of
from simulations.experiments.errors import ExperimentError

BATCH_SIZE = 32
OPTIMIZER = "momentum"
SMALL_SIDE, LARGE_SIDE = 32, 224

FAMILIES = {
    "alexnet": "AlexNet",
    "vgg16_bn": "VGG",
    "resnet18": "ResNet",
    "resnet50": "ResNet",
    "squeezenet1_1": "SqueezeNet",
    "googlenet": "GoogLeNet",
    "densenet121": "DenseNet",
    "mobilenet_v2": "MobileNet",
    "mobilenet_v3_large": "MobileNet",
    "shufflenet_v2_x1_0": "ShuffleNet",
    "efficientnet_b0": "EfficientNet",
    "regnet_y_400mf": "RegNet",
    "regnet_y_32gf": "RegNet",
    "convnext_tiny": "ConvNeXt",
    "convnext_large": "ConvNeXt",
    "vit_b_16": "ViT",
    "swin_t": "Swin",
}
"""The models, and the family of each."""

LARGER_SIDES = {"alexnet": 64, "squeezenet1_1": 64}
"""Models that 32 pixels are too few for."""

SMALL = ("resnet18", "mobilenet_v2", "squeezenet1_1")
"""What ``--small`` measures, at the smaller size."""

CURVES = {
    *(("resnet18", 32), ("mobilenet_v2", 32)),
    *(("vgg16_bn", 224), ("resnet50", 224), ("efficientnet_b0", 224), ("swin_t", 224)),
}
"""Where plans of recomputation are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCase:
    """One model on square images."""

    model: str  # Its name in torchvision
    family: str
    input_side: int  # Pixels of a side
    seed: int = 0  # Of its numbers and of the batch; no size depends on it

    @property
    def task(self) -> Task:
        """Train it for ten classes with momentum."""
        shape = (3, self.input_side, self.input_side)
        return task_of(
            f"{TORCHVISION}{self.model}", input_shape=shape, optimizer=OPTIMIZER
        )

    @property
    def has_curves(self) -> bool:
        """Whether plans of recomputation are compared on it."""
        return (self.model, self.input_side) in CURVES

    @property
    def title(self) -> str:
        """What it is called in a table."""
        return f"{self.model}, {self.input_side} px"

    @property
    def key(self) -> str:
        """What it is called in a results folder; names all that changes the task."""
        return f"{self.title}, seed {self.seed}"


def memory_cases(
    models: Sequence[str] | None = None, *, is_small: bool = False, seed: int = 0
) -> list[MemoryCase]:
    """List the cases, those with small images first."""
    names = list(models if models is not None else SMALL if is_small else FAMILIES)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown or not names:
        raise ExperimentError(
            f"--models names {', '.join(map(repr, unknown)) or 'nothing'}, but the "
            f"models are {', '.join(FAMILIES)}."
        )
    return [
        MemoryCase(model=name, family=FAMILIES[name], input_side=side, seed=seed)
        for is_large in ((False,) if is_small else (False, True))
        for name in names
        for side in [LARGE_SIDE if is_large else LARGER_SIDES.get(name, SMALL_SIDE)]
    ]
