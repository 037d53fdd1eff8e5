"""The command line: what it prints where, how it ends, and what it refuses."""

import inspect
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flwr_smartsplit.cli import app as module
from flwr_smartsplit.cli import subject
from flwr_smartsplit.cli.app import app
from flwr_smartsplit.cli.specs import task_of
from flwr_smartsplit.edge.hosts import local
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain

ROOT = Path(__file__).parents[2]
SMALL = "tests.cli.subjects:small"
SMALL_CNN = ["tests.models:small_cnn", "--input", "3x12x12"]
PROFILE_OPTIONS = [
    "model",
    "input_shape",
    "batch_size",
    "optimizer",
    "budget",
    "codec",
    "cache_dir",
    "as_json",
    "plot",
]
PLAN_OPTIONS = [
    "model",
    "input_shape",
    "batch_size",
    "optimizer",
    "budget",
    "cut",
    "cache_dir",
    "as_json",
    "plot",
]
CHECK_OPTIONS = [
    "model",
    "input_shape",
    "batch_size",
    "optimizer",
    "cuts",
    "codec",
    "seed",
    "tolerance",
    "as_json",
]


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def lines_of(result):
    """Split what was printed into lines of words."""
    return [line.split() for line in result.stdout.splitlines()]


@pytest.fixture
def small_cnn():
    """Profile the network that the tests name, in the way the package does."""
    task = task_of(SMALL_CNN[0], input_shape=(3, 12, 12), optimizer="adam")
    chain = build_chain(task)
    return chain, profile_of(task, batch_size=8)


# --- profile --------------------------------------------------------------------------


def test_json_has_the_profiles_numbers_and_nothing_else_is_printed(small_cnn):
    chain, profile = small_cnn
    peaks = [unit.device_peak_bytes for unit in profile.units[:-1]]
    result = call(
        "profile", *SMALL_CNN, "--batch-size", 8, "--optimizer", "adam", "--json"
    )

    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert found == {
        "model": SMALL_CNN[0],
        "input_shapes": [[3, 12, 12]],
        "optimizer": "adam",
        "versions": found["versions"],
        **json.loads(profile.to_json()),
        "whole_peak_bytes": profile.units[-1].device_peak_bytes,
        "least_memory_cut": peaks.index(min(peaks)) + 1,
        "refusals": chain.refusals,
        "no_cut_reason": None,
        "budget_bytes": None,
    }
    assert found["versions"].keys() == {"torch", "flwr_smartsplit"}


def test_a_budget_says_which_cuts_fit_and_the_deepest_route(small_cnn):
    _, profile = small_cnn
    arguments = ["profile", *SMALL_CNN, "--batch-size", 8, "--optimizer", "adam"]
    peaks = [unit.device_peak_bytes for unit in profile.units]

    found = json.loads(call(*arguments, "--budget", f"{peaks[4]}B", "--json").stdout)
    assert found["budget_bytes"] == peaks[4]
    assert found["cuts_within_budget"] == [1, 2, 3, 4, 5]
    assert found["deepest_route"] == "device[:5] > edge[5:]"

    text = call(*arguments, "--budget", f"{peaks[4]}B").stdout
    assert "cuts 1–5. The deepest route: device[:5] > edge[5:], after" in text
    rows = lines_of(call(*arguments, "--budget", "1TiB"))[4 : 4 + len(peaks)]
    assert [row[-1] for row in rows] == ["yes"] * len(peaks)


def test_a_budget_that_nothing_fits_says_what_is_needed():
    arguments = ["profile", SMALL, "--input", 4, "--budget", "10B"]

    result = call(*arguments)
    assert result.exit_code == 0
    assert "Nothing fits 10 B: it takes at least" in result.stdout
    found = json.loads(call(*arguments, "--json").stdout)
    assert (found["cuts_within_budget"], found["deepest_route"]) == ([], None)


def test_people_see_a_row_per_unit_and_what_it_means(small_cnn):
    chain, _ = small_cnn
    result = call("profile", *SMALL_CNN)

    rows = lines_of(result)[4 : 4 + len(chain)]
    names = [(row[0], row[1]) for row in rows]
    cuts = [*map(str, range(1, len(chain))), "whole"]
    assert names == list(zip(cuts, chain.unit_names, strict=True))
    assert "input 3×12×12, batch size 32, sgd" in result.stdout
    assert "needs the least" in result.stdout
    (name, reason), *_ = chain.refusals.items()
    assert f"{name}: {reason}" in result.stdout


def test_many_refusals_are_cut_short_for_people_only():
    arguments = ["profile", "torchvision:resnet18", "--input", "3x32x32"]

    text = call(*arguments).stdout
    assert "9 more places look like a cut" in text
    assert "bn1: relu writes into it" in text
    assert "and 4 more; --json lists them all" in text


