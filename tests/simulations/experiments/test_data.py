"""Data: what is loaded, how it is normalised, and what is said when it is not there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from simulations.experiments.data import (
    client_indices,
    evaluation_loader,
    input_shape,
    load_images,
    train_loader,
)
from simulations.experiments.errors import ExperimentError
from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import Iid
from simulations.fleets.presets import half_weak

DIGITS = Experiment(name="test", methods=("fedavg",), fleet=half_weak, partition=Iid())


@pytest.fixture
def colour_file(tmp_path):
    """Forty training and ten test images of 6 x 5 pixels in three colours."""
    rng = np.random.default_rng(0)
    path = tmp_path / "colours.npz"
    np.savez(
        path,
        x_train=rng.integers(0, 256, (40, 6, 5, 3), np.uint8),
        y_train=np.arange(40) % 4,
        x_test=rng.integers(0, 256, (10, 6, 5, 3), np.uint8),
        y_test=np.arange(10) % 4,
    )
    return path


def test_digits_need_no_network():
    images = load_images(DIGITS)

    assert images.x_train.shape == (1437, 8, 8)
    assert images.x_test.shape == (360, 8, 8)
    assert images.num_classes == 10
    assert input_shape(DIGITS) == (1, 8, 8)


def test_training_batches_are_normalised_by_the_training_set():
    everything = replace(DIGITS, num_clients=2, batch_size=2048)

    batches = [next(iter(train_loader(everything, client)))[0] for client in range(2)]

    pixels = torch.cat(batches).double()
    assert pixels.shape == (1437, 1, 8, 8)
    assert pixels.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert pixels.std(correction=0).item() == pytest.approx(1.0, abs=1e-6)


def test_a_batch_holds_the_pixels_of_its_images(colour_file):
    experiment = replace(DIGITS, data=str(colour_file))
    images = load_images(experiment)

    inputs, targets = next(iter(evaluation_loader(experiment)))

    by_hand = (images.x_test[7, 4, 3, 2] - images.mean[2]) / images.std[2]
    assert inputs.dtype == torch.float32
    assert inputs.shape == (10, 3, 6, 5)
    assert inputs[7, 2, 4, 3].item() == pytest.approx(by_hand, rel=1e-6)
    assert targets.tolist() == images.y_test.tolist()


def test_grey_images_are_repeated_for_models_that_take_three_channels():
    experiment = replace(DIGITS, model="torchvision:resnet18")

    inputs, _ = next(iter(evaluation_loader(experiment)))

    assert input_shape(experiment) == (3, 8, 8)
    assert inputs.shape[1:] == (3, 8, 8)
    assert torch.equal(inputs[:, 0], inputs[:, 2])


def test_fewer_examples_are_a_draw_of_the_seed():
    few = replace(DIGITS, max_train_examples=100, max_test_examples=50)

    assert load_images(few).x_train.shape == (100, 8, 8)
    assert load_images(few).x_test.shape == (50, 8, 8)
    other = load_images(replace(few, seed=1))
    assert not np.array_equal(load_images(few).y_train, other.y_train)


def test_a_last_batch_of_one_example_is_dropped():
    """Batch normalisation cannot train on a single example."""
    small = replace(DIGITS, max_train_examples=34, num_clients=2)
    sizes = [len(targets) for _, targets in train_loader(small, 0)]

    assert len(client_indices(small)[0]) == 17
    assert sizes == [16]
    uneven = replace(small, batch_size=7)
    assert [len(targets) for _, targets in train_loader(uneven, 0)] == [7, 7, 3]


def test_missing_downloads_name_the_folder_and_the_ways_out(tmp_path):
    not_a_folder = tmp_path / "file"
    not_a_folder.touch()

    with pytest.raises(ExperimentError, match=r"neither in .*file") as caught:
        load_images(replace(DIGITS, data="fashion_mnist", data_dir=not_a_folder))

    assert "--data-dir" in str(caught.value)
    assert "--data FILE.npz" in str(caught.value)


def test_an_npz_file_with_several_faults_has_them_all_named(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, x_train=np.zeros((3, 4)), y_test=np.zeros(1))

    with pytest.raises(ExperimentError, match="y_train is missing; x_test is missing"):
        load_images(replace(DIGITS, data=str(path)))


def test_an_npz_file_whose_arrays_do_not_fit_says_which(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(
        path,
        x_train=np.zeros((3, 4, 4)),
        y_train=np.zeros(2, int),
        x_test=np.zeros((3, 4, 4)),
        y_test=np.array([0, -1, 0]),
    )

    with pytest.raises(ExperimentError, match="x_train has shape") as caught:
        load_images(replace(DIGITS, data=str(path)))

    assert "y_test are not classes" in str(caught.value)


def test_a_client_with_too_little_to_train_on_is_an_error():
    with pytest.raises(ExperimentError, match="more examples or fewer clients"):
        client_indices(replace(DIGITS, max_train_examples=20))


def test_a_kept_file_stands_in_for_a_download(tmp_path):
    images = np.zeros((4, 2, 2), np.uint8)
    labels = np.arange(4) % 2
    np.savez(
        tmp_path / "fashion_mnist.npz",
        x_train=images,
        y_train=labels,
        x_test=images[:2],
        y_test=labels[:2],
    )

    loaded = load_images(replace(DIGITS, data="fashion_mnist", data_dir=tmp_path))

    assert (len(loaded.y_train), len(loaded.y_test)) == (4, 2)
