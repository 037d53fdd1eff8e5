"""What holds for every test: one thread, one seed, a Ray of its own, nothing left.

The environment is set at import, before any test module can import flwr or ray, which
read it once.
"""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadFileScheduling

# Ray puts Unix sockets about 65 characters below this folder, and a socket's path may
# have 103 to 107: the default folder of some systems is already too long.
_SHORT = Path("/tmp")
_LONG_FILES = ("test_device_process.py", "test_random_modules.py", "test_zoo.py")
_SHARE_RAY = (
    "test_equivalence.py",
    "test_example_routes.py",
    "test_hosts.py",
    "test_ray.py",
    "test_transports.py",
)
_EXAMPLES = Path(__file__).parents[1] / "examples"
_PRIVATE = tempfile.mkdtemp(prefix="fs-", dir=_SHORT if _SHORT.is_dir() else None)
atexit.register(shutil.rmtree, _PRIVATE, ignore_errors=True)

os.environ.update(
    # Else what one test has freed is kept, and another's fence does not see it.
    GLIBC_TUNABLES="",
    RAY_ADDRESS="local",  # without it, ray.init() joins any cluster on this machine
    RAY_TMPDIR=_PRIVATE,
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # not last in line, behind the tests that run beside it
    FLWR_HOME=_PRIVATE,
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    SMARTSPLIT_VERIFY="off",  # Tests of the guard say so themselves.
    SMARTSPLIT_CACHE=f"{_PRIVATE}/cache",
)

# One thread and two sum in a different order: gradients then differ in their last bits.
torch.set_num_threads(1)

# Found examples are the same everywhere, and a slow machine is not a failure.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


@pytest.hookimpl(tryfirst=True)  # The marks must be there when -m chooses by them.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what is slow, and begin with the files that take long.

    Else one worker would end with them alone.
    """
    _mark_repeats_as_slow(items)
    long = {item.path for item in items if item.get_closest_marker("ray")}
    long |= {item.path for item in items if item.path.name in _LONG_FILES}
    items.sort(key=lambda item: item.path not in long)


def _mark_repeats_as_slow(items: list[pytest.Item]) -> None:
    """Leave every ``n``-th case of a test marked ``every(n)`` for every day."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("every")
        if marker is not None and item.get_closest_marker("slow") is None:
            test = item.nodeid.partition("[")[0]
            if seen[test] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


class _Scheduling(LoadFileScheduling):
    """Give each worker whole files, and those that share a Ray to one worker."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "ray" if file.endswith(_SHARE_RAY) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduling | None:
    """Take ours in place of ``--dist loadfile``."""
    return _Scheduling(config, log) if config.option.dist == "loadfile" else None


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the Ray that files share after the last of them: others start their own."""
    is_last = nextitem is None or nextitem.path.name not in _SHARE_RAY
    if item.path.name in _SHARE_RAY and is_last and "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run in an empty folder: a strategy that is told nothing writes its journal."""
    with contextlib.chdir(tmp_path_factory.mktemp("working")):
        yield


@pytest.fixture(autouse=True)
def _same_chance_for_every_test() -> None:
    """Let no test depend on what the tests before it drew from torch's generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def whole() -> dict[str, Any]:
    """Train every client alone and unsplit: the truth about each of them."""
    from flwr_smartsplit import Route  # noqa: PLC0415
    from tests.server.one_round import NUM_CLIENTS, train  # noqa: PLC0415
    from tests.tasks import initial_state  # noqa: PLC0415

    routes = [Route.whole()] * NUM_CLIENTS
    return {reply.client_key: reply for reply in train(routes, initial_state())}


@pytest.fixture(scope="module")
def ray_cluster() -> None:
    """Start Ray, unless a file before did: it takes seconds."""
    import ray  # noqa: PLC0415

    paths = os.pathsep.join([*sys.path, *map(str, _EXAMPLES.iterdir())])
    for left in reversed(range(3)):
        if ray.is_initialized():
            return
        try:
            ray.init(
                address="local",
                num_cpus=1,
                include_dashboard=False,
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
            )
        except Exception as error:  # Ray's own kind: it waits 30 s, and no longer.
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise
