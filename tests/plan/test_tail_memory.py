"""What a session takes at an edge: by hand, and as a real edge service measures it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from flwr_smartsplit import Route, Task
from flwr_smartsplit.device.local_training import Conditions, train_locally
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.plan.tail_memory import TailBytes, tail_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain, state_of
from flwr_smartsplit.types import EdgeProfile, Status
from simulations.studies.scale.metered_edge import MeteredEdge
from tests.plan.profiles import chain_of
from tests.tasks import BATCH_SIZE, SHAPE, TASK, client_plan, examples

NEAR, FAR = "near", "far"
PLENTY = 2**40
HEADER_BYTES = 1024


def wide_mlp() -> nn.Sequential:
    """Build a model with parameters that are stepped inside backward."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(36, 90), nn.Tanh()),
        *(nn.Linear(90, 70), nn.Tanh(), nn.Linear(70, 3)),
    )


WIDE = replace(TASK, model_fn=wide_mlp, optimizer_fn=partial(torch.optim.Adam, lr=0.01))
TASKS = {
    "tiny": TASK,
    "wide, Adam": WIDE,
    "wide, clipped": replace(WIDE, max_gradient_norm=0.3),
}


def measured(task: Task, route: Route, folder: Path) -> list[TailBytes]:
    """Train one client for three steps; return what its sessions took."""
    state = state_of(task.model_fn())
    digest, chain = state_digest(state), build_chain(task)
    edges = {
        place: MeteredEdge(
            task,
            folder / place,
            profile=EdgeProfile(name=place, memory_bytes=PLENTY),
            connect=lambda place, address: edges[place].connect(address),
        )
        for place in route.edges()
    }
    for edge in edges.values():
        edge.connect(edge.name).send(wire.HoldState(digest, state))
    names = {place: place for place in edges}
    plan = client_plan(0, route, state, addresses=names)
    own = {
        name: state[name]
        for leg in route.device_legs(len(chain))
        for name in chain.state_names(leg.start, leg.stop)
    }
    inputs, targets = examples(0)[:BATCH_SIZE]
    conditions = Conditions(
        task=task, connect=lambda place, address: edges[place].connect(address)
    )
    batches = [(inputs.clone(), targets.clone()) for _ in range(3)]
    outcome = train_locally(plan, own, batches, conditions)
    assert outcome.report.status is Status.OK, outcome.report.message
    return [TailBytes(e.meter.peak_bytes, e.disk_bytes) for e in edges.values()]


def predicted(task: Task, route: Route, batch_size: int) -> list[TailBytes]:
    """Say what that should be."""
    chain = build_chain(task)
    profile = profile_of(task, batch_size=batch_size)
    legs = route.edge_legs(len(chain))
    return [tail_bytes(profile, leg.start, leg.stop) for leg in legs]


def assert_on_disk(found: Sequence[TailBytes], said: Sequence[TailBytes]) -> None:
    """Compare the tails with their files, which have a header."""
    for one, other in zip(found, said, strict=True):
        assert 0 <= one.disk_bytes - other.disk_bytes < HEADER_BYTES


@pytest.mark.every(3)
@pytest.mark.parametrize("name", TASKS)
def test_a_tail_takes_what_a_real_edge_measures(name: str, tmp_path: Path) -> None:
    """To the byte at every cut; a batch with one example more is another number."""
    task = TASKS[name]
    routes = [Route.split(cut, edge=NEAR) for cut in range(1, len(build_chain(task)))]
    found = [measured(task, r, tmp_path / str(r.cuts[0]))[0] for r in routes]
    said = [predicted(task, route, BATCH_SIZE)[0] for route in routes]
    assert [f.memory_bytes for f in found] == [s.memory_bytes for s in said]
    assert_on_disk(found, said)
    planted = predicted(task, routes[-1], BATCH_SIZE + 1)[0]
    assert found[-1].memory_bytes < planted.memory_bytes


@pytest.mark.parametrize("name", TASKS)
def test_units_between_two_cuts_never_take_more(name: str, tmp_path: Path) -> None:
    """Whether the route comes back to the device or goes on to another edge."""
    task = TASKS[name]
    for index, cuts in enumerate([(1, 3), (2, 4), (3, 4)]):
        for route in (
            Route.u_shape(*cuts, edge=NEAR),
            Route.hops(cuts, edges=(NEAR, FAR)),
        ):
            folder = tmp_path / f"{index} {route.returns}"
            found, said = (
                measured(task, route, folder),
                predicted(task, route, BATCH_SIZE),
            )
            assert_on_disk(found, said)
            bound, least = said[0].memory_bytes, found[0].memory_bytes
            assert least <= bound <= 2 * least, (route, least, bound)


def test_a_chain_of_numbers_by_hand() -> None:
    """Units of 8 bytes of parameters, and 32 of the step behind a cut."""
    profile = replace(chain_of([3, 5, 4]), targets_bytes=6)
    assert tail_bytes(profile, 1, 3) == (2 * 8 + 32 + 6, 2 * 8)
    assert tail_bytes(profile, 2, 3) == (8 + 32 + 6, 8)
    # Nothing that these numbers know of is made between two cuts but the boundary, 16.
    assert tail_bytes(profile, 1, 2) == (8 + 16, 8)
    # 2 * 100 of gradients wait, and are more than the step.
    units = tuple(replace(unit, gradient_bytes=100) for unit in profile.units)
    clipped = replace(profile, units=units, updates_last=True)
    assert tail_bytes(clipped, 1, 3) == (2 * 8 + 2 * 100, 2 * 8)
    # An opening has the state of 2 * 500 twice, and that is more than the step.
    units = tuple(replace(unit, parameter_bytes=500) for unit in profile.units)
    large = replace(profile, units=units)
    assert tail_bytes(large, 1, 3) == (2 * 500 + 2 * 500, 2 * 500)


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (2, 2), (1, 4)])
def test_units_that_no_cut_leaves_to_an_edge_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"chain of 3 units is cut at 1 to 2"):
        tail_bytes(chain_of([3, 5, 4]), start, stop)


def test_shapes_are_those_of_the_tasks() -> None:
    """Else the comparisons above would be of other batches."""
    assert examples(0)[:BATCH_SIZE][0].shape == (BATCH_SIZE, *SHAPE)
