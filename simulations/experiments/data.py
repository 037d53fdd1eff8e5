"""Data sets as arrays, and loaders of one client's share of them.

Images are held as they are stored and become normalised tensors batch by batch.
Every process loads the arrays once and keeps them.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simulations.experiments.errors import ExperimentError
from simulations.experiments.experiment import TORCHVISION, Experiment
from simulations.experiments.partitions import WithServer

NAMES = ("digits", "digits_mixed", "fashion_mnist", "cifar10")
DIGITS_TEST_EXAMPLES = 360
MIN_CLIENT_EXAMPLES = 2
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Images:
    """A labelled image set, as stored."""

    x_train: NDArray[Any]  # ``(num, height, width)`` or ``(..., channels)``
    y_train: NDArray[np.int64]  # Classes, from 0
    x_test: NDArray[Any]
    y_test: NDArray[np.int64]
    # Per channel, over the training images
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @property
    def num_classes(self) -> int:
        """One more than the largest class."""
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of one image."""
        height, width, *channels = self.x_train.shape[1:]
        return (channels[0] if channels else 1, height, width)


@lru_cache(maxsize=2)
def load_images(experiment: Experiment) -> Images:
    """Load the experiment's data set, cut down to the size it asks for."""
    name = experiment.data
    if name in {"digits", "digits_mixed"}:
        arrays = _digits(is_mixed=name == "digits_mixed")
    elif name in NAMES:
        kept = experiment.data_dir / f"{name}.npz"
        arrays = (
            _npz_arrays(kept)
            if kept.exists()
            else _torchvision_arrays(name, experiment.data_dir)
        )
    elif name.endswith(".npz"):
        arrays = _npz_arrays(Path(name))
    else:
        raise ExperimentError(
            f"data {name!r} is unknown: choose one of {', '.join(NAMES)}, or the path "
            f"of an .npz file with {', '.join(NPZ_KEYS)}."
        )
    limits = (experiment.max_train_examples, experiment.max_test_examples)
    for split, limit in zip(("train", "test"), limits, strict=True):
        chosen = _chosen(len(arrays[f"y_{split}"]), limit, experiment.seed)
        arrays[f"x_{split}"] = arrays[f"x_{split}"][chosen]
        arrays[f"y_{split}"] = arrays[f"y_{split}"][chosen]
    return _with_statistics(arrays)


def _digits(*, is_mixed: bool) -> dict[str, NDArray[Any]]:
    """1,797 images of 8 x 8 grey values 0..16, part of scikit-learn: no network.

    The last ones, of other writers, are the test set, unless all are mixed before.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes a second

    digits = load_digits()
    x, y = digits.images.astype(np.float32), digits.target.astype(np.int64)
    if is_mixed:
        deck = np.random.default_rng(0).permutation(len(y))
        x, y = x[deck], y[deck]
    split = len(y) - DIGITS_TEST_EXAMPLES
    return {
        "x_train": x[:split],
        "y_train": y[:split],
        "x_test": x[split:],
        "y_test": y[split:],
    }


def _torchvision_arrays(name: str, data_dir: Path) -> dict[str, NDArray[Any]]:
    """Read a data set of torchvision's, and download it first where it is missing."""
    import torchvision  # noqa: PLC0415 - takes seconds; digits need none

    dataset = {
        "fashion_mnist": torchvision.datasets.FashionMNIST,
        "cifar10": torchvision.datasets.CIFAR10,
    }[name]
    try:
        splits = {
            split: dataset(data_dir, train=split == "train", download=True)
            for split in ("train", "test")
        }
    except (OSError, RuntimeError) as error:
        raise ExperimentError(
            f"{name} is neither in {str(data_dir)!r} nor could it be downloaded "
            f"({' '.join(str(error).split())}). Copy torchvision's "
            f"{dataset.__name__} files or {name}.npz there, name another folder with "
            f"--data-dir, or "
            f"give --data FILE.npz with {', '.join(NPZ_KEYS)}."
        ) from error
    arrays: dict[str, NDArray[Any]] = {}
    for split, images in splits.items():
        arrays[f"x_{split}"] = np.asarray(images.data)
        arrays[f"y_{split}"] = np.asarray(images.targets, np.int64)
    return arrays


def _npz_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the four arrays of an ``.npz`` file and check that they fit together."""
    try:
        with np.load(path) as file:
            missing = [key for key in NPZ_KEYS if key not in file]
            arrays = {key: file[key] for key in NPZ_KEYS if key in file}
    except (OSError, ValueError, BadZipFile) as error:
        raise ExperimentError(
            f"--data {str(path)!r} cannot be read ({error}): give an .npz file with "
            f"{', '.join(NPZ_KEYS)}."
        ) from error
    problems = [f"{key} is missing" for key in missing]
    for split in ("train", "test") if not missing else ():
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.ndim not in {3, 4} or len(x) != len(y) or not len(y):
            problems.append(
                f"x_{split} has shape {x.shape} and y_{split} {y.shape}, not "
                f"(num, height, width[, channels]) and (num,) with num > 0"
            )
        elif y.ndim != 1 or y.dtype.kind not in "iu" or y.min() < 0:
            problems.append(f"y_{split} are not classes counted from 0")
    if problems:
        raise ExperimentError(f"--data {str(path)!r}: {'; '.join(problems)}.")
    return {
        key: array.astype(np.int64) if key.startswith("y") else array
        for key, array in arrays.items()
    }


def _chosen(num_examples: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Draw which examples to keep, in their old order."""
    if limit is None or limit >= num_examples:
        return np.arange(num_examples)
    drawn = np.random.default_rng(seed).choice(num_examples, limit, replace=False)
    return np.sort(drawn)


