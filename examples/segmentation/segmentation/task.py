"""The model, how it is trained, the images, and the budgets."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d
from torch.utils.data import TensorDataset

from flwr_smartsplit import Task

BATCH_SIZE = 8
BUDGETS_BYTES = (None, 4 * 2**20, 3 * 2**20, 2**20)  # one per device; None is no limit
NUM_CLASSES = 3  # background, disc, square
NUM_IMAGES = 64  # per device
SIZE = 32
RADIUS = 5  # of a disc, and half a square


def block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Build one step of the way down or up."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Two steps down, two up; each step up also takes what its step down gave."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = block(1, 12), block(12, 24)
        self.bottom = block(24, 48)
        self.up2, self.up1 = block(48 + 24, 24), block(24 + 12, 12)
        self.head = nn.Conv2d(12, NUM_CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return a score for each class at each pixel."""
        first = self.down1(images)
        second = self.down2(max_pool2d(first, 2))
        lowest = self.bottom(max_pool2d(second, 2))
        up = self.up2(torch.cat([interpolate(lowest, scale_factor=2.0), second], 1))
        up = self.up1(torch.cat([interpolate(up, scale_factor=2.0), first], 1))
        return self.head(up)


def build_task() -> Task:
    """Say what is trained and how: the server, the devices and the edge all need it."""
    rare = torch.tensor([0.2, 1.0, 1.0])  # most pixels are background
    return Task(
        model_fn=UNet,
        loss_fn=nn.CrossEntropyLoss(weight=rare),
        optimizer_fn=partial(torch.optim.Adam, lr=0.01),
        example_inputs=torch.zeros(1, 1, SIZE, SIZE),
        example_targets=torch.zeros(1, SIZE, SIZE, dtype=torch.int64),
        max_boundary_tensors=3,  # both skip connections may cross a cut
    )


def make_data(seed: int) -> TensorDataset:
    """Draw noisy images with a disc and a square, and the class of each pixel."""
    chance = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(
        torch.arange(SIZE), torch.arange(SIZE), indexing="ij"
    )
    classes = torch.zeros(NUM_IMAGES, SIZE, SIZE, dtype=torch.int64)
    for picture in classes:
        (y, x), (v, u) = torch.randint(
            RADIUS, SIZE - RADIUS, (2, 2), generator=chance
        ).tolist()
        picture[(rows - y) ** 2 + (columns - x) ** 2 <= RADIUS**2] = 1
        picture[(rows - v).abs().maximum((columns - u).abs()) < RADIUS] = 2
    brightness = torch.tensor([0.0, 0.7, 1.0])[classes]
    noise = 0.2 * torch.randn(classes.shape, generator=chance)
    return TensorDataset((brightness + noise)[:, None], classes)
