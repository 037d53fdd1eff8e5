"""A results folder written by hand: two methods, three clients, two rounds."""

import json
from dataclasses import asdict

from simulations.fleets.devices import FleetDevice
from simulations.report.summary import PROFILE

KIB = 1024
BUDGETS_BYTES = {"0": 100, "1": 400 * KIB, "2": None}

CONFIG = {
    "experiment": {
        "name": "by hand",
        "data": "digits",
        "model": "small",
        "num_clients": 3,
        "num_rounds": 2,
        "seed": 5,
    },
    "methods": {"fedavg": "everybody", "smartsplit": "an edge helps"},
    "num_train_examples": 30,
    "num_test_examples": 4,
    "whole_peak_bytes": 500 * KIB,
    "smallest_peak_bytes": 50 * KIB,
    "clients": [
        {"client_key": key, "is_weak": key < "2", "budget_bytes": b, "num_examples": 10}
        for key, b in BUDGETS_BYTES.items()
    ],
    "command": "python -m simulations run by-hand <&>",
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"python": "3.11"},
    "hardware": {"cores": "2"},
}


def client_row(round_, key, status="accepted", **values):
    row = {"kind": "client", "phase": "train", "round": round_, "client_key": key}
    return {**row, "status": status, **values}


def round_row(round_, seconds, total, merging=0.5):
    return {
        "kind": "round",
        "round": round_,
        "round_wall_clock_sec": seconds,
        "server_aggregation_time_sec": merging,
        "comm_bytes_total": total,
    }


def evaluation_row(round_, accuracy, per_class):
    return {
        "kind": "evaluation",
        "round": round_,
        "accuracy": accuracy,
        "loss": 1.0,
        "per_class_accuracy": per_class,
    }


FEDAVG_ROWS = [
    evaluation_row(0, 0.10, [0.2, 0.0]),
    client_row(1, "0", peak_bytes=300, bytes_down=10, bytes_up=20),
    client_row(1, "1", peak_bytes=500 * KIB, bytes_down=10, bytes_up=20),
    client_row(1, "2", peak_bytes=500 * KIB, bytes_down=10, bytes_up=20),
    round_row(1, 9.0, 90),
    evaluation_row(1, 0.50, [0.5, 0.5]),
    client_row(2, "0", peak_bytes=250, bytes_down=10, bytes_up=20),
    client_row(2, "1", peak_bytes=500 * KIB, bytes_down=10, bytes_up=20),
    client_row(2, "2", "lost", cause="went away", bytes_down=10),
    round_row(2, 1.0, 70, merging=0.25),
    evaluation_row(2, 0.75, [0.5, 1.0]),
]
SMARTSPLIT_ROWS = [
    evaluation_row(0, 0.10, [0.2, 0.0]),
    client_row(1, "0", "sat_out", cause="no route fits", budget_bytes=100),
    client_row(
        1,
        "1",
        peak_bytes=300 * KIB,
        budget_bytes=400 * KIB,
        bytes_down=3,
        bytes_up=4,
        edge_bytes_up=1000,
        edge_bytes_down=2000,
    ),
    client_row(1, "2", "not_sampled", cause="not sampled in this round"),
    {**client_row(1, "1"), "phase": "evaluate", "bytes_down": 7, "peak_bytes": 10**9},
    round_row(1, 4.0, 4000),
    evaluation_row(1, 0.60, [0.2, None]),
]


def write_results(folder, **rows_of_methods):
    """Write the folder, with the rows given for each method."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for method, rows in rows_of_methods.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{method}.jsonl").write_text(lines)
    return folder


def add_clock(folder, profile):
    """Add the profile and the devices that a clock is made from."""
    (folder / PROFILE).write_text(profile.to_json())
    config = json.loads((folder / "config.json").read_text())
    for client in config["clients"]:
        device = FleetDevice(name="device", budget_bytes=client["budget_bytes"])
        client["device"] = asdict(device)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
