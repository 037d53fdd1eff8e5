"""On a CUDA device: the same bits as a plain loop there, and memory as predicted.

``make test-gpu`` runs these. With deterministic algorithms everything is compared bit
for bit on one GPU; between a GPU and a CPU within the tolerance of ``CLOSE``.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch import Tensor, nn

from flwr_smartsplit import RayEdge, Route, Task, build_client_app
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import InvalidTask, MemoryCapExceeded
from flwr_smartsplit.flower.serde.records import from_array_record
from flwr_smartsplit.memory.cap import memory_cap
from flwr_smartsplit.memory.process import cuda_fence, cuda_growth
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.accelerator_memory import accelerator_overhead
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.train.rng import UnitStreams
from flwr_smartsplit.train.torch_device import as_device
from flwr_smartsplit.types import Status, StepReport
from tests.device.test_local_training import Client
from tests.edge.test_tensors import LAYOUTS, assert_same
from tests.flower.apps import initial_arrays, make_client, run, smart_split
from tests.on_device import (
    ROUTES,
    TASKS,
    one_client,
    peaks,
    plain_loop,
    strays,
    trained,
)
from tests.tasks import TASK, differences, initial_state, tiny_cnn

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
"""Between a GPU and a CPU, after six steps of the tiny task: sums in another order."""
MIB = 2**20


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let kernels give the same bits every time, in full precision."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # cuBLAS reads it with its first handle: make test-gpu sets it for the process.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def close(one: Any, other: Any) -> None:
    """Compare two states within the tolerance."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            torch.from_numpy(one[name]), torch.from_numpy(other[name]), **CLOSE
        )


# --- numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_all_routes_on_one_gpu_have_the_bits_of_whole_models_there(name: str) -> None:
    """With moved cuts, reruns and evaluation; and everything is on the GPU."""
    whole = trained(TASKS[name], device="cuda", is_split=False)
    with strays(CUDA) as found:
        made = trained(TASKS[name], device="cuda", edge_device="cuda")
    assert (found, made.kinds(), whole.kinds()) == ([], [], [])
    assert differences(made.state, whole.state) == []


