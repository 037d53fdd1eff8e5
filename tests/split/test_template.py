"""Models as people build them: built right in parts, or refused with the reason."""

import copy
import logging
import random
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.hooks import RemovableHandle

from flwr_smartsplit import Route
from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split import template
from flwr_smartsplit.split.build import build_chain, materialise, state_of
from flwr_smartsplit.verify.equivalence import RouteChecker, example_batches
from tests.models import task_of
from tests.oracle import compare

WIDTH = 16


class Net(nn.Module):
    """Three layers, and something of one's own: ``extra`` makes it, ``mid`` uses it."""

    def __init__(self, extra: Any, mid: Any, *, seeded: bool = False) -> None:
        if seeded:
            torch.manual_seed(5)
        super().__init__()
        self.a, self.b = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c = nn.Linear(WIDTH, 10)
        extra(self)
        self.mid = mid

    def weights(self) -> Tensor:
        """Show what a list holds."""
        return self.hidden[0].weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Run them."""
        x = torch.relu(self.a(x))
        return self.c(torch.relu(self.mid(self, self.b(x))))


def net(name: str) -> nn.Module:
    """Build one of the models below, the constants of which come from their seed."""
    return Net(*KINDS[name], seeded=True)


def setting(**attributes: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Set attributes of a model, from functions of it."""

    def extra(model: Any) -> None:
        for name, make in attributes.items():
            setattr(model, name, make(model))

    return extra


def unsaved(make: Callable[[Any], Tensor]) -> Callable[[Any], None]:
    """Register a buffer that is not part of the state."""
    return lambda model: model.register_buffer("p", make(model), persistent=False)


def through(model: Any, x: Tensor) -> Tensor:
    """Use a constant matrix."""
    return x + x @ model.p


_lock, _scale = Lock(), ContextVar("scale", default=2.0)


def locked(model: Any, x: Tensor) -> Tensor:
    """Use things that cannot be looked into."""
    with _lock:
        return through(model, x) * _scale.get()


KINDS: dict[str, tuple[Any, Any]] = {
    "a constant drawn after parameters": (
        setting(p=lambda m: torch.randn(WIDTH, WIDTH) / 4),
        through,
    ),
    "an unsaved buffer drawn after parameters": (
        unsaved(lambda m: torch.rand(WIDTH, WIDTH)),
        through,
    ),
    "a permutation as a list": (
        setting(order=lambda m: torch.randperm(WIDTH).tolist()),
        lambda m, x: x[:, m.order],
    ),
    "a number drawn": (
        setting(scale=lambda m: float(torch.rand(()))),
        lambda m, x: x * m.scale,
    ),
    "a copy of a weight": (
        setting(p=lambda m: m.b.weight.detach().clone()),
        through,
    ),
    "an unsaved buffer computed from a weight": (
        unsaved(lambda m: m.b.weight.detach().t() * 2),
        through,
    ),
    "a copy of a weight in a dictionary": (
        setting(kept=lambda m: {"w": [m.b.weight.detach().sign()]}),
        lambda m, x: x + x @ m.kept["w"][0],
    ),
    "a number computed from a weight": (
        setting(scale=lambda m: float(m.b.weight.detach().norm())),
        lambda m, x: x / m.scale,
    ),
    "a layer that is no submodule": (
        setting(hidden=lambda m: [nn.Linear(WIDTH, WIDTH).requires_grad_(False)]),
        lambda m, x: x + F.linear(x, m.weights()),
    ),
    "a lock and a setting of a module, and a constant drawn": (
        setting(p=lambda m: torch.rand(WIDTH, WIDTH)),
        locked,
    ),
    "its own generator": (
        setting(
            p=lambda m: torch.rand(
                WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)
            )
        ),
        through,
    ),
}
VALUES_NEEDED = [name for name in KINDS if "generator" not in name]


@pytest.fixture
def warned(caplog: Any) -> Any:
    """Collect what is logged."""
    logging.getLogger("flwr").propagate = True
    template._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger="flwr")
    return caplog


def check_all_routes(model_fn: Callable[[], nn.Module]) -> None:
    """Compare whole, every cut, and a u-shape with the stock model."""
    task = task_of(model_fn, shape=(8,))
    with RouteChecker(task, example_batches(task, batch_size=4)) as checker:
        size = len(checker.chain)
        routes = [Route.whole(), *map(Route.split, range(1, size))]
        if size > 2:
            routes.append(Route.u_shape(1, size - 1))
        for route in routes:
            assert checker.check(route).differences == (), route