def test_a_task_of_ones_own_brings_its_optimizer_and_inputs():
    found = json.loads(call("profile", SMALL + "_task", "--json").stdout)

    assert found["optimizer"] is None
    assert found["input_shapes"] == [[4]]
    first = found["units"][0]
    assert first["optimizer_state_bytes"] > 2 * first["parameter_bytes"]
    assert "its own optimizer" in call("profile", SMALL + "_task").stdout


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("UsedTwice", "cannot be cut anywhere: linear: both sides"),
        ("Branching", "torch.fx cannot trace Branching"),
    ],
)
def test_a_model_without_cuts_is_explained_and_shown_whole(name, reason):
    arguments = ["profile", f"tests.cli.subjects:{name}", "--input", 4]

    result = call(*arguments, "--budget", "1GiB")
    assert result.exit_code == 0
    assert reason in result.stdout
    assert "1 GiB fit the whole model. The deepest route: whole." in result.stdout
    found = json.loads(call(*arguments, "--json").stdout)
    assert reason in found["no_cut_reason"]
    assert found["least_memory_cut"] is None
    assert found["whole_peak_bytes"] == found["units"][0]["device_peak_bytes"] > 0


def test_a_cache_keeps_profiles_for_the_next_time(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "cache"
    arguments = ["profile", SMALL, "--input", 4, "--json", "--cache-dir", folder]
    first = call(*arguments).stdout
    (file,) = folder.iterdir()
    text = file.read_text()

    assert call(*arguments).stdout == first
    assert json.loads(text)["units"] == json.loads(first)["units"]
    file.write_text(text.replace('"batch_bytes": ', '"batch_bytes": 1'))
    assert call(*arguments).stdout != first


@pytest.mark.slow
def test_a_program_reads_json_whatever_the_model_prints():
    arguments = ["profile", "tests.cli.subjects:talkative", "--input", "4", "--json"]
    command = [sys.executable, "-m", "flwr_smartsplit.cli", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )

    assert json.loads(done.stdout)["model"] == arguments[1]
    assert "hello from MODEL" in done.stderr


# --- check ----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_every_cut_is_checked_and_good(optimizer):
    arguments = ["check", SMALL, "--input", 4, "--optimizer", optimizer]
    result = call(*arguments, "--cuts", "all", "--json")

    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["is_good"]
    assert found["batch_size"] == 3
    assert [route["cuts"] for route in found["routes"]] == [[], [1], [2], [3]]
    for route in found["routes"]:
        assert route["is_exact"]
        assert route["differences"] == []
        assert route["predicted_peak_bytes"] == route["measured_peak_bytes"] > 0
        assert route["relative_error"] == 0.0


def test_people_see_a_row_per_route_and_progress_apart():
    result = call("check", SMALL, "--input", 4, "--cuts", "2")

    assert result.exit_code == 0
    assert "device[:2] > edge[2:] 1     exact" in result.stdout
    assert "2 of 2 routes gave the stock model's numbers" in result.stdout
    assert "routes ━" in result.stderr
    assert "━" not in result.stdout


def test_a_seed_draws_other_batches_and_cuts(monkeypatch):
    drawn = []
    draw = module.Random
    monkeypatch.setattr(module, "Random", lambda s: drawn.append(s) or draw(s))
    arguments = ["check", SMALL, "--input", 4, "--cuts", "random:2", "--json"]

    result = call(*arguments, "--seed", 5)
    assert drawn == [5]
    assert json.loads(result.stdout)["seed"] == 5
    assert len(json.loads(result.stdout)["routes"]) == 3


def test_a_changed_number_is_found_and_ends_with_1(monkeypatch):
    unpack = WireTensor.unpack

    def bent(self, *device):
        tensor = unpack(self, *device)
        if tensor.is_floating_point():
            tensor.view(-1)[0] *= 1 + 1e-6
        return tensor

    monkeypatch.setattr(WireTensor, "unpack", bent)
    arguments = ["check", SMALL, "--input", 4, "--cuts", "1"]

    found = json.loads(call(*arguments, "--json").stdout)
    assert [route["is_exact"] for route in found["routes"]] == [True, False]
    assert any(
        "gradient 0.weight" in text for text in found["routes"][1]["differences"]
    )
    result = call(*arguments)
    assert result.exit_code == 1
    assert "differ, first: " in result.stdout
    assert "1 of 2 routes gave" in result.stdout


def test_a_prediction_off_by_a_byte_is_found_and_can_be_tolerated(monkeypatch):
    def one_more(*arguments, **named):
        profile = profile_chain(*arguments, **named)
        first, *others = profile.units
        first = replace(first, device_peak_bytes=first.device_peak_bytes + 1)
        return replace(profile, units=(first, *others))

    monkeypatch.setattr(subject, "profile_chain", one_more)
    arguments = ["check", SMALL, "--input", 4, "--cuts", "first,last"]

    result = call(*arguments)
    assert result.exit_code == 1
    assert "3 of 3 routes gave" in result.stdout
    assert "2 of 3 predictions hold" in result.stdout
    assert call(*arguments, "--tolerance", 0.1).exit_code == 0


@pytest.mark.parametrize("name", ["UsedTwice", "Branching"])
def test_a_model_without_cuts_is_checked_whole(name):
    arguments = ["check", f"tests.cli.subjects:{name}", "--input", 4, "--cuts", "all"]

    result = call(*arguments)
    assert result.exit_code == 0
    assert f"{name} cannot be cut" in result.stdout or "cannot trace" in result.stdout
    assert "1 of 1 route gave" in result.stdout


def test_an_interruption_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []
    claim = local.claim
    monkeypatch.setattr(local, "claim", lambda path: seen.append(path) or claim(path))

    result = call("check", "tests.cli.subjects:interrupted", "--input", 4)

    assert result.exit_code == 130
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


# --- what is refused ------------------------------------------------------------------

BOTH = [
    (["torchvision:resnt18"], "close: resnet18"),
    ([SMALL], "--input 3x32x32"),
    ([SMALL, "--input", "abc"], "--input 'abc' is not a shape"),
    ([SMALL, "--input", "3x0x1"], "--input '3x0x1' is not a shape"),
    ([SMALL, "--input", "5"], "must take them and not look at values"),
    ([SMALL, "--input", 4, "--batch-size", 0], "--batch-size 0 is less than 1"),
    ([SMALL, "--input", 4, "--batch-size", 1], "at batch size 1 fails: ValueError"),
    ([SMALL, "--input", 4, "--optimizer", "x"], "choose one of sgd, momentum, adam"),
    ([f"{SMALL}_task", "--optimizer", "sgd"], "leave --optimizer and --input out"),
    ([f"{SMALL}_task", "--input", "4"], "leave --optimizer and --input out"),
    (["tests.cli.subjects:frozen", "--input", 4], "does not require grad"),
    (["tests.cli.subjects:LooksAtValues", "--input", 4], "not look at values"),
    (["torchvision:vit_b_16", "--input", "3x33x33"], "indivisible by patch size"),
    (["torchvision:alexnet", "--input", "1x64x64"], "to have 3 channels"),
]
PROFILE_ONLY = [
    (["--budget", "64"], "--budget '64' is not a size"),
    (["--plot", "picture.gif"], "is not a .png, .svg or .pdf"),
    (["--plot", "no/such/folder/a.png"], "there is no folder no/such/folder"),
    (["--cache-dir", __file__], "is not a folder"),
]
CHECK_ONLY = [
    (["--cuts", "some"], "write all, or with commas"),
    (["--cuts", "4"], "can be cut at 1..3 only"),
    (["--tolerance", -0.1], "--tolerance -0.1 is not at least 0"),
    (["--tolerance", "nan"], "--tolerance nan is not at least 0"),
    (["--seed", -1], "--seed -1 is not in 0.."),
]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *((["profile", *arguments], words) for arguments, words in BOTH),
        *((["check", *arguments], words) for arguments, words in BOTH),
        *((["profile", SMALL, "--input", 4, *a], words) for a, words in PROFILE_ONLY),
        *((["check", SMALL, "--input", 4, *a], words) for a, words in CHECK_ONLY),
        (["check", "tests.cli.subjects:without_length"], "cannot be trained: IndexErr"),
    ],
)
def test_a_mistake_is_explained_in_one_line_without_a_traceback(arguments, words):
    result = call(*arguments)

    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_model_that_fails_in_a_way_nobody_thought_of_is_explained(monkeypatch):
    def fail(task):
        raise ValueError("a unit is\nnot in the list")

    monkeypatch.setattr(subject, "build_chain", fail)
    result = call("profile", SMALL, "--input", 4)

    assert result.exit_code == 2
    assert "cannot be read: ValueError: a unit is." in result.stderr


@pytest.mark.parametrize(
    "arguments", [["profile"], ["profile", SMALL, "--bogus"], ["nope"]]
)
def test_what_is_no_option_at_all_ends_in_usage(arguments):
    result = call(*arguments)

    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_help_lists_the_commands_and_loads_no_torch():
    assert {"profile", "plan", "check"} <= set(call("--help").stdout.split())
    for command in ("profile", "plan", "check"):
        assert "package.module:function" in call(command, "--help").stdout
    show = "import sys, flwr_smartsplit.cli.app; print('torch' in sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", show], cwd=ROOT, text=True)
    assert loaded.strip() == "False"


def test_no_option_is_added_by_accident():
    assert list(inspect.signature(module.profile).parameters) == PROFILE_OPTIONS
    assert list(inspect.signature(module.plan).parameters) == PLAN_OPTIONS
    assert list(inspect.signature(module.check).parameters) == CHECK_OPTIONS
