"""The examples' routes, in this process: all that is real is the Ray of their edges.

``test_examples.py`` runs the same apps as their pages say, which takes far longer.
"""

import json
import tomllib
from pathlib import Path
from pkgutil import resolve_name

import pytest
from flwr.app import Context, RecordDict

from tests.in_process_grid import InProcessGrid

EXAMPLES = Path(__file__).parents[1] / "examples"

# What each client's route is, by client_key; None sits out.
ROUTES = {
    "quickstart": {"0": "whole", "1": "whole", "2": "device[:3] > edge[3:]", "3": None},
    "own_model": {
        "0": "whole",
        "1": "device[:4] > edge[4:5] > device[5:]",
        "2": "device[:3] > edge[3:5] > device[5:]",
        "3": "device[:2] > edge[2:5] > device[5:]",
    },
    "legacy_client": {
        "0": "whole",
        "1": "device[:4] > edge[4:]",
        "2": "device[:2] > edge[2:]",
    },
    "multi_hop": {
        "0": "whole",
        "1": "device[:6] > near[6:]",
        "2": "device[:6] > far[6:8] > device[8:]",
        "3": "device[:4] > near[4:8] > far[8:]",
        "4": "device[:2] > near[2:6] > far[6:]",
        "5": "device[:2] > far[2:8] > device[8:]",
    },
}


def routes_by_round(journal: Path) -> list[dict[str, str | None]]:
    """Read who trained on which route in each round; None is not accepted."""
    rows = [json.loads(line) for line in journal.read_text("utf-8").splitlines()]
    num_rounds = sum(row["kind"] == "round" for row in rows)
    return [
        {
            row["client_key"]: row["route"] if row["status"] == "accepted" else None
            for row in rows
            if row.get("phase") == "train" and row["round"] == number
        }
        for number in range(1, num_rounds + 1)
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "example", ["multi_hop", pytest.param("own_model", marks=pytest.mark.slow)]
)
def test_an_example_gives_the_routes_that_it_promises(example, tmp_path, monkeypatch):
    folder = EXAMPLES / example
    monkeypatch.syspath_prepend(folder)
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    settings = project["tool"]["flwr"]["app"]
    server, client = (
        resolve_name(settings["components"][part])
        for part in ("serverapp", "clientapp")
    )
    journal = tmp_path / "journal.jsonl"
    config = settings["config"] | {"journal": str(journal)}
    grid = InProcessGrid([client] * len(ROUTES[example]))

    server(grid, Context(1, 1, {}, RecordDict(), config))

    assert routes_by_round(journal) == [ROUTES[example]] * config["num-server-rounds"]
