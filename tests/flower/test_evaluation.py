"""Metrics and evaluation: along routes or at one place, it is the same average."""

from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from torch.utils.data import DataLoader

from flwr_smartsplit.flower.serde.replies import reply_from_content
from tests.flower.apps import (
    apps,
    budgets_of,
    legacy_app,
    message_app,
    messages,
    run,
    smart_split,
)
from tests.in_process_grid import InProcessGrid
from tests.tasks import (
    BATCH_SIZE,
    TASK,
    accuracy,
    examples,
    tiny_cnn,
)

MIXED = budgets_of(1, 4, None, 8)


def test_train_metrics_are_the_weighted_mean_of_the_reports() -> None:
    """By examples, over the accepted."""
    grid = InProcessGrid(apps(MIXED))
    grid.lose(2, nth=1)
    made = run(grid, num_rounds=1)
    reports = [
        reply_from_content(m.content).report
        for m in grid.replied
        if m.metadata.message_type == "train"
        and m.metadata.src_node_id != grid.node_ids[2]
    ]
    total = sum(report.num_examples for report in reports)
    mean = sum(r.loss * r.num_examples for r in reports) / total
    metrics = made.result.train_metrics_clientapp[1]
    assert metrics["loss"] == pytest.approx(mean, rel=1e-12)


def test_evaluating_along_routes_equals_evaluating_at_one_place() -> None:
    """Loss and accuracy of the new state on the same batches, to 1e-12.

    Only the order of a few float64 sums differs.
    """
    loaders = [DataLoader(examples(10 + k), batch_size=BATCH_SIZE) for k in range(4)]
    made = run(
        [message_app(k, b, eval_loader=loaders[k]) for k, b in enumerate(MIXED)],
        smart_split(fraction_evaluate=1.0),
        num_rounds=1,
    )
    model = tiny_cnn().eval()
    model.load_state_dict(made.result.arrays.to_torch_state_dict())
    loss = right = total = 0.0
    with torch.no_grad():
        for loader in loaders:
            for inputs, targets in loader:
                outputs = model(inputs)
                loss += float(TASK.loss_fn(outputs, targets)) * len(targets)
                right += accuracy(outputs, targets)["accuracy"] * len(targets)
                total += len(targets)
    metrics = made.result.evaluate_metrics_clientapp[1]
    assert metrics["loss"] == pytest.approx(loss / total, rel=1e-12)
    assert metrics["accuracy"] == pytest.approx(right / total, rel=1e-12)


def test_evaluation_is_the_same_whole_or_split_and_in_both_apis() -> None:
    """Bit for bit."""
    evaluating = {"fraction_evaluate": 1.0}
    fleets = [
        apps(MIXED),
        apps([None] * 4),
        [legacy_app(k, b) for k, b in enumerate(MIXED)],
    ]
    found = [
        run(fleet, smart_split(**evaluating)).result.evaluate_metrics_clientapp
        for fleet in fleets
    ]
    assert set(found[0]) == {1, 2}
    for number in found[0]:
        for name in ("loss", "accuracy"):
            assert len({metrics[number][name] for metrics in found}) == 1


def test_an_evaluation_that_fails_is_left_out() -> None:
    """Lost and refused ones; the rest is averaged."""
    grid = InProcessGrid(apps(MIXED))
    grid.lose(0, nth=1, kind="evaluate")
    grid.alter(1, RecordDict.clear, nth=1, kind="evaluate")
    grid.duplicate(2, nth=1, kind="evaluate")
    made = run(grid, smart_split(fraction_evaluate=1.0), num_rounds=1)
    assert made.kinds() == [("c1", "refused"), ("c0", "lost")]
    reports = [
        reply_from_content(m.content).report
        for m in grid.replied
        if m.metadata.message_type == "evaluate"
        and m.metadata.src_node_id in grid.node_ids[2:]
    ]
    mean = sum(r.loss * r.num_examples for r in reports) / sum(
        r.num_examples for r in reports
    )
    metrics = made.result.evaluate_metrics_clientapp[1]
    assert metrics["loss"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("make", [message_app, legacy_app])
def test_an_evaluation_over_the_cap_is_left_out_with_its_numbers(make: Any) -> None:
    """One batch that is too large for the device costs that client's part only.

    A list does not say how large its batches are, so they are priced as in training.
    """
    large = list(DataLoader(examples(20), batch_size=64))
    fleet = [make(0, MIXED[0], eval_loader=large), make(1, None)]
    made = run(fleet, smart_split(fraction_evaluate=1.0), num_rounds=1)
    assert made.kinds() == [("c0", "out_of_memory")]
    (failure,) = made.strategy.failures
    assert "over the cap" in failure.cause
    assert failure.report is not None
    assert failure.report.peak_bytes > MIXED[0]
    assert made.result.evaluate_metrics_clientapp[1]["num-steps"] == 3


def test_a_late_evaluation_does_not_count_in_another_round() -> None:
    """As in training."""
    grid = InProcessGrid(apps([None] * 2))
    grid.delay(0, nth=1, kind="evaluate")
    grid.lose(0, nth=2, kind="evaluate")
    made = run(grid, smart_split(fraction_evaluate=1.0))
    assert ("c0", "late") in made.kinds()


def test_training_can_be_left_out() -> None:
    """``fraction_train=0`` evaluates what it was given."""
    made = run(apps(MIXED), smart_split(fraction_train=0.0, fraction_evaluate=1.0))
    assert messages(made.grid, "train") == []
    assert list(made.result.evaluate_metrics_clientapp) == [1, 2]
    assert not made.result.arrays
