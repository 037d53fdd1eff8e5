"""One tiny run of everything, as a user starts it."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from simulations.experiments.marks import read_marks
from simulations.experiments.partitions import Dirichlet
from simulations.experiments.provenance import Provenance
from simulations.experiments.runner import prepare, run_methods
from simulations.fleets.presets import heavy_phones
from simulations.report.summary import COMPARED, read_results
from simulations.studies.quickstart import quickstart

ROOT = Path(__file__).parents[2]
NUM_CLIENTS, NUM_ROUNDS = 6, 2
CENTRAL, CODED = ("fedavg", "drop_weak"), "smartsplit_by_rate"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Run the quickstart with six clients for two rounds; return stdout and folder."""
    out = tmp_path_factory.mktemp("tiny")
    options = ["--clients", NUM_CLIENTS, "--rounds", NUM_ROUNDS, "--out", out, "--json"]
    finished = subprocess.run(
        [sys.executable, "-m", "simulations", "run", "quickstart", *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, out


def summary_of(out):
    return json.loads((out / "summary.json").read_text())["methods"]


@pytest.mark.ray
def test_standard_output_is_one_json_object(tiny):
    stdout, out = tiny

    methods, summary = json.loads(stdout)["methods"], summary_of(out)
    assert list(methods) == list(summary) == [*CENTRAL, "smartsplit", CODED]
    for name, figures in methods.items():
        assert set(figures) == set(COMPARED)
        assert figures == {figure: summary[name][figure] for figure in COMPARED}
        assert None not in figures.values()


@pytest.mark.ray
def test_each_method_trains_whom_it_can(tiny):
    """Three of six clients hold the whole model, and one fits no part of it."""
    methods = summary_of(tiny[1])

    assert {name: figures["participants"] for name, figures in methods.items()} == {
        "fedavg": 6,
        "drop_weak": 3,
        "smartsplit": 5,
        CODED: 5,
    }
    assert all(figures["num_rounds"] == NUM_ROUNDS for figures in methods.values())
    assert methods["drop_weak"]["per_class_accuracy"][:5] == [0.0] * 5
    assert methods["smartsplit"]["accuracy"] > methods["drop_weak"]["accuracy"] + 0.1


@pytest.mark.ray
def test_a_codec_sends_less_in_no_more_time(tiny):
    """The least device has memory for no codec, and the round waits for it."""
    plain, coded = (summary_of(tiny[1])[name] for name in ("smartsplit", CODED))

    assert coded["edge_bytes_up"] < plain["edge_bytes_up"]
    # What tells the codecs takes some bytes, too.
    assert coded["simulated_seconds"] <= 1.0001 * plain["simulated_seconds"]


@pytest.mark.ray
def test_devices_keep_within_their_budgets_unless_the_method_ignores_them(tiny):
    methods = summary_of(tiny[1])

    assert methods["fedavg"]["devices_over_budget"] == NUM_CLIENTS // 2
    assert methods["fedavg"]["peak_over_budget"] > 1
    for capped in ("drop_weak", "smartsplit", CODED):
        assert methods[capped]["devices_over_budget"] == 0
        assert 0.9 < methods[capped]["peak_over_budget"] <= 1


@pytest.mark.ray
def test_measured_peaks_are_the_predicted_ones(tiny):
    _, out = tiny
    rows = [
        json.loads(line)
        for method in ("drop_weak", "smartsplit", CODED)
        for line in (out / f"{method}.jsonl").read_text().splitlines()
    ]
    trained = [row for row in rows if row.get("status") == "accepted"]

    assert len(trained) == NUM_ROUNDS * (3 + 5 + 5)
    assert all(r["peak_bytes"] == r["predicted_peak_bytes"] for r in trained)


@pytest.mark.ray
@pytest.mark.parametrize("method", CENTRAL)
def test_without_an_edge_all_traffic_is_the_messages(tiny, method):
    runs = {run.method: run for run in read_results(tiny[1]).runs}
    for number in range(1, NUM_ROUNDS + 1):
        sent = [row for row in runs[method].clients if row.round == number]
        (total,) = [
            r.comm_bytes_total for r in runs[method].rounds if r.round == number
        ]
        messages = sum(row.bytes_down + row.bytes_up for row in sent)
        assert total == messages > 0


@pytest.mark.slow
@pytest.mark.ray
def test_in_one_process_the_same_methods_end_at_the_same_bits(tiny, tmp_path):
    """Studies run this way; Flower's engine and Ray are what they leave out."""
    experiment = replace(
        quickstart(), num_clients=NUM_CLIENTS, num_rounds=NUM_ROUNDS, in_process=True
    )
    provenance = Provenance.of_this_process([], now=datetime.now(UTC))
    prepared = prepare(experiment, tmp_path, provenance=provenance)

    run_methods(experiment, tmp_path, prepared=prepared, on_round=lambda *_: None)

    assert len(read_marks(tmp_path)) == 4
    assert read_marks(tmp_path) == read_marks(tiny[1])


@pytest.mark.ray
def test_the_folder_says_how_it_was_made(tiny):
    config = json.loads((tiny[1] / "config.json").read_text())

    assert config["command"].startswith("python -m simulations run quickstart")
    assert config["experiment"]["seed"] == 0
    assert {"flwr", "ray", "torch", "python"} <= config["versions"].keys()
    assert (tiny[1] / "report.html").stat().st_size > 10_000


def planned(folder):
    """Who was chosen when, on which route and why."""
    rows = map(json.loads, (folder / "smartsplit.jsonl").read_text().splitlines())
    facts = ("round", "client_key", "status", "route", "why", "cause", "moves")
    return [
        [str(row.get(fact)) for fact in (*facts, "released")]
        for row in rows
        if row["kind"] == "client"
    ]


@pytest.mark.slow
@pytest.mark.ray
def test_a_seed_chooses_and_trains_alike_on_any_number_of_workers(tmp_path):
    """Some of the phones chosen, and their speed learned."""
    experiment = replace(
        quickstart(),
        methods=("smartsplit",),
        fleet=heavy_phones,
        partition=Dirichlet(alpha=0.1),
        share_labels=True,
        share_speed=False,
        batch_size=8,
        num_clients=12,
        fraction_train=0.5,
        num_rounds=4,
    )
    provenance = Provenance.of_this_process([], now=datetime.now(UTC))
    folders = [tmp_path / name for name in ("one", "two", "here", "other seed")]
    for folder in folders:
        changes = {"num_workers": 2 if folder.name == "two" else 1}
        changes |= {"seed": 1} if folder.name == "other seed" else {}
        own = replace(experiment, **changes, in_process=folder.name == "here")
        prepared = prepare(own, folder, provenance=provenance)
        run_methods(own, folder, prepared=prepared, on_round=lambda *_: None)

    one, two, here, other = folders
    assert planned(one) == planned(two) == planned(here) != planned(other)
    assert read_marks(one) == read_marks(two) == read_marks(here) != read_marks(other)
    routes = {(k, route) for _, k, _, route, *_ in planned(one) if route != "None"}
    assert len(routes) > len({key for key, _ in routes})  # What was learned counts.