@pytest.mark.parametrize("name", ["momentum", "clipped"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=str)
def test_a_client_on_a_gpu_has_the_bits_of_a_plain_loop(
    name: str, route: Route
) -> None:
    """Whose dropout draws from CUDA's generator, and whose optimizer is foreach."""
    made = one_client(TASKS[name], route, "cuda")
    assert made.kinds() == []
    assert differences(made.state, plain_loop(TASKS[name], 0, CUDA)) == []


@pytest.mark.parametrize(("client", "edge"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_cpu_and_a_gpu_share_a_model_within_the_tolerance(
    client: str, edge: str
) -> None:
    """Without dropout, whose numbers are each device's own; cuts move between them."""
    task = replace(TASKS["AdamW, scheduled"], model_fn=_without_dropout)
    with strays(CUDA) as found:
        made = trained(task, device=client, edge_device=edge)
    assert (found, made.kinds()) == ([], [])
    close(made.state, trained(task).state)


def _without_dropout() -> nn.Sequential:
    model = tiny_cnn()
    for module in model:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_a_stream_seeds_cudas_generator_and_restores_it() -> None:
    before = torch.cuda.get_rng_state(CUDA)
    drawn = []
    for _ in range(2):
        with UnitStreams(1, 2, "c", CUDA)(3, 4):
            drawn.append(torch.rand(5, device=CUDA).tolist())
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.cuda.get_rng_state(CUDA), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_wire_keeps_bits_and_layouts_from_and_to_a_gpu(layout: str) -> None:
    tensor = LAYOUTS[layout]
    there = WireTensor.pack(tensor).unpack(CUDA)
    assert there.device == CUDA
    assert (there.shape, there.stride()) == (tensor.shape, tensor.stride())
    assert_same(WireTensor.pack(there).unpack(), tensor)


# --- memory ---------------------------------------------------------------------------


def test_the_meter_counts_what_cudas_allocator_gives_out() -> None:
    """Elementwise operators need no workspace; blocks below 1 MiB are not larger."""
    torch.cuda.empty_cache()
    with cuda_growth(CUDA) as growth, memory_cap(None) as cap:
        kept = [torch.ones(n, device=CUDA) for n in (1, 127, 129, 1000, 100_000)]
        kept.append(kept[-1] * 2 + 1)
        del kept[0]
    assert cap.peak_bytes == growth.growth_bytes
    assert cap.live_bytes == sum(-(-t.nbytes // 512) * 512 for t in kept)


def test_the_cap_holds_on_a_gpu_to_the_block(tmp_path: Path) -> None:
    """It passes at the peak that was measured, and raises one byte below."""
    client = Client(tmp_path)

    def report(budget_bytes: int | None) -> StepReport:
        return client.train(
            Route.whole(), budget_bytes=budget_bytes, device=CUDA, cap_mode="strict"
        ).report

    peak = report(None).peak_bytes
    assert peak % 512 == 0
    assert report(peak).status is Status.OK
    assert report(peak - 1).status is Status.OUT_OF_MEMORY


def resnet_task() -> Task:
    """Make ResNet-18 at 64 px, with momentum and weight decay."""
    from torchvision.models import resnet18  # noqa: PLC0415

    return replace(
        TASK,
        model_fn=partial(resnet18, num_classes=10),
        optimizer_fn=partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-4),
        example_inputs=torch.zeros(1, 3, 64, 64),
        metrics_fn=None,
    )


def batches(task: Task, *, batch_size: int, count: int = 3) -> list[Any]:
    """Draw batches of a task."""
    shape = task.example_inputs.shape[1:]
    return [
        (torch.randn(batch_size, *shape), torch.randint(0, 3, (batch_size,)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("cut", [None, 3, 20])
def test_a_peak_predicted_on_the_cpu_holds_on_a_gpu(cut: int | None) -> None:
    """With the overhead that a client adds: what is planned is not exceeded."""
    torch.use_deterministic_algorithms(False)  # Pooling has no such backward.
    task, size = resnet_task(), 16
    chain = build_chain(task)
    route = Route.whole() if cut is None else Route.split(cut)
    profile = profile_chain(chain, batch_size=size, task=task)
    predicted = predicted_peak_bytes(profile, route)
    spare = accelerator_overhead(chain, batch_size=size, task=task)
    made = one_client(
        task,
        route,
        "cuda",
        budget_bytes=predicted + spare,
        cap_mode="strict",
        train_loader=batches(task, batch_size=size),
        num_examples=3 * size,
        batch_size=size,
    )
    assert made.kinds() == []
    ((_, peak),) = peaks(made)
    assert 0.5 * predicted < peak <= predicted + spare


def test_the_fence_of_a_gpu_refuses_and_is_lifted() -> None:
    torch.cuda.empty_cache()
    with pytest.raises(MemoryCapExceeded, match=r"client c0.*allocator refuses"):
        with cuda_fence(CUDA, 256 * MIB, client="client c0"):
            torch.empty(512 * MIB, dtype=torch.uint8, device=CUDA)
    torch.empty(512 * MIB, dtype=torch.uint8, device=CUDA)


def test_a_client_that_owns_its_process_measures_the_gpu() -> None:
    """The growth has workspaces, too: it is at least what the meter saw."""
    client = make_client(0, 2**30, device="cuda", owns_process=True, cap_mode="strict")
    plan = client.plan_for({"server-round": 1})
    outcome = client.train(replace(plan, budget_bytes=2**30), initial_state())
    assert outcome.report.status is Status.OK
    growth = outcome.report.resident_growth_bytes
    assert growth is not None
    assert growth >= outcome.report.peak_bytes - 64 * 2**10


# --- Ray and Flower -------------------------------------------------------------------


@pytest.fixture(scope="module")
def _ray_with_a_gpu() -> Iterator[None]:
    import ray  # noqa: PLC0415

    if ray.is_initialized():
        ray.shutdown()
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    ray.init(
        address="local",
        num_cpus=1,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("_ray_with_a_gpu")
def test_a_ray_edge_with_a_share_of_a_gpu_trains_there() -> None:
    """Clients on the CPU and the edge on the GPU, within the tolerance."""
    task = replace(TASK, model_fn=_without_dropout)
    edges = [RayEdge(device="cuda", num_gpus=0.5)]

    def app(index: int) -> ClientApp:
        return build_client_app(
            lambda context: make_client(index, task=task, edges=edges)
        )

    def trained_on(route: Route, edges: Any) -> Any:
        strategy = smart_split(edges, task=task, choose_route=lambda _: route)
        return run([app(index) for index in range(2)], strategy)

    made = trained_on(Route.split(4), edges)
    assert made.kinds() == []
    close(made.state, trained_on(Route.whole(), []).state)


def gpu_client(context: Context) -> Any:
    """Make a client that takes no CPU: without a share it is refused."""
    return make_client(int(context.node_config["partition-id"]), device="cuda")


@pytest.mark.ray
def test_flowers_shares_of_a_gpu_reach_the_clients() -> None:
    """With ``client-resources-num-gpus`` they train there."""
    import ray  # noqa: PLC0415

    if ray.is_initialized():
        ray.shutdown()
    results: list[Any] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        strategy = smart_split((), fraction_train=1.0)
        results.append(
            strategy.start(grid, initial_arrays(), num_rounds=1, timeout=300)
        )

    run_simulation(
        server_app=app,
        client_app=build_client_app(gpu_client),
        num_supernodes=2,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.5},
            "init_args": {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False},
        },
    )
    ray.shutdown()
    changed = differences(from_array_record(results[0].arrays), initial_state())
    assert len(changed) == len(initial_state())


def test_auto_and_indices_name_gpus() -> None:
    assert as_device("auto") == as_device("cuda") == CUDA
    with pytest.raises(InvalidTask, match="such devices"):
        as_device(f"cuda:{torch.cuda.device_count()}")


def test_class_weights_follow_the_client_to_the_gpu() -> None:
    """They are a tensor of the CPU in the task."""
    from flwr_smartsplit.train.segment_runner import SegmentRunner  # noqa: PLC0415

    task = replace(TASK, loss_fn=nn.CrossEntropyLoss(weight=torch.ones(3)))
    runner = SegmentRunner(tiny_cnn(), task, device=CUDA)
    outputs: Tensor = torch.zeros(2, 3, device=CUDA)
    values = runner.assess(outputs, torch.zeros(2, dtype=torch.int64, device=CUDA))
    assert values["loss"] == pytest.approx(1.0986, abs=1e-4)
