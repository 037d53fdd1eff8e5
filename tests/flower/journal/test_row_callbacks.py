"""Row callbacks: what a round sums up to, and that TensorBoard and W&B are told."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flwr_smartsplit.flower.journal.row_callbacks import (
    RoundScalars,
    TensorBoardRows,
    WandbRows,
    client_scalars,
    round_scalars,
)
from flwr_smartsplit.types import ROW_FACTS
from tests.flower.apps import (
    apps,
    budgets_of,
    failing_app,
    message_app,
    overweight_app,
    run,
    smart_split,
)
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import TASK

ROOT = Path(__file__).parents[3]
MIXED = budgets_of(1, 4, None, 8)
CLIENT = {"kind": "client", "phase": "train", "round": 1, "status": "accepted"}


class FakeRun:
    """Note what is logged, as a run of W&B would."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def log(self, data: dict[str, Any], *, step: int) -> None:
        """Note it."""
        assert all(isinstance(value, float) for value in data.values())
        self.logged.append((step, data))

    def scalars(self, step: int, phase: str = "train") -> dict[str, Any]:
        """Return what one phase of one round logged."""
        found = [
            data for at, data in self.logged if at == step and f"{phase}/loss" in data
        ]
        assert len(found) == 1
        return found[0]


def of_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the event file back: steps and values of each curve."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


# --- sums -----------------------------------------------------------------------------


def test_means_are_weighted_by_examples_and_of_accepted_clients_only() -> None:
    """By hand: (1 * 30 + 3 * 10) / 40; a metric counts where it is."""
    rows = [
        {**CLIENT, "loss": 1.0, "num_examples": 30, "accuracy": 0.5},
        {**CLIENT, "loss": 3.0, "num_examples": 10},
        {**CLIENT, "loss": 99.0, "num_examples": 50, "status": "refused"},
    ]
    scalars = round_scalars({"kind": "round"}, rows)
    assert scalars["train/loss"] == 1.5
    assert scalars["train/accuracy"] == 0.5


def test_the_worst_peak_is_that_of_who_failed_too() -> None:
    """Who has no budget, or measured nothing, has no fraction."""
    rows = [
        {**CLIENT, "peak_bytes": 50, "budget_bytes": 100},
        {**CLIENT, "peak_bytes": 120, "budget_bytes": 100, "status": "out_of_memory"},
        {**CLIENT, "peak_bytes": 999, "budget_bytes": None},
        {**CLIENT, "budget_bytes": 7, "status": "lost"},
    ]
    rows = [{**row, "loss": 1.0, "num_examples": 1} for row in rows]
    assert round_scalars({"kind": "round"}, rows)["train/worst_peak_fraction"] == 1.2
    none = round_scalars({"kind": "round"}, rows[2:])
    assert "train/worst_peak_fraction" not in none


def test_a_round_of_nobody_has_its_own_numbers() -> None:
    """No mean of nothing."""
    summary = {"kind": "round", "accepted": 0, "selected": 0, "comm_bytes_total": 0}
    assert round_scalars(summary, []) == {
        "train/accepted": 0.0,
        "train/selected": 0.0,
        "train/bytes": 0.0,
    }


def test_counts_go_back_to_none_and_rounds_do_not_mix() -> None:
    """A curve that stays at its last value would lie."""
    written: list[tuple[int, dict[str, float]]] = []
    take = RoundScalars(lambda *pair: written.append(pair), per_client=False)
    lost = {**CLIENT, "status": "lost", "route": "whole"}
    for row in (
        {**lost, "round": 1},
        {**lost, "round": 1, "client_key": "other"},
        {"kind": "round", "round": 1},
        {**lost, "round": 2},  # Its round never ends.
        {"kind": "round", "round": 3},
        {"kind": "evaluation_round", "round": 3},
        {"kind": "something else"},
    ):
        take(row)
    assert written == [
        (1, {"train/status/lost": 2.0, "train/route/whole": 2.0}),
        (3, {"train/status/lost": 0.0, "train/route/whole": 0.0}),
        (3, {}),
    ]


def test_who_could_not_be_asked_is_counted_apart() -> None:
    """A profile that fails is not part of training."""
    row = {**CLIENT, "phase": "profile", "status": "failed"}
    scalars = round_scalars({"kind": "round"}, [row])
    assert scalars == {"profile/status/failed": 1.0}


def test_clients_have_curves_of_their_own_if_asked() -> None:
    """Measurements and metrics, no texts."""
    row = {**CLIENT, "client_key": "c7", "loss": 2.0, "route": "whole", "f1": 0.25}
    expected = {"train/client/c7/loss": 2.0, "train/client/c7/f1": 0.25}
    assert client_scalars([row]) == expected
    assert client_scalars([{**row, "resident_growth_bytes": None}]) == expected
    measured = client_scalars([{**row, "resident_growth_bytes": 4096}])
    assert measured == {**expected, "train/client/c7/resident_growth_bytes": 4096.0}


# --- on real rounds -------------------------------------------------------------------


