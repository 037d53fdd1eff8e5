"""The examples do what their pages say, under ``flwr run``, and the pages say it right.

One local SuperLink serves the whole module, as it would serve a user.
"""

import ast
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.flwr_cli import Flower, flower
from tests.test_example_routes import ROUTES, routes_by_round

__all__ = ["flower"]

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGES = sorted(EXAMPLES.rglob("README.md"))
BEFORE_AND_AFTER = EXAMPLES / "existing_fedavg_app"
PAGES_WITH_THE_DIFF = (
    BEFORE_AND_AFTER / "README.md",
    ROOT / "docs" / "howto" / "existing-app.md",
)

# What the last round's accuracy is above, and by how much it is above the first's.
LEARNED = {"lora_language_model": 0.2}
MORE = {"lora_language_model": 0.0}

STOCK_AND_OURS = {
    "existing_fedavg_app/before": set(),
    "existing_fedavg_app/after": {"whole", "device[:7] > edge[7:]"},
}


# --- the pages ------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    """Find the blocks of a page that are in one language."""
    fenced = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return fenced.findall(page.read_text("utf-8"))


def commands(page: Path) -> Iterator[tuple[Path, list[str]]]:
    """List the commands of a page, with the folder that each is given in."""
    folder = ROOT
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "cd":
            folder = ROOT / words[1]
        yield folder, words


def names(source: Path) -> set[str]:
    """List what a module defines."""
    defined = set()
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.Assign):
            defined |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        defined.add(getattr(node, "name", ""))
    return defined


def missing(  # noqa: PLR0911 - a list of cases
    folder: Path, words: list[str]
) -> list[str]:
    """List what a command names and is not there: folders, modules and their names."""
    match words:
        case ["cd", path]:
            return [] if (ROOT / path).is_dir() else [path]
        case ["flwr", "run", path, *_]:
            project = folder / path / "pyproject.toml"
            if not project.is_file():
                return [path]
            app = tomllib.loads(project.read_text("utf-8"))["tool"]["flwr"]["app"]
            specs = app["components"].values()
            return [spec for spec in specs if is_missing(folder / path, spec)]
        case ["python", path]:
            return [] if (folder / path).is_file() else [path]
        case ["smartsplit", _, spec, *_]:
            return [spec] if is_missing(folder, spec) else []
        case ["diff", _, *paths]:
            folders = paths[: paths.index("|")] if "|" in paths else paths
            return [path for path in folders if not (folder / path).is_dir()]
    return []


def is_missing(folder: Path, spec: str) -> bool:
    """Say whether there is no ``package.module:name`` below a folder."""
    module, _, name = spec.partition(":")
    source = folder.joinpath(*module.split(".")).with_suffix(".py")
    return not source.is_file() or name not in names(source)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_the_commands_of_a_page_name_is_there(page):
    found = list(commands(page))
    assert any(words[:2] == ["flwr", "run"] for _, words in found)
    assert [name for folder, words in found for name in missing(folder, words)] == []


def test_every_example_has_its_page_and_is_in_the_list():
    apps = [path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("pyproject.toml")]
    examples = sorted({app.parts[0] for app in apps})
    index = EXAMPLES / "README.md"
    assert PAGES == sorted(
        [index, *(EXAMPLES / name / index.name for name in examples)]
    )
    listed = re.findall(r"^\| \[`(\w+)`\]", index.read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == examples


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("cd examples/nowhere", "examples/nowhere"),
        ("flwr run nowhere --stream", "nowhere"),
        ("python nowhere.py", "nowhere.py"),
        ("flwr run planted", "app.server_app:app"),
        ("smartsplit check quickstart.task:nothing --cuts all", "quickstart.task:noth"),
        ("diff -ru quickstart nowhere | wc -l", "nowhere"),
    ],
)
def test_a_name_that_is_not_there_is_seen(tmp_path, command, name):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "task.py").write_text("def something(): ...")
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "app.server_app:app"'
    )
    (found,) = missing(tmp_path, shlex.split(command))
    assert found.startswith(name)


# --- before and after -----------------------------------------------------------------


