"""What is installed: one version, extras that hold what they promise, and a wheel.

The wheel runs an example in an environment that has no checkout.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import flwr_smartsplit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
# The module that needs an extra, and what it loads of it.
PROMISED = {
    "edge": ("flwr_smartsplit.edge.hosts.grpc_server", "grpc"),
    "plot": ("flwr_smartsplit.cli.profile_plot", "matplotlib"),
    "tensorboard": ("flwr_smartsplit.flower.journal.row_callbacks", "tensorboard"),
    "wandb": ("flwr_smartsplit.flower.journal.row_callbacks", "wandb"),
    "huggingface": ("flwr_smartsplit.split.huggingface", "transformers"),
    "peft": ("flwr_smartsplit.split.huggingface", "peft"),
}
FOR_THE_CHECKOUT = {"simulations", "docs", "dev"}  # What they are for is in no wheel.
DRIVER = '''
"""Run the quickstart for two rounds, as ``flwr run`` would."""
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from quickstart import client_app, server_app

app = ServerApp()


@app.main()
def main(grid, context):
    context.run_config = {"num-server-rounds": 2, "journal": "run.jsonl"}
    server_app.main(grid, context)


if __name__ == "__main__":
    run_simulation(app, client_app.app, num_supernodes=4)
'''


def test_the_version_is_that_of_the_metadata() -> None:
    assert flwr_smartsplit.__version__ == PROJECT["version"]
    with pytest.raises(AttributeError, match="__author__"):
        _ = flwr_smartsplit.__author__


def test_every_extra_is_known() -> None:
    """A new one is added here, with what it is for."""
    assert EXTRAS.keys() == PROMISED.keys() | FOR_THE_CHECKOUT


@pytest.mark.parametrize("extra", PROMISED)
def test_an_extra_is_named_in_the_pages_and_brings_what_its_module_loads(
    extra: str,
) -> None:
    module, library = PROMISED[extra]
    assert [page for page in PAGES if f"flwr-smartsplit[{extra}]" in page.read_text()]
    assert [line for line in EXTRAS[extra] if line.startswith(library)]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed here")
    import_module(library)
    import_module(module)


# --- the wheel ------------------------------------------------------------------------


def run(folder: Path, *words: str | Path, **environment: str) -> str:
    """Run a command that knows nothing of the checkout; return what it prints."""
    plain = {
        k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "RAY_TMPDIR"}
    }
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=plain | environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("fresh")
    python = folder / "env" / "bin" / "python"
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(ROOT, sys.executable, *pip, "wheel", "--no-deps", "-w", folder, ".")
    (wheel,) = folder.glob("*.whl")
    run(folder, sys.executable, "-m", "venv", folder / "env")
    run(folder, python, *pip, "install", "--no-deps", wheel)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A path in a .pth file is added as it is: the checkout's own .pth is not read.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(fresh: Path) -> None:
    """Types and licence, too; the tests of the checkout are not seen."""
    code = (
        "import flwr_smartsplit, importlib.util as u, json, pathlib; "
        "own = pathlib.Path(flwr_smartsplit.__file__); "
        "print(json.dumps([str(own), flwr_smartsplit.__version__, "
        "(own.parent / 'py.typed').exists(), "
        "[n for n in ('tests', 'simulations') if u.find_spec(n)]]))"
    )
    python = fresh / "env" / "bin" / "python"
    path, version, is_typed, others = json.loads(run(fresh, python, "-c", code))
    assert Path(path).is_relative_to(fresh)
    assert (version, is_typed, others) == (PROJECT["version"], True, [])
    assert list((fresh / "env").rglob("flwr_smartsplit-*.dist-info/licenses/LICENSE"))
    smartsplit = fresh / "env" / "bin" / "smartsplit"
    assert "profile" in run(fresh, smartsplit, "--help")


@pytest.mark.slow
@pytest.mark.ray
def test_an_installed_wheel_runs_an_example(fresh: Path) -> None:
    """The quickstart, with its Ray edge, on all routes that its page shows."""
    shutil.copytree(
        ROOT / "examples" / "quickstart" / "quickstart", fresh / "quickstart"
    )
    (fresh / "driver.py").write_text(DRIVER)
    facts: Mapping[str, str] = {"PYTHONPATH": str(fresh), "OMP_NUM_THREADS": "1"}
    run(fresh, fresh / "env" / "bin" / "python", "driver.py", **facts)
    rows = [json.loads(line) for line in (fresh / "run.jsonl").read_text().splitlines()]
    routes = {str(row["route"]) for row in rows if row.get("route")}
    assert {"whole", "device[:3] > edge[3:]"} <= routes