def fleet() -> list[Any]:
    """Make clients of four routes, one over its cap, one failing, one too small."""
    return [
        *apps(MIXED),
        overweight_app(4, message_app),
        failing_app(5),
        message_app(6, 10),
    ]


@pytest.mark.parametrize("api", ["message", "legacy"])
def test_a_run_has_its_curves_in_both_apis(api: str) -> None:
    """Training and evaluation, from either strategy."""
    wandb = FakeRun()
    settings = {"on_row": [WandbRows(wandb)], "fraction_evaluate": 1.0}
    if api == "message":
        run(fleet(), smart_split(**settings), num_rounds=2)
    else:
        run_legacy(fleet(), legacy_smart_split(**settings), num_rounds=2)
    assert [step for step, _ in wandb.logged] == [1, 1, 2, 2]
    for step in (1, 2):
        train = wandb.scalars(step)
        assert (train["train/selected"], train["train/accepted"]) == (6.0, 4.0)
        assert train["train/status/accepted"] == 4.0
        assert train["train/status/out_of_memory"] == 1.0
        assert train["train/status/failed"] == 1.0
        assert train["train/status/sat_out"] == 1.0
        assert train["train/route/device[:4] > edge[4:]"] == 2.0
        assert train["train/worst_peak_fraction"] > 1.0
        assert train["train/bytes"] > 0
        assert train["train/seconds"] >= train["train/aggregation_seconds"] > 0
        evaluated = wandb.scalars(step, "evaluate")
        assert evaluated["evaluate/loss"] > 0
        assert 0.0 <= evaluated["evaluate/accuracy"] <= 1.0
        assert evaluated["evaluate/accepted"] >= 4.0
        assert not any("client" in name for name in (*train, *evaluated))


def test_rows_hold_nothing_but_facts_and_the_tasks_metrics() -> None:
    """What is not a known fact would be taken for a metric."""
    rows: list[Any] = []
    strategy = smart_split(on_row=[rows.append], fraction_evaluate=1.0)
    run(fleet(), strategy, num_rounds=1)
    unknown = {n for row in rows if row["kind"] == "client" for n in row} - ROW_FACTS
    assert TASK.metrics_fn is not None
    assert unknown == {"accuracy"}


def test_the_page_on_metrics_explains_every_key_and_no_other() -> None:
    """Of both kinds of rows; and every curve that all rounds have."""
    rows: list[Any] = []
    strategy = smart_split(on_row=[rows.append], fraction_evaluate=1.0)
    run(fleet(), strategy, num_rounds=1)
    of_rounds = {name for row in rows if row["kind"] != "client" for name in row}
    page = (ROOT / "docs" / "howto" / "metrics.md").read_text("utf-8")
    clients, rounds, curves = (
        {
            name
            for line in part.splitlines()
            if line.startswith("| `")
            for name in re.findall(r"`([^`]+)`", line.split("|")[1])
        }
        for part in (
            page.partition("### A client's row")[2].partition("### A round's row")[0],
            page.partition("### A round's row")[2].partition("## Functions")[0],
            page.partition("## TensorBoard")[2],
        )
    )
    assert clients == ROW_FACTS
    assert rounds == of_rounds
    own = [row for row in rows if row["kind"] == "client" and row["phase"] == "train"]
    (summary,) = (row for row in rows if row["kind"] == "round")
    found = {name.split("/")[1] for name in round_scalars(summary, own)}
    assert found == {name.removesuffix("/...") for name in curves}


# --- TensorBoard and W&B --------------------------------------------------------------


def test_tensorboard_reads_the_curves_back(tmp_path: Path) -> None:
    """The same numbers as W&B is told, at the same rounds, before anybody closes."""
    board, wandb = TensorBoardRows(tmp_path, per_client=True), FakeRun()
    told = [board, WandbRows(wandb, per_client=True)]
    run(fleet(), smart_split(on_row=told, fraction_evaluate=1.0), num_rounds=2)
    found = of_tensorboard(tmp_path)
    expected: dict[str, list[tuple[int, float]]] = {}
    for step, data in wandb.logged:
        for name, value in data.items():
            expected.setdefault(name, []).append((step, pytest.approx(value, 1e-6)))
    assert found == expected
    assert "train/client/c1/peak_bytes" in found
    assert "evaluate/client/c2/accuracy" in found
    board.close()


def test_without_tensorboard_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing is written."""
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"flwr-smartsplit\[tensorboard\]"):
        TensorBoardRows(tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_what_is_no_run_is_refused() -> None:
    """The module ``wandb`` has a ``log`` too, and would do; None would not."""
    with pytest.raises(TypeError, match=r"NoneType; give what wandb\.init"):
        WandbRows(None)  # type: ignore[arg-type]


def test_importing_the_callbacks_loads_neither_package() -> None:
    """They are looked for when they are used."""
    show = "import sys; print(*{'tensorboard', 'wandb'} & set(sys.modules))"
    command = f"import flwr_smartsplit.flower.journal.row_callbacks; {show}"
    found = subprocess.check_output([sys.executable, "-c", command], cwd=ROOT)
    assert found.split() == []