def _with_statistics(arrays: dict[str, NDArray[Any]]) -> Images:
    """Add the mean and the deviation of each channel of the training images."""
    x = arrays["x_train"]
    pixels = x.reshape(-1, x.shape[3] if x.ndim == 4 else 1)  # noqa: PLR2004
    return Images(
        **arrays,
        mean=pixels.mean(axis=0, dtype=np.float64).astype(np.float32),
        std=pixels.std(axis=0, dtype=np.float64).astype(np.float32) + np.float32(1e-6),
    )


@lru_cache(maxsize=2)
def client_indices(experiment: Experiment) -> list[NDArray[np.int64]]:
    """Divide the training examples among the clients, the same in every process."""
    labels = load_images(experiment).y_train
    shares = experiment.partition.divide(
        labels, num_clients=experiment.num_clients, seed=experiment.seed
    )
    smallest = min(map(len, shares))
    if smallest < MIN_CLIENT_EXAMPLES:
        raise ExperimentError(
            f"{len(labels)} training examples leave one of {len(shares)} clients with "
            f"{smallest}, but it needs {MIN_CLIENT_EXAMPLES}: take more examples or "
            f"fewer clients."
        )
    return shares


def train_loader(experiment: Experiment, client: int) -> DataLoader[Batch]:
    """Batch one client's training examples, shuffled anew in every pass.

    A last batch of a single example is dropped: batch normalisation cannot use it.
    """
    images, indices = load_images(experiment), client_indices(experiment)[client]
    return _loader(
        experiment,
        _Examples(images.x_train[indices], images.y_train[indices]),
        shuffle=True,
        drop_last=len(indices) % experiment.batch_size == 1,
    )


def server_loader(experiment: Experiment) -> DataLoader[Batch]:
    """Batch the examples that the server holds, shuffled anew in every pass."""
    partition = experiment.partition
    if not isinstance(partition, WithServer):
        raise ExperimentError(
            f"the server has no examples in the partition {partition}: take "
            "WithServer(clients=...), as the suite server_data does."
        )
    images = load_images(experiment)
    indices = partition.server_indices(images.y_train, seed=experiment.seed)
    return _loader(
        experiment,
        _Examples(images.x_train[indices], images.y_train[indices]),
        shuffle=True,
        drop_last=len(indices) % experiment.batch_size == 1,
    )


def whole_train_loader(experiment: Experiment) -> DataLoader[Batch]:
    """Batch all training examples, in order; a last small batch is dropped."""
    images = load_images(experiment)
    return _loader(
        experiment, _Examples(images.x_train, images.y_train), drop_last=True
    )


def evaluation_loader(
    experiment: Experiment, *, batch_size: int = 256
) -> DataLoader[Batch]:
    """Batch the test set, in order."""
    images = load_images(experiment)
    examples = _Examples(images.x_test, images.y_test)
    return _loader(experiment, examples, batch_size=batch_size)


def input_shape(experiment: Experiment) -> tuple[int, int, int]:
    """Return the ``(channels, height, width)`` that the model is given.

    Models of torchvision take three channels, so grey images are repeated for them.
    """
    channels, height, width = load_images(experiment).image_shape
    repeats = channels == 1 and experiment.model.startswith(TORCHVISION)
    return (3 if repeats else channels, height, width)


@dataclass(frozen=True, eq=False)
class _Examples(Dataset[Any]):
    """Stored images with their classes."""

    x: NDArray[Any]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[NDArray[Any], np.int64]:
        return self.x[index], self.y[index]


def _loader(
    experiment: Experiment, examples: "_Examples", **how: Any
) -> DataLoader[Batch]:
    """Load batches of tensors, of the experiment's size unless told otherwise."""
    collate = partial(
        _to_batch,
        images=load_images(experiment),
        num_channels=input_shape(experiment)[0],
    )
    arguments = {"batch_size": experiment.batch_size, "collate_fn": collate, **how}
    return DataLoader(examples, **arguments)


def _to_batch(
    examples: list[tuple[NDArray[Any], np.int64]], *, images: Images, num_channels: int
) -> Batch:
    """Stack, normalise and reorder to ``(batch, channels, height, width)``."""
    stored = np.stack([x for x, _ in examples])
    stored = stored.reshape(*stored.shape[:3], -1)
    scaled = (stored.astype(np.float32) - images.mean) / images.std
    x = torch.from_numpy(scaled).permute(0, 3, 1, 2)
    y = torch.from_numpy(np.array([y for _, y in examples]))
    return x.expand(-1, num_channels, -1, -1).contiguous(), y
