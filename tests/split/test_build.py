"""Building: no parameter in memory but those of one's own part, and those exactly."""

import pickle
import sys
import threading
import types
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.memory.meter import MemoryMeter
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.split.segment import Unit
from flwr_smartsplit.split.template import parameters_on_meta
from tests.models import channels_last_cnn, resnet18, small_cnn, task_of
from tests.oracle import compare


def as_tensors(state: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Read a state so that it can be compared."""
    return {name: torch.from_numpy(array) for name, array in state.items()}


# --- parameters on meta ---------------------------------------------------------------


def test_parameters_have_no_memory_and_buffers_do():
    """Only buffers are still alive after building; each parameter came and went."""
    with MemoryMeter() as meter, parameters_on_meta():
        model = resnet18()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert meter.live_bytes == sum(buffer.nbytes for buffer in model.buffers())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert meter.peak_bytes <= meter.live_bytes + largest


def test_parameters_keep_shape_type_strides_and_role():
    """A parameter on meta tells all that a chain has to know."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2).half())
        model[0].requires_grad_(False)
        return model.to(memory_format=torch.channels_last)

    with parameters_on_meta():
        hollow = build()
    for name, parameter in build().named_parameters():
        twin = hollow.get_parameter(name)
        assert twin.is_meta
        for kind in ("shape", "dtype", "requires_grad"):
            assert getattr(twin, kind) == getattr(parameter, kind)
        assert twin.stride() == parameter.stride()


class Tied(nn.Module):
    """One parameter under two names, given to both from outside."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(4, 4))
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.first.weight = weight
        self.last.weight = weight
        self.last.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def test_tied_parameters_stay_tied():
    """One parameter under two names is one parameter on meta, and at every place."""
    with parameters_on_meta():
        model = Tied()
    assert model.last.weight is model.first.weight
    assert model.last.bias is model.first.bias
    task = task_of(Tied, shape=(4,))
    segment = materialise(build_chain(task), 0, 1, state_of(Tied()))
    assert segment.get_parameter("last.weight") is segment.get_parameter("first.weight")
    assert len(list(segment.parameters())) == 2


def test_building_is_normal_again_afterwards_also_after_an_error():
    """Whatever happens inside, parameters are real again outside."""
    register = nn.Module.register_parameter
    with parameters_on_meta(), parameters_on_meta():
        assert nn.Linear(2, 2).weight.is_meta
    assert nn.Module.register_parameter is register
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        _ = 1 / 0
    assert nn.Module.register_parameter is register
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_threads_build_as_ever():
    """A thread that builds a model meanwhile gets real parameters."""
    built: list[nn.Module] = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert not built[0].weight.is_meta


# --- one chain per recipe -------------------------------------------------------------


def test_copies_of_one_recipe_share_a_chain():
    """What Flower and Ray unpickle for every message is not traced again."""
    task = task_of(small_cnn)
    assert build_chain(pickle.loads(pickle.dumps(task))) is build_chain(task)
    assert build_chain(task_of(small_cnn)) is build_chain(task)


def test_other_inputs_or_arguments_make_another_chain():
    """The recipe is the function, its arguments, and how the inputs look."""
    tasks = [
        task_of(partial(nn.Linear, *sizes), shape=shape)
        for sizes, shape in [((4, 2), (4,)), ((4, 3), (4,)), ((4, 2), (5, 4))]
    ]
    turned = replace(tasks[2], example_inputs=torch.zeros(1, 4, 5).transpose(1, 2))
    assert turned.example_inputs.shape == tasks[2].example_inputs.shape
    assert len({id(build_chain(task)) for task in (*tasks, turned)}) == 4


def test_functions_that_cannot_be_imported_have_chains_too():
    """A lambda is built per task, and two of them are never confused."""
    two, three = (task_of(lambda n=n: nn.Linear(4, n), shape=(4,)) for n in (2, 3))
    sizes = [build_chain(task).model.out_features for task in (two, three, two)]
    assert sizes == [2, 3, 2]
    assert build_chain(two) is build_chain(two)


def test_a_function_that_was_defined_again_is_another_recipe(monkeypatch):
    """In a notebook, a model may be defined anew under its old name."""
    notebook = types.ModuleType("notebook_of_a_test")
    monkeypatch.setitem(sys.modules, notebook.__name__, notebook)
    sizes = []
    for size in (2, 3):
        source = f"from torch import nn\ndef build(): return nn.Linear(4, {size})"
        exec(source, vars(notebook))
        task = task_of(notebook.build, shape=(4,))
        sizes.append(build_chain(task).model.out_features)
    assert sizes == [2, 3]


# --- materialise ----------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 13))
def test_each_part_gets_its_values_and_nothing_else(cut):
    """Both sides hold the state's values, and together take the model's bytes."""
    chain, state = build_chain(task_of(small_cnn)), state_of(small_cnn())
    everything: dict[str, Tensor] = {}
    for start, stop in ((0, cut), (cut, len(chain))):
        with MemoryMeter() as meter:
            segment = materialise(chain, start, stop, state)
            meter.track(segment)
        own = sum(t.nbytes for t in (*segment.parameters(), *segment.buffers()))
        assert meter.live_bytes == meter.peak_bytes == own
        everything |= segment.state_dict()
    assert compare(as_tensors(state), everything) == []


def test_values_of_other_units_are_left_alone():
    """A state of the whole model will do, and so will the part that is needed."""
    chain, state = build_chain(task_of(small_cnn)), state_of(small_cnn())
    names = chain.state_names(2, 5)
    part = {name: state[name] for name in names}
    from_all, from_part = (materialise(chain, 2, 5, s) for s in (state, part))
    assert set(from_all.state_dict()) == set(names)
    assert compare(from_all.state_dict(), from_part.state_dict()) == []


def test_a_segment_is_its_own():
    """Training one does not reach the state, the chain, or another segment."""
    chain, state = build_chain(task_of(small_cnn)), state_of(small_cnn())
    before = {name: array.copy() for name, array in state.items()}
    first, second = (materialise(chain, 0, 13, state) for _ in range(2))
    with torch.no_grad():
        for tensor in (*first.parameters(), *first.buffers()):
            tensor.fill_(7)
    assert compare(as_tensors(before), as_tensors(state)) == []
    assert compare(as_tensors(before), second.state_dict()) == []
    assert all(parameter.is_meta for parameter in chain.model.parameters())


def test_tensors_lie_in_memory_as_the_model_lays_them():
    """Contiguous arrays are given the model's own strides, so kernels are the same."""
    model = channels_last_cnn()
    segment = materialise(
        build_chain(task_of(channels_last_cnn)), 0, 13, state_of(model)
    )
    assert not model.conv1.weight.is_contiguous()
    for name, value in model.state_dict().items():
        assert segment.state_dict()[name].stride() == value.stride()
    assert compare(model.state_dict(), segment.state_dict()) == []


class Counters(nn.Module):
    """Integer, boolean and unsaved buffers, an empty one, and a half-precision one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("small", torch.zeros(2, dtype=torch.uint8))
        self.register_buffer("low", torch.zeros(2, dtype=torch.float16))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("unsaved", torch.full((3,), 5.0), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.unsaved + self.count + self.seen + self.small.sum()
        return x + self.low.sum() + self.empty.sum()


def test_buffers_of_any_type_are_filled_and_unsaved_ones_kept():
    """Counters stay integers; what the state does not hold comes from the model."""
    model = Counters()
    model.count += 3
    model.seen[1] = True
    model.small += 200
    model.low += 0.5
    chain = build_chain(task_of(Counters, shape=(3,)))
    segment = materialise(chain, 0, len(chain), state_of(model))
    assert compare(model.state_dict(), segment.state_dict()) == []
    assert torch.equal(segment.unsaved, torch.full((3,), 5.0))
    assert torch.equal(segment.eval()(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_every_wrong_name_is_in_the_error():
    """Missing and misshapen values are all named at once, with both shapes."""
    chain, state = build_chain(task_of(small_cnn)), state_of(small_cnn())
    del state["conv1.weight"]
    state["norm1.bias"] = state["norm1.bias"][:3]
    state["norm1.num_batches_tracked"] = np.zeros(1, np.int64)
    state["classify.bias"] = np.zeros(3, np.float32)  # Not of this part.
    with pytest.raises(InvalidTask) as info:
        materialise(chain, 0, 2, state)
    message = str(info.value)
    assert "units [0, 2)" in message
    assert "conv1.weight: missing instead of (8, 3, 3, 3)" in message
    assert "norm1.bias: (3,) instead of (8,)" in message
    assert "norm1.num_batches_tracked: (1,) instead of ()" in message
    assert "classify" not in message


def test_the_state_of_a_module_is_a_contiguous_copy():
    """Arrays have the values in row-major order and nobody else's memory."""
    model = channels_last_cnn()
    state = state_of(model)
    before = {name: array.copy() for name, array in state.items()}
    assert all(array.flags.c_contiguous for array in state.values())
    assert compare(model.state_dict(), as_tensors(state)) == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert compare(as_tensors(before), as_tensors(state)) == []


class Counted:
    """A unit's method, of an object that changes."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, root: nn.Module, x: Tensor) -> Tensor:
        """Count, and run."""
        self.calls.append(1)
        return root.get_submodule("0")(x)


def counted_units(model: nn.Module) -> list[Unit]:
    """List two units, of which one counts."""
    last = Unit("last", lambda root, x: root.get_submodule("1")(x), ("1",))
    return [Unit("first", Counted().__call__, ("0",)), last]


def test_each_part_has_its_own_of_what_a_unit_changes():
    """What never changes is shared: functions, and tuples of numbers."""
    task = task_of(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), shape=(4,))
    chain = build_chain(replace(task, units_fn=counted_units))
    state = state_of(chain.model.to_empty(device="cpu"))
    one, other = (materialise(chain, 0, 2, state) for _ in "ab")
    one(torch.zeros(1, 4))
    calls = [
        len(part._Segment__units[0].forward.__self__.calls) for part in (one, other)
    ]
    assert calls[0] == calls[1] + 1
    plain = build_chain(task)
    one, other = (materialise(plain, 0, 2, state) for _ in "ab")
    assert one._Segment__units is other._Segment__units
