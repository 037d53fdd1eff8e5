"""Run by ``tests/test_second_device.py`` in a process that has a second device."""

from typing import Any

import pytest
import torch
from torch import nn

from flwr_smartsplit import Route, Serving
from flwr_smartsplit.device import route_runner
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.tensors import WireTensor
from flwr_smartsplit.errors import InvalidTask, SmartSplitError
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.train.rng import UnitStreams, derived_seed
from flwr_smartsplit.train.segment_runner import SegmentRunner
from flwr_smartsplit.train.torch_device import as_device
from tests import second_device
from tests.edge.test_tensors import LAYOUTS, assert_same
from tests.on_device import (
    ROUTES,
    TASKS,
    one_client,
    peaks,
    plain_loop,
    strays,
    trained,
)
from tests.serve import whole as stock
from tests.tasks import BATCH_SIZE, TASK, differences


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> torch.device:
    return second_device.start(tmp_path_factory.mktemp("second-device"))


@pytest.mark.parametrize("name", TASKS)
def test_everything_is_on_the_device_and_the_numbers_are_those_of_the_cpu(
    name: str, device: torch.device
) -> None:
    """Clients and edges; moved cuts, reruns, evaluation, and each metered peak."""
    truth = trained(TASKS[name])
    with strays(device) as found:
        made = trained(TASKS[name], device="second", edge_device="second")
    assert made.kinds() == truth.kinds() == []
    assert found == []
    assert differences(made.state, truth.state) == []
    # Its kernels keep other temporaries than the CPU's: fewer, as plans need it.
    pairs = list(zip(peaks(made), peaks(truth), strict=True))
    assert [here[0] for here, _ in pairs] == [there[0] for _, there in pairs]
    assert all(0.5 * there[1] < here[1] <= there[1] for here, there in pairs)
    loss = [m["loss"] for m in truth.result.evaluate_metrics_clientapp.values()]
    assert loss == [m["loss"] for m in made.result.evaluate_metrics_clientapp.values()]


@pytest.mark.parametrize("name", ["momentum", "clipped"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=str)
def test_a_client_on_the_device_has_the_bits_of_a_plain_loop(
    name: str, route: Route, device: torch.device
) -> None:
    made = one_client(TASKS[name], route, "second")
    assert made.kinds() == []
    assert differences(made.state, plain_loop(TASKS[name], 0, device)) == []


@pytest.mark.parametrize(
    ("client", "edge"), [("cpu", "second"), ("second", "cpu"), ("auto", "second")]
)
def test_devices_may_differ_from_place_to_place(
    client: str, edge: str, device: torch.device
) -> None:
    """Also while units move between them, with their optimizer state."""
    task = TASKS["AdamW, scheduled"]
    with strays(device) as found:
        made = trained(task, device=client, edge_device=edge)
    assert (found, made.kinds()) == ([], [])
    assert differences(made.state, trained(task).state) == []


def test_a_batch_left_on_the_cpu_is_an_error(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error that shows that the device refuses to mix."""
    monkeypatch.setattr(route_runner, "placed", lambda batch, device: batch)
    with pytest.raises(SmartSplitError, match="nobody's training was merged"):
        trained(TASK, device=device, edge_device="second")


def test_a_parameter_left_on_the_cpu_is_a_stray(device: torch.device) -> None:
    """The planted error of ``strays``: it sees what does not compute there."""
    with strays(device) as found:
        runner = SegmentRunner(nn.Linear(2, 1), TASK, device=device)
        runner.segment.bias = nn.Parameter(torch.zeros(1))
        runner.update()
    assert found == ["bias on cpu"]


def test_a_stream_seeds_the_devices_generator_and_restores_it(
    device: torch.device,
) -> None:
    generator = second_device.GENERATOR.manual_seed(3)
    before = generator.get_state()
    with UnitStreams(1, 2, "c", device)(4, 5):
        seeds = generator.initial_seed(), torch.default_generator.initial_seed()
    assert seeds == (derived_seed(1, 2, "c", 4, 5),) * 2
    assert torch.equal(generator.get_state(), before)


def test_a_loader_that_draws_on_the_device_has_a_stream_of_its_own(
    device: torch.device,
) -> None:
    class Drawing:
        def __iter__(self) -> Any:
            for _ in range(3):
                yield torch.rand(2, generator=second_device.GENERATOR)

    def drawn() -> list[list[float]]:
        found = []
        for batch in UnitStreams(1, 2, "c", device).batches(Drawing(), 0):
            torch.rand(5, generator=second_device.GENERATOR)  # Others draw, too.
            found.append(batch.tolist())
        return found

    assert drawn() == drawn()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_wire_keeps_layouts_from_and_to_a_device(
    layout: str, device: torch.device
) -> None:
    tensor = LAYOUTS[layout]
    there = WireTensor.pack(tensor).unpack(device)
    assert there.device == device
    assert (there.shape, there.stride()) == (tensor.shape, tensor.stride())
    assert_same(WireTensor.pack(there).unpack(), tensor)


def test_a_meter_counts_one_device(device: torch.device) -> None:
    with MemoryMeter(device=device) as meter:
        kept = torch.ones(100, device=device), torch.ones(1000)
    assert meter.peak_bytes == kept[0].nbytes == 400
    with MemoryMeter(device=torch.device("cpu")) as meter:
        more = torch.ones(100, device=device), torch.ones(1000)
    assert meter.peak_bytes == more[1].nbytes


def test_a_device_that_is_not_there_is_refused(device: torch.device) -> None:
    with pytest.raises(InvalidTask, match="this process sees 1 such devices"):
        as_device(f"{device.type}:1")
    assert as_device(device.type) == device


@pytest.mark.parametrize("route", ROUTES.values(), ids=str)
def test_a_predictor_has_its_units_and_outputs_on_the_device(
    route: Route, device: torch.device
) -> None:
    """So have the copies at edges; the values are those of the CPU."""
    names = dict.fromkeys(route.edges())
    edges = [LocalEdge(name=name, device="second") for name in names]
    with Serving(TASK, stock.STATE, edges) as serving, strays(device) as found:
        offer = serving.offer(route, batch_size=BATCH_SIZE)
        with stock.predictor(offer, *edges, device="second") as mine:
            outputs = mine.predict(stock.batch()).outputs
    assert found == []
    assert outputs.device.type == device.type
    assert torch.equal(outputs.cpu(), stock.whole(stock.batch()))
