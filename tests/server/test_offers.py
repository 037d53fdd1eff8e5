"""What devices are offered is checked against the task."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from flwr_smartsplit import Variant, VariantRequest, Whole, Widths
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.server.offers import check_narrowable, offered
from flwr_smartsplit.split import chain as chain_module
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.types import WHOLE
from tests.plan.profiles import device
from tests.tasks import TASK, tiny_chain, tiny_cnn


class Returning:
    """Offer one thing, whatever it is, and note what was asked."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.asked: list[VariantRequest] = []

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        self.asked.append(request)
        found: Sequence[Variant] = self.thing
        return found


def test_a_rule_is_asked_for_a_device_and_a_round() -> None:
    """With the groups that it may take channels from."""
    rule = Returning([WHOLE])
    assert offered(rule, device("a"), round_number=7, chain=tiny_chain()) == (WHOLE,)
    (request,) = rule.asked
    assert (request.device.client_key, request.round_number) == ("a", 7)
    assert [group.name for group in request.groups] == ["0.weight", "4.weight"]


@pytest.mark.parametrize("thing", [[], ["width 0.5"], [0.5]])
def test_what_is_no_variant_is_refused(thing: Any) -> None:
    """By the rule and the client."""
    with pytest.raises(InvalidTask, match=r"Returning.* offers client 'a'"):
        offered(Returning(thing), device("a"), round_number=1, chain=tiny_chain())


@pytest.mark.parametrize(
    ("variant", "problem"),
    [
        (Variant("mine"), "leaves nothing out"),
        (Variant("mine", {"0.weight": (0, 99)}), "has 4 channels"),
        (Variant("mine", {"other": (0,)}), "no channel group 'other'"),
    ],
)
def test_a_variant_of_another_model_is_refused(variant: Variant, problem: str) -> None:
    """By the rule, the client and the variant."""
    with pytest.raises(InvalidTask, match=f"client 'a' variant 'mine', .*{problem}"):
        offered(
            Returning([WHOLE, variant]), device("a"), round_number=1, chain=tiny_chain()
        )


def test_whole_models_need_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody traces a model for channels that nobody leaves out."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("traced")

    monkeypatch.setattr(chain_module, "find_channels", refuse)
    chain = Chain.from_module(tiny_cnn(), TASK.example_inputs)
    check_narrowable(chain, TASK, Whole())
    assert offered(Whole(), device("a"), round_number=1, chain=chain) == (WHOLE,)
    assert chain.under(WHOLE) is chain
    assert chain.regions(WHOLE) == {}
    with pytest.raises(AssertionError, match="traced"):
        check_narrowable(chain, TASK, Widths())


def test_local_state_with_channels_is_named() -> None:
    """What has none is no problem."""
    chain = tiny_chain()
    check_narrowable(chain, replace(TASK, is_local=lambda n: n == "8.bias"), Widths())
    local = replace(TASK, is_local=lambda name: name.startswith("8."))
    with pytest.raises(InvalidTask, match=r"is_local keeps 8\.weight \(1 in all\)"):
        check_narrowable(chain, local, Widths())
