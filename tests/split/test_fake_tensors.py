"""Dry runs: values lie as the CPU lays them, and no warning becomes a refusal."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit import Unit
from flwr_smartsplit.cli import specs
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split import fake_tensors
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.fake_tensors import DryRun, fake_copy, warnings_ignored
from tests.models import task_of

# --- layouts --------------------------------------------------------------------------

CHANNELS, SIDE = 6, 8

LAYERS = {
    "conv": lambda: nn.Conv2d(CHANNELS, 4, 3),
    "depthwise conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS),
    "transposed conv": lambda: nn.ConvTranspose2d(CHANNELS, 4, 3),
    "circular conv": lambda: nn.Conv2d(
        CHANNELS, 4, 3, padding=1, padding_mode="circular"
    ),
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "frozen batch norm": lambda: nn.BatchNorm2d(CHANNELS).eval(),
    "group norm": lambda: nn.GroupNorm(3, CHANNELS),
    "instance norm": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "layer norm": lambda: nn.LayerNorm([CHANNELS, SIDE, SIDE]),
    "rms norm": lambda: nn.RMSNorm(SIDE),
    "local response norm": lambda: nn.LocalResponseNorm(3),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "average pool": lambda: nn.AvgPool2d(2),
    "adaptive average pool": lambda: nn.AdaptiveAvgPool2d(3),
    "global average pool": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive max pool": lambda: nn.AdaptiveMaxPool2d(3),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    "pixel unshuffle": lambda: nn.PixelUnshuffle(2),
    "channel shuffle": lambda: nn.ChannelShuffle(2),
    "reflection pad": lambda: nn.ReflectionPad2d(1),
    "replication pad": lambda: nn.ReplicationPad2d(1),
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
    "rrelu": nn.RReLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "log sigmoid": nn.LogSigmoid,
    "softmax": nn.Softmax2d,
    "glu": lambda: nn.GLU(1),
    "dropout": nn.Dropout,
    "feature dropout": nn.Dropout2d,
    "flatten": nn.Flatten,
}
PACKED = (CHANNELS * SIDE * SIDE, SIDE * SIDE, SIDE, 1)
STRIDES = {
    "packed": PACKED,
    "channels last": (PACKED[0], 1, SIDE * CHANNELS, CHANNELS),
    "rows first": (PACKED[0], SIDE, SIDE * CHANNELS, 1),
}


def laid_out(
    layer: nn.Module, strides: tuple[int, ...], mode: AbstractContextManager[object]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find how a layer's output lies in memory, and its input's gradient."""
    shape = (2, CHANNELS, SIDE, SIDE)
    with mode:
        inputs = torch.empty_strided(shape, strides).fill_(0.5).requires_grad_()
        outputs: Tensor = layer(inputs)
        outputs.sum().backward()
    assert inputs.grad is not None
    return outputs.stride(), inputs.grad.stride()


def compare_layouts(name: str, strides: tuple[int, ...]) -> None:
    layer, mode = LAYERS[name](), DryRun()
    real = laid_out(layer, strides, nullcontext())
    assert laid_out(fake_copy(layer, mode), strides, mode) == real


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("name", LAYERS)
def test_values_lie_as_the_cpu_lays_them(name, layout):
    compare_layouts(name, STRIDES[layout])


@pytest.mark.parametrize("gradient", ["packed", "last"])
@pytest.mark.parametrize("inputs", ["packed", "last"])
@pytest.mark.parametrize("kind", ["reflection", "replication"])
@pytest.mark.parametrize("dims", [2, 3])
def test_padding_lies_as_its_input_does(dims, kind, inputs, gradient):
    """Backward, too: not as the gradient that it gets."""
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    formats = {"packed": torch.contiguous_format, "last": last}
    pad, sizes = (1,) * (2 * dims), (2, CHANNELS)
    forward = getattr(torch.ops.aten, f"{kind}_pad{dims}d")
    backward = getattr(torch.ops.aten, f"{kind}_pad{dims}d_backward")

    def strides(mode):
        with mode:
            x = torch.ones(*sizes, *(4,) * dims).contiguous(
                memory_format=formats[inputs]
            )
            grad = torch.ones(*sizes, *(6,) * dims).contiguous(
                memory_format=formats[gradient]
            )
            return forward(x, pad).stride(), backward(grad, x, pad).stride()

    assert strides(DryRun()) == strides(nullcontext())


def test_a_layout_of_another_kernel_would_be_seen(monkeypatch):
    monkeypatch.setattr(
        fake_tensors, "suggest_memory_format", lambda _: torch.contiguous_format
    )
    with pytest.raises(AssertionError):
        compare_layouts("group norm", STRIDES["channels last"])


# --- warnings -------------------------------------------------------------------------


class OldLayer(nn.Linear):
    """A third party's layer that warns wherever it can."""

    def __init__(self) -> None:
        warnings.warn("OldLayer is deprecated", FutureWarning, stacklevel=2)
        super().__init__(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        warnings.warn("its forward is deprecated", FutureWarning, stacklevel=2)
        return super().forward(inputs)


def old_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), OldLayer(), nn.Linear(4, 3))


def old_units(model: nn.Module) -> list[Unit]:
    warnings.warn("units are deprecated", FutureWarning, stacklevel=2)
    return [
        Unit(name, lambda root, x, name=name: root.get_submodule(name)(x), (name,))
        for name in ("0", "1", "2")
    ]


def old_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    warnings.warn("this loss is deprecated", FutureWarning, stacklevel=2)
    return functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize("units_fn", [None, old_units])
def test_a_warning_that_is_an_error_refuses_no_model(units_fn):
    """As under ``python -W error``: a dry run is not the user's to be warned of."""
    task = task_of(old_model, shape=(4,))
    task = replace(task, units_fn=units_fn, loss_fn=old_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain = build_chain(task)
        assert len(profile_chain(chain, batch_size=2, task=task).units) == len(chain)
        with pytest.raises(FutureWarning, match="OldLayer is deprecated"):
            old_model()  # The user's own calls warn as ever.


def test_the_command_line_refuses_none_either():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = specs.task_of(f"{__name__}:old_model", input_shape=(4,))
    assert len(task.example_targets) == 3


def test_a_warning_that_got_through_would_be_seen(monkeypatch):
    """Planted: filters that are left as they are."""

    def built_nowhere_else() -> nn.Module:
        return old_model()

    monkeypatch.setattr(warnings, "simplefilter", lambda _: None)
    with pytest.raises(InvalidTask, match="OldLayer is deprecated"):
        build_chain(task_of(built_nowhere_else, shape=(4,)))


def test_filters_come_back_when_the_last_thread_is_done():
    before = list(warnings.filters)
    first = warnings_ignored()
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        second = warnings_ignored()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        warnings.warn("still ignored", FutureWarning, stacklevel=1)
        other.submit(second.__exit__, None, None, None).result()
    assert warnings.filters == before
    with pytest.raises(FutureWarning), warnings_ignored(), warnings_ignored():
        raise FutureWarning
    assert warnings.filters == before