@pytest.mark.parametrize("name", KINDS)
def test_constants_are_those_of_the_stock_model(name: str, warned: Any) -> None:
    """And whoever builds the whole model for it is told so."""
    check_all_routes(partial(net, name))
    told = [r for r in warned.records if "needs the values" in r.getMessage()]
    assert bool(told) == (name in VALUES_NEEDED)


def marks_of(
    model_fn: Callable[[], nn.Module], *changes: Callable[[], object]
) -> list[str]:
    """List a model's marks, before and after each change of what it uses."""
    marks = [template.template_of(task_of(model_fn, shape=(8,)))[1]]
    for change in changes:
        change()
        marks.append(template.template_of(task_of(model_fn, shape=(8,)))[1])
    return marks


def test_locks_and_settings_are_no_reason_to_trace_anew() -> None:
    """Until a setting changes: a trace has its value in it."""
    kind = "a lock and a setting of a module, and a constant drawn"
    token = []
    one, same, other = marks_of(
        partial(net, kind), lambda: None, lambda: token.append(_scale.set(3.0))
    )
    _scale.reset(token[0])
    assert one == same != other


class Slot:
    """An object that cannot be looked into, and holds something."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


_slot = Slot(2.0)


def test_what_holds_something_that_is_not_seen_is_traced_anew() -> None:
    """It may hold another thing now."""
    kind = setting(), lambda m, x: x * _slot.value
    one, other = marks_of(lambda: Net(*kind, seeded=True), lambda: None)
    assert one != other


def test_what_is_drawn_into_such_an_object_is_refused() -> None:
    """Each place would have its own."""
    kind = setting(own=lambda m: Slot(torch.rand(WIDTH))), lambda m, x: x * m.own.value
    with pytest.raises(InvalidTask, match="own is another one each time"):
        build_chain(task_of(lambda: Net(*kind), shape=(8,)))


def test_constants_that_miss_draws_are_seen(monkeypatch: Any) -> None:
    """Without the comparison of builds with other draws, the check above fails."""
    monkeypatch.setattr(template, "_NUM_OTHER_DRAWS", 0)

    def fresh() -> nn.Module:
        return net("a constant drawn after parameters")

    with pytest.raises(AssertionError):
        check_all_routes(fresh)


UNSEEDED = {
    "p": "a copy of a weight",
    "scale": "a number drawn",
    "order": "a permutation as a list",
}


@pytest.mark.parametrize("attribute", [*UNSEEDED, "numbers", "choice"])
def test_constants_that_differ_at_each_place_are_refused(attribute: str) -> None:
    """Nobody has seeded them: the error names the attribute."""
    others = {
        "numbers": lambda m: np.random.permutation(WIDTH),  # noqa: NPY002
        "choice": lambda m: random.random(),
    }
    kind = (setting(**{attribute: others.get(attribute)}), lambda m, x: x)
    kind = KINDS[UNSEEDED[attribute]] if attribute in UNSEEDED else kind
    with pytest.raises(InvalidTask, match=f"{attribute} is another one each time"):
        build_chain(task_of(lambda: Net(*kind), shape=(8,)))


def test_what_cannot_be_copied_is_refused() -> None:
    """Each place has a copy; the error names the attribute."""
    kind = setting(lock=lambda m: Lock()), lambda m, x: x
    with pytest.raises(InvalidTask, match="lock is a lock, which cannot be copied"):
        build_chain(task_of(lambda: Net(*kind), shape=(8,)))


def test_building_a_chain_draws_nothing_of_the_users() -> None:
    """Torch's generator goes on as if there were no chain."""
    for name in ("a constant drawn after parameters", "its own generator"):
        torch.manual_seed(1)
        build_chain(task_of(lambda name=name: net(name), shape=(8,)))
        assert (
            torch.rand(3).tolist()
            == torch.rand(3, generator=torch.Generator().manual_seed(1)).tolist()
        )


# --- model functions of everyday code -------------------------------------------------


def mlp() -> nn.Sequential:
    """Build a plain network."""
    return nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10)
    )


