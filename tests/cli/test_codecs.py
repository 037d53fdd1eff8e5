"""``--codec``: what crosses each cut, and the proof that this is what was trained."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from flwr_smartsplit.cli.app import app
from tests.cli.test_app import SMALL, SMALL_CNN


def call(*arguments: Any) -> Any:
    """Run a command."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_profile_shows_what_crosses_each_way() -> None:
    """Both ways, how much less that is, and peaks that count coding."""
    arguments = ["profile", *SMALL_CNN, "--batch-size", 8]
    plain = json.loads(call(*arguments, "--json").stdout)
    result = call(*arguments, "--codec", "integer:8:16", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["codec"] == "integer:8:16"
    for unit, before in zip(found["units"][:-1], plain["units"], strict=False):
        (tensor,) = unit["crossing"]
        rows, width = tensor["shape"][0], before["boundary_bytes"] // 8 // 4
        assert unit["sent_bytes"] == rows * (width + 8)
        assert unit["back_bytes"] == rows * (2 * width + 1)
        assert unit["device_peak_bytes"] >= before["device_peak_bytes"]
    shown = call(*arguments, "--codec", "integer:4").stdout
    assert "integer:4 at the cut" in shown
    assert "times" in shown


@pytest.mark.parametrize("codec", ["packed", "integer:8", "topk:0.3:0.2"])
def test_every_cut_is_checked_with_the_codec_in_the_whole_model(codec: str) -> None:
    """Exact, and predicted: to the byte, or as a bound."""
    arguments = ["check", SMALL, "--input", 4, "--cuts", "all", "--codec", codec]
    result = call(*arguments, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, found
    assert found["codec"] == codec
    assert [route["cuts"] for route in found["routes"]] == [[], [1], [2], [3]]
    assert all(route["is_exact"] for route in found["routes"])


def test_a_codec_that_is_none_is_refused() -> None:
    """With those there are."""
    for command in ("profile", "check"):
        result = call(command, SMALL, "--input", 4, "--codec", "int8")
        assert result.exit_code == 2
        assert "--codec 'int8' is no codec: write one of raw, packed" in result.stderr