def true_diff() -> str:
    """Compare the two apps as their page says, without the times of the files."""
    command = "diff -ru -x __pycache__ before after"
    environment = {**os.environ, "LC_ALL": "C"}
    run = subprocess.run(
        command.split(),
        cwd=BEFORE_AND_AFTER,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    text = run.stdout.replace("diff -ru -x __pycache__ ", "diff -ru ")
    return re.sub(r"^(---|\+\+\+) (\S+)\t.*$", r"\1 \2", text, flags=re.MULTILINE)


def parts(diff: str) -> set[str]:
    """Divide a diff by files, each without the line that names the command."""
    found = re.split(r"^diff .*\n", diff, flags=re.MULTILINE)
    return {part for part in found if part}


def test_the_page_shows_the_whole_diff_and_its_size():
    page = PAGES_WITH_THE_DIFF[0]
    (shown,) = blocks(page, "diff")
    assert shown == true_diff(), "put what `diff -ru before after` says into the page"
    changed = re.findall(r"^([-+])(?:$|[^-+])", true_diff(), re.MULTILINE)
    size = f"{len(changed)}, of which {changed.count('+')} are new and "
    assert f"{size}{changed.count('-')} are gone" in page.read_text("utf-8")


def test_the_how_to_shows_parts_of_the_true_diff():
    shown = [
        part
        for block in blocks(PAGES_WITH_THE_DIFF[1], "diff")
        for part in parts(block)
    ]
    assert len(shown) == 3  # task.py, client_app.py and server_app.py
    assert set(shown) <= parts(true_diff())


# --- under flwr run -------------------------------------------------------------------


def run(flower: Flower, app: str) -> str:
    """Run an app as its page says; return its log if it finished well."""
    folder, words = flwr_run(app)
    if app in ROUTES:
        words += ["--run-config", f"journal='{journal(flower, app)}'"]
    return flower.run(words, folder)


def journal(flower: Flower, app: str) -> Path:
    """Say where an app is told to write its journal."""
    return flower.home / f"{app}.jsonl"


def flwr_run(app: str) -> tuple[Path, list[str]]:
    """Find the one command of an example's page that runs an app."""
    example, _, path = app.partition("/")
    (found,) = [
        (folder, words[1:])
        for folder, words in commands(EXAMPLES / example / "README.md")
        if words[:3] == ["flwr", "run", path or "."]
    ]
    return found


@pytest.fixture(scope="module")
def logs(
    flower: Flower, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[str]]]:
    """Run every app that a selected test asks for, two at a time."""
    items = [item for item in request.session.items if item.path == request.path]
    calls = [getattr(item, "callspec", None) for item in items]
    apps = [call.params["app"] for call in calls if call and "app" in call.params]
    # Any command starts the SuperLink; Flower gives it 15 seconds, busy or not.
    # Journals without a name are written where it was started.
    flower.flwr("list", cwd=flower.home, attempts=3)
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {app: pool.submit(run, flower, app) for app in apps}
        pool.shutdown(cancel_futures=True)


def promised(page: Path) -> list[str]:
    """List the routes and costs that a page says will be in the log."""
    return re.findall(
        r"^(\t> Route .* clients|.* bytes)$", "".join(blocks(page, "")), re.MULTILINE
    )


def accuracies(log: str) -> list[float]:
    """Read what was measured from the log, in the order of the rounds."""
    found = re.findall(
        r"(?:Record|results|metrics\)|progress).*'accuracy': ([\d.]+)", log
    )
    return [float(number) for number in found]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("app", ROUTES)
def test_an_example_gives_the_routes_that_it_promises_and_learns(app, flower, logs):
    log = logs[app].result()
    assert all(line in log for line in promised(EXAMPLES / app / "README.md"))

    rounds = routes_by_round(journal(flower, app))
    assert len(rounds) >= 3
    assert rounds == [ROUTES[app]] * len(rounds)
    first, *_, last = accuracies(log)
    assert last > max(LEARNED.get(app, 0.8), first + MORE.get(app, 0.1))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("app", STOCK_AND_OURS)
def test_the_stock_app_learns_before_and_after(app, logs):
    log = logs[app].result()
    routes = re.findall(r"> Route (.*): 1 clients", log)
    assert set(routes) == STOCK_AND_OURS[app]
    first, *_, last = accuracies(log)
    assert last > max(0.6, first + 0.3)
