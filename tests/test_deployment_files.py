"""The deployment example's containers: what can be checked without starting any."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from flwr_smartsplit.cli.app import app

EXAMPLE = Path(__file__).parents[1] / "examples" / "deployment"
COMPOSE = yaml.safe_load((EXAMPLE / "compose.yaml").read_text("utf-8"))
HELM = EXAMPLE / "helm"
SERVICES = COMPOSE["services"]
FIELD = re.compile(r"\{\{ \.(\w+)\.(\w+) \}\}")


def rendered(template: str, given: Mapping[str, Mapping[str, Any]]) -> str:
    """Fill in the fields of a template, which has nothing but fields."""
    filled = FIELD.sub(lambda match: str(given[match[1]][match[2]]), template)
    assert "{{" not in filled
    return filled


def manifests() -> Iterator[Any]:
    """Read what the chart makes."""
    values = yaml.safe_load((HELM / "values.yaml").read_text("utf-8"))
    template = (HELM / "templates" / "edge.yaml").read_text("utf-8")
    given = {"Values": values, "Release": {"Name": "berlin"}}
    yield from yaml.safe_load_all(rendered(template, given))


def options(words: list[str]) -> set[str]:
    """Name the options of a command line."""
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def of_edge() -> set[str]:
    """Name the options that ``smartsplit edge`` has."""
    command: Any = typer.main.get_command(app)
    return {o for param in command.commands["edge"].params for o in param.opts}


def test_the_edge_knows_its_options() -> None:
    """In compose, and in the chart; a planted one is seen."""
    _, stateful = manifests()
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    for words in (SERVICES["edge"]["command"], container["args"]):
        assert options(words)
        assert options(words) - of_edge() == set()
    assert options(["--planted=1"]) - of_edge() == {"--planted"}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["flower-superlink", "flower-supernode"])
def test_flower_knows_its_options(program: str) -> None:
    """In every service that runs it."""
    tool = Path(sys.executable).with_name(program)
    shown = subprocess.check_output([tool, "--help"], text=True)
    commands = [s["command"] for s in SERVICES.values() if s["command"][0] == program]
    assert commands
    for words in commands:
        assert [each for each in options(words) if each not in shown] == []


def test_the_services_need_only_what_there_is() -> None:
    """Services, volumes and configs that others name."""
    for service in SERVICES.values():
        assert set(service.get("depends_on", ())) <= SERVICES.keys()
        volumes = {volume.partition(":")[0] for volume in service.get("volumes", ())}
        assert volumes <= COMPOSE["volumes"].keys()
        names = {config["source"] for config in service.get("configs", ())}
        assert names <= COMPOSE["configs"].keys()
    assert (EXAMPLE.parents[1] / "pyproject.toml").exists()
    build = SERVICES["edge"]["build"]
    assert (EXAMPLE / build["context"] / build["dockerfile"]).is_file()


def test_the_chart_fits_together() -> None:
    """Its service finds its pods, mounts have volumes, and a drain has its time."""
    service, stateful = manifests()
    pod = stateful["spec"]["template"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert stateful["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    volumes = {v["name"] for v in pod["spec"]["volumes"]}
    volumes |= {c["metadata"]["name"] for c in stateful["spec"]["volumeClaimTemplates"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (drain,) = [w for w in container["args"] if w.startswith("--drain=")]
    assert float(drain.partition("=")[2]) < pod["spec"]["terminationGracePeriodSeconds"]
    assert (
        yaml.safe_load((HELM / "Chart.yaml").read_text("utf-8"))["apiVersion"] == "v2"
    )


def test_a_field_that_is_not_there_is_seen() -> None:
    with pytest.raises(KeyError):
        rendered("{{ .Values.planted }}", {"Values": {}})
