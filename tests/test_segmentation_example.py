"""The segmentation example's task: cut across its skip connections, and exact."""

import importlib

import pytest

from flwr_smartsplit import Route, predicted_peak_bytes, profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.verify.equivalence import RouteChecker
from tests.test_example_routes import EXAMPLES, ROUTES


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "segmentation")
    return importlib.import_module("segmentation.task")


def test_its_budgets_give_the_promised_routes(example):
    task = example.build_task()
    chain = build_chain(task)
    profile = profile_chain(chain, batch_size=example.BATCH_SIZE, task=task)
    routes = [Route.whole(), *map(Route.split, range(len(chain) - 1, 0, -1))]
    for index, budget in enumerate(example.BUDGETS_BYTES):
        fitting = (
            route
            for route in routes
            if budget is None or predicted_peak_bytes(profile, route) <= budget
        )
        assert str(next(fitting)) == ROUTES["segmentation"][str(index)]


def test_its_cuts_give_the_stock_models_numbers(example):
    task = example.build_task()
    images, classes = example.make_data(seed=0).tensors
    batches = [(images[:4], classes[:4]), (images[4:8], classes[4:8])]
    with RouteChecker(task, batches) as checker:
        size = len(checker.chain)
        boundaries = [len(unit.gradients) for unit in checker.chain.units]
        assert max(boundaries) == 3  # Both skip connections cross somewhere.
        for cut in {1, boundaries.index(3) + 1, size - 1}:
            assert checker.check(Route.split(cut)).differences == ()


def test_its_images_have_a_disc_and_a_square(example):
    images, classes = example.make_data(seed=1).tensors
    assert images.shape == (example.NUM_IMAGES, 1, example.SIZE, example.SIZE)
    assert {0, 1, 2} == set(classes.unique().tolist())
    assert all((picture == 2).any() for picture in classes)