def changed(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """Build the network and change it; the change may return another module."""

    def model_fn() -> nn.Module:
        model = mlp()
        made = change(model)
        is_other = made is not None and not isinstance(made, Tensor | RemovableHandle)
        return made if is_other else model

    return model_fn


def moved_data(model: Any) -> None:
    """Replace a weight's data."""
    model[0].weight.data = torch.zeros(8, 8)


def wrapped_again(model: Any) -> None:
    """Make a new parameter of a weight's memory; the old one goes later."""
    old = model[0].weight
    model[0].weight = nn.Parameter(old.data, requires_grad=False)


def loaded(model: Any, **options: Any) -> None:
    """Load pretrained values."""
    with torch.random.fork_rng():
        model.load_state_dict(mlp().state_dict(), **options)


def normed(wrap: Callable[..., nn.Module]) -> Callable[[Any], None]:
    """Wrap a layer, as a parametrization does."""

    def change(model: Any) -> None:
        model[2] = wrap(model[2])

    return change


def skipped_init(model: Any) -> None:
    """Make a layer without values first."""
    model[2] = nn.utils.skip_init(nn.Linear, 8, 8)
    for parameter in model[2].parameters():
        nn.init.ones_(parameter)


def lazy_and_called(model: Any) -> None:
    """Infer a lazy layer's shape by one call."""
    model[2] = nn.LazyLinear(8)
    model(torch.zeros(2, 8))


def recurrent(model: Any) -> None:
    """Use a layer that keeps its parameters in a list, too."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x[:, None])[0][:, -1]

    model[2] = Last()


class Counts(nn.Module):
    """Counts its calls in a buffer, and has a layer."""

    def __init__(self, *, is_assigned: bool) -> None:
        super().__init__()
        self.layer, self.is_assigned = nn.Linear(8, 8), is_assigned
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Count, and run it."""
        if self.is_assigned:
            self.calls = self.calls + 1
        else:
            self.calls.add_(1)
        return self.layer(x)


WORK = {
    "to cpu": lambda m: m.to("cpu"),
    "to device": lambda m: m.to(torch.device("cpu")),
    "to device and memory format": lambda m: m.to(memory_format=torch.channels_last),
    "weight.data =": moved_data,
    "weight.data.copy_": lambda m: m[0].weight.data.copy_(torch.zeros(8, 8)),
    "data in another parameter": wrapped_again,
    "pretrained": loaded,
    "pretrained, assigned": partial(loaded, assign=True),
    "orthogonal": lambda m: nn.init.orthogonal_(m[0].weight),
    "looks at values": lambda m: float(m[0].weight.sum()) and None,
    "eval": lambda m: m.eval(),
    "deep copy": copy.deepcopy,
    "data parallel": nn.DataParallel,
    "weight norm": normed(parametrizations.weight_norm),
    "spectral norm": normed(parametrizations.spectral_norm),
    "orthogonal parametrization": normed(parametrizations.orthogonal),
    "orthogonal parametrization of a wide layer": normed(
        lambda _: nn.Sequential(
            parametrizations.orthogonal(nn.Linear(8, 16)), nn.Linear(16, 8)
        )
    ),
    "skip init": skipped_init,
    "lazy layer, called": lazy_and_called,
    "recurrent": recurrent,
    "a buffer counted in forward": lambda m: m.__setitem__(
        2, Counts(is_assigned=False)
    ),
    "an attribute of a parameter": lambda m: setattr(m[2].weight, "tag", 1),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", WORK)
def test_model_functions_of_everyday_code_work(name: str) -> None:
    """Every cut trains them as the stock model."""
    check_all_routes(changed(WORK[name]))


def hook(*_: object) -> None:
    """Do nothing."""
    raise AssertionError("a dry run calls no hook of the user's")


class Tagged(nn.Parameter):
    """A parameter that an optimizer would look for."""


class WithExtra(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self) -> Any:
        """Return it."""
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        """Take it."""


class MakesLayers(nn.Module):
    """Makes its layer when it is first called."""

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(8, 8)
        return self.layer(x)


class WithNorm(nn.Module):
    """Holds a function of one of its own layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = self.layer = nn.Linear(8, 8)
        self.function = lambda x: x / layer.weight.norm()

    def forward(self, x: Tensor) -> Tensor:
        """Use both."""
        return self.function(self.layer(x))


def same_memory(model: Any) -> None:
    """Give two layers one memory, as two parameters."""
    model[2].weight = nn.Parameter(model[0].weight.data)


def flat_memory(model: Any) -> None:
    """Give two layers parts of one memory that overlap."""
    flat = torch.randn(100)
    model[0].weight = nn.Parameter(flat[:64].view(8, 8))
    model[2].weight = nn.Parameter(flat[36:].view(8, 8))


def pruned(model: Any) -> None:
    """Prune a layer."""
    prune.l1_unstructured(model[0], "weight", amount=0.5)


def replaced(index: int, layer: Callable[[], nn.Module]) -> Callable[[Any], None]:
    """Put another layer into the network."""
    return lambda model: model.__setitem__(index, layer())


REFUSED = {
    "gradient hook": (
        lambda m: m[2].weight.register_hook(hook),
        "2.weight has a gradient hook.*register_step_pre_hook",
    ),
    "accumulated gradient hook": (
        lambda m: m[2].weight.register_post_accumulate_grad_hook(hook),
        "2.weight has a gradient hook",
    ),
    "forward hook": (
        lambda m: m[2].register_forward_hook(hook),
        r"forward of 2 \(Linear\) is changed by a hook",
    ),
    "backward hook": (
        lambda m: m[2].register_full_backward_hook(hook),
        r"forward of 2 \(Linear\) is changed by a hook",
    ),
    "hook on a container": (
        lambda m: (
            nn.Sequential(m, nn.ReLU()).register_forward_pre_hook(hook)
            and nn.Sequential(m[0], m)[1].register_forward_hook(hook)
            and None
        ),
        "forward of the model",
    ),
    "old weight norm": (
        normed(nn.utils.weight_norm),
        "Use torch.nn.utils.parametrizations",
    ),
    "old spectral norm": (
        normed(nn.utils.spectral_norm),
        "Use torch.nn.utils.parametrizations",
    ),
    "pruned": (
        pruned,
        "forward of 0",
    ),
    "forward on an instance": (
        lambda m: setattr(m[2], "forward", lambda x: x * 2),
        "forward of 2",
    ),
    "kind of parameter": (
        lambda m: setattr(m[2], "weight", Tagged(torch.ones(8, 8))),
        "2.weight is a Tagged.*set what it needs as an attribute",
    ),
    "lazy layer": (
        replaced(2, partial(nn.LazyLinear, 8)),
        "2.weight has no shape yet: call the model once",
    ),
    "bfloat16": (lambda m: m.bfloat16(), "0.weight is bfloat16.*Use float32"),
    "float8": (
        lambda m: m[0].register_buffer("scale", torch.ones(1).to(torch.float8_e4m3fn)),
        "0.scale is float8_e4m3fn",
    ),
    "complex128": (
        lambda m: m[0].register_buffer("z", torch.ones(1, dtype=torch.complex128)),
        "0.z is complex128.*use complex64",
    ),
    "extra state": (replaced(0, partial(WithExtra, 8, 8)), "0 has an extra state"),
    "one memory": (same_memory, "0.weight and 2.weight are two parameters in the same"),
    "overlapping memory": (flat_memory, "two parameters in the same memory"),
    "unregistered parameter": (
        lambda m: setattr(m[0], "kept", [nn.Parameter(torch.ones(3))]),
        "0.kept holds a parameter that is not registered",
    ),
    "function of a layer": (
        replaced(2, WithNorm),
        "2.function is a function that holds a Linear",
    ),
    "a graph": (
        lambda m: setattr(m[0], "twice", m[0].weight * 2),
        "0.twice is computed from parameters in model_fn: detach it",
    ),
    "a buffer assigned in forward": (
        replaced(2, partial(Counts, is_assigned=True)),
        "forward assigns 2.calls.*in place, as in self.calls.add_",
    ),
    "layers made in forward": (replaced(2, MakesLayers), "2.layer.*in __init__"),
    "compiled": (torch.compile, "return the module itself, without torch.compile"),
    "scripted": (torch.jit.script, "return the module itself"),
    "nothing": (lambda m: [m], "returns a list: return an nn.Module"),
}


@pytest.mark.every(4)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_at_the_start(name: str) -> None:
    """Also for the whole route: the chain is not built. No hook is called."""
    change, message = REFUSED[name]
    with pytest.raises((InvalidTask, NotSplittable), match=message):
        build_chain(task_of(changed(change), shape=(8,)))


# --- what parameters carry ------------------------------------------------------------


def without_decay() -> nn.Module:
    """Build a model that says which weights must not decay."""
    model = mlp()
    model[2].weight.no_decay = True
    return model


def by_attribute(parameters: Any) -> torch.optim.Optimizer:
    """Make two groups, by an attribute of the parameters."""
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in parameters:
        groups[getattr(parameter, "no_decay", False)].append(parameter)
    return torch.optim.SGD(
        [
            {"params": group, "weight_decay": 0.0 if is_kept else 0.5}
            for is_kept, group in groups.items()
            if group
        ],
        lr=0.1,
    )


def test_attributes_of_parameters_reach_the_optimizer() -> None:
    """At every place; in this model they change the result."""
    task = task_of(without_decay, shape=(8,), optimizer=by_attribute)
    finals = []
    for each in (task, task_of(mlp, shape=(8,), optimizer=by_attribute)):
        with RouteChecker(each, example_batches(each, batch_size=4)) as checker:
            for route in (Route.whole(), Route.split(3), Route.u_shape(1, 4)):
                assert checker.check(route).differences == ()
            finals.append(checker._final)
    assert (finals[0]["2.weight"] != finals[1]["2.weight"]).any()


def test_attributes_that_refer_to_the_model_refer_to_the_part() -> None:
    """A built part has nothing of the template's, nor of another part."""

    def model_fn() -> nn.Module:
        model = mlp()
        model[2].weight.partner = [model[2].bias]
        return model

    model = model_fn()
    chain = build_chain(task_of(model_fn, shape=(8,)))
    first, second = (materialise(chain, 0, 5, state_of(model)) for _ in range(2))
    parts = [dict(each.named_parameters()) for each in (first, second)]
    for part in parts:
        assert part["2.weight"].partner[0] is part["2.bias"]
    assert parts[0]["2.bias"] is not parts[1]["2.bias"]
    assert compare(model.state_dict(), first.state_dict()) == []


# --- the chain of another setting -----------------------------------------------------

ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu}
CONFIG: dict[str, Any] = {"act": "relu", "width": 8, "scale": 1.0}


class Configured(nn.Module):
    """Reads settings, some when it is built and some when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.act = ACTIVATIONS[CONFIG["act"]]
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Use them."""
        return self.last(self.act(self.first(x)) * CONFIG["scale"])


def configured() -> nn.Module:
    """Build by the settings."""
    return Configured()


@pytest.mark.parametrize(("key", "value"), [("act", "gelu"), ("scale", 3.0)])
@pytest.mark.parametrize("is_same_task", [True, False])
def test_a_chain_of_another_setting_is_not_used(
    monkeypatch: Any, key: str, value: Any, is_same_task: bool
) -> None:
    """Whatever ``model_fn`` and ``forward`` read; without a change it is used again."""
    task = task_of(configured, shape=(8,))
    first = build_chain(task, anew=True)
    assert build_chain(task_of(configured, shape=(8,))) is first
    assert build_chain(task, anew=True) is first
    monkeypatch.setitem(CONFIG, key, value)
    other = task if is_same_task else task_of(configured, shape=(8,))
    assert build_chain(other, anew=is_same_task) is not first
    with RouteChecker(other, example_batches(other, batch_size=3)) as checker:
        for route in (Route.whole(), Route.split(1)):
            assert checker.check(route).differences == ()


class WithProperty(nn.Linear):
    """Has methods of every kind."""

    @property
    def size(self) -> int:
        return self.in_features

    @staticmethod
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        return self.doubled(super().forward(x)) / self.size


def with_property(model: Any) -> None:
    """Use a class of the user's, and a constant that its seed draws."""
    model[2] = WithProperty(8, 8)
    torch.manual_seed(1)
    model[2].constant = torch.randn(1)


@pytest.mark.parametrize(
    "change", [normed(parametrizations.weight_norm), recurrent, with_property]
)
def test_what_has_no_name_of_its_own_is_no_difference(change: Any) -> None:
    """Weight norm has a numbered hook, a recurrent layer weak references."""
    task = task_of(changed(change))
    assert template.template_of(task)[1] == template.template_of(task)[1]


def test_the_code_of_every_kind_of_method_counts(monkeypatch: Any) -> None:
    """A property, and a static method, are described by what they do."""
    task = task_of(changed(with_property))
    marks = {template.template_of(task)[1]}
    for name, kind in {"doubled": staticmethod, "size": property}.items():
        monkeypatch.setattr(WithProperty, name, kind(lambda x: 3))
        marks.add(template.template_of(task)[1])
    assert len(marks) == 3
