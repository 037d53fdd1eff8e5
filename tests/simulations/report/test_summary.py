"""Figures, against numbers worked out by hand from a journal of a few lines."""

import json
from dataclasses import asdict, replace

import pytest

from simulations.experiments.errors import ExperimentError
from simulations.experiments.rows import MethodRun, read_run
from simulations.report.summary import (
    figures_of,
    methods_object,
    read_results,
    reasons_to_stay_out,
)
from tests.simulations import journals
from tests.simulations.fleets.test_clock import PROFILE
from tests.simulations.journals import (
    FEDAVG_ROWS,
    KIB,
    SMARTSPLIT_ROWS,
    add_clock,
    client_row,
    write_results,
)

BUDGETS_BYTES = {k: b for k, b in journals.BUDGETS_BYTES.items() if b is not None}


def figures(rows):
    return figures_of(MethodRun.from_rows("method", rows), BUDGETS_BYTES)


def test_the_figures_of_fedavg_are_those_worked_out_by_hand():
    found = figures(FEDAVG_ROWS)

    assert found.num_rounds == 2
    assert found.accuracy == 0.75
    assert found.accuracy_last5 == (0.50 + 0.75) / 2  # without the untrained model
    assert found.per_class_accuracy == (0.5, 1.0)
    assert found.participants == 3
    assert found.device_peak_bytes == 500 * KIB
    assert found.peak_over_budget == 3.0  # client 0: 300 of 100; client 1: 1.25
    assert found.devices_over_budget == 2
    assert found.smallest_served_budget_bytes is None
    assert (found.bytes_down, found.bytes_up) == (60, 100)
    assert found.comm_bytes_total == 160
    assert found.seconds_per_round == 1.0
    assert found.first_round_seconds == 9.0
    assert found.round_wall_clock_sec == 5.0
    assert found.server_aggregation_time_sec == 0.375
    assert found.client_peak_cpu_memory_mb == 0.512


def test_the_figures_of_a_split_run_count_both_links_of_a_device():
    found = figures(SMARTSPLIT_ROWS)

    assert found.participants == 1
    assert found.device_peak_bytes == 300 * KIB  # evaluation does not count
    assert found.peak_over_budget == 0.75
    assert found.devices_over_budget == 0
    assert found.smallest_served_budget_bytes == 400 * KIB
    assert (found.bytes_down, found.bytes_up) == (3 + 7 + 2000, 4 + 1000)
    assert found.comm_bytes_total == 4000
    assert found.seconds_per_round == 4.0
    assert found.per_class_accuracy == (0.2, None)


@pytest.mark.parametrize(
    ("row", "change", "figure"),
    [
        (1, {"peak_bytes": 301}, "peak_over_budget"),
        (6, {"bytes_up": 21}, "bytes_up"),
        (2, {"edge_bytes_down": 1}, "bytes_down"),
        (9, {"comm_bytes_total": 71}, "comm_bytes_total"),
        (10, {"accuracy": 0.76}, "accuracy"),
        (5, {"accuracy": 0.51}, "accuracy_last5"),
    ],
)
def test_a_changed_row_changes_its_figure(row, change, figure):
    """Else the figures above could be right by accident."""
    rows = list(FEDAVG_ROWS)
    rows[row] = {**rows[row], **change}

    assert getattr(figures(rows), figure) != getattr(figures(FEDAVG_ROWS), figure)


def test_the_mean_of_the_last_five_takes_five():
    rows = [journals.evaluation_row(r, r / 10, [r / 10]) for r in range(9)]

    assert figures(rows).accuracy_last5 == pytest.approx(
        (0.4 + 0.5 + 0.6 + 0.7 + 0.8) / 5
    )


def test_who_never_took_part_is_told_why():
    run = MethodRun.from_rows("smartsplit", SMARTSPLIT_ROWS)

    assert reasons_to_stay_out(run) == {
        "0": "sat out: no route fits",
        "2": "not sampled: not sampled in this round",
    }


def test_a_run_without_a_single_round_has_no_figures_but_no_errors():
    found = figures([])

    assert found.accuracy is None
    assert found.seconds_per_round is None
    assert found.peak_over_budget is None
    assert found.participants == 0


def test_the_summary_is_strict_json_even_of_numbers_json_lacks(tmp_path):
    rows = [journals.evaluation_row(1, float("nan"), [1.0])]
    results = read_results(write_results(tmp_path, fedavg=rows))

    figures = {name: asdict(each) for name, each in results.figures().items()}
    text = json.dumps(methods_object(figures), allow_nan=False)

    assert json.loads(text)["methods"]["fedavg"]["accuracy"] is None


def test_a_line_cut_short_by_an_interrupt_is_left_out(tmp_path):
    folder = write_results(tmp_path, fedavg=FEDAVG_ROWS)
    journal = folder / "fedavg.jsonl"
    whole = read_run(journal)

    with journal.open("a") as file:
        file.write('{"kind": "client", "round": 3, "client_')

    assert read_run(journal) == whole


def test_results_hold_the_methods_that_have_a_journal(tmp_path):
    results = read_results(write_results(tmp_path, smartsplit=SMARTSPLIT_ROWS))

    assert [run.method for run in results.runs] == ["smartsplit"]
    assert results.client_keys == ["0", "1", "2"]
    assert results.budgets_bytes == BUDGETS_BYTES


def test_a_folder_with_a_profile_has_simulated_figures(tmp_path):
    """Only latencies and messages cost much here: 0.07 s, 540,000 B/s, 410,000 B/s."""
    rows = [
        client_row(1, "0", route="whole", num_steps=1, bytes_down=540_000),
        client_row(1, "1", route="whole", num_steps=1, bytes_up=820_000),
        journals.round_row(1, 9.0, 0),
        client_row(2, "0", route="whole", num_steps=1, bytes_down=5_400_000),
        journals.round_row(2, 9.0, 0),
    ]
    folder = add_clock(write_results(tmp_path, fedavg=rows), PROFILE)

    found = read_results(folder).figures()["fedavg"]

    assert found.simulated_seconds == pytest.approx(2.07 + 10.07, rel=1e-5)
    assert found.simulated_seconds_per_round == pytest.approx(6.07, rel=1e-5)
    assert found.simulated_seconds_slowest_round == pytest.approx(10.07, rel=1e-5)
    assert found.simulated_device_joules == pytest.approx(2 * 13, rel=1e-5)
    assert found.simulated_edge_joules == 0.0
    assert found.seconds_per_round == 9.0


def test_a_folder_without_a_profile_has_no_simulated_figures(tmp_path):
    results = read_results(write_results(tmp_path, fedavg=FEDAVG_ROWS))

    assert results.timelines() == {}
    assert results.figures()["fedavg"].simulated_seconds is None


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(ExperimentError, match="holds no results"):
        read_results(tmp_path)


def test_unknown_fields_and_kinds_are_for_other_readers():
    rows = [{**row, "new": 1} for row in FEDAVG_ROWS] + [{"kind": "weather"}]

    assert replace(figures(rows)) == figures(FEDAVG_ROWS)
