"""What the strategy offers devices to train, checked against its task."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.plan.variants.variants import (
    VariantRequest,
    Variants,
    Whole,
    steps_of,
)
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.types import (
    WHOLE,
    ChannelGroup,
    DeviceProfile,
    Variant,
    groups_under,
    kept_problem,
    within,
)

SecondsOf = Callable[[DeviceProfile, Variant], float | None]
"""Predicts how long a round with a variant takes a device on its own."""


def check_narrowable(chain: Chain, task: Task, rule: Variants) -> None:
    """Check that a task's model may be narrowed, if a rule may offer that.

    Raises
    ------
    NotSplittable
        If no channels of the model may be left out, with the reasons.
    InvalidTask
        If state that stays on the devices has channels that may be.
    """
    if isinstance(rule, Whole) or steps_of(rule, chain.unit_names):
        return
    chain.channels.require_groups(chain.model)
    axes = (axis for group in chain.channels.groups for axis in group.axes)
    names = dict.fromkeys(axis.name for axis in axes)
    local = [] if task.is_local is None else list(filter(task.is_local, names))
    if local:
        raise InvalidTask(
            f"is_local keeps {', '.join(local[:3])} ({len(local)} in all) on the "
            "devices, where a narrower model would find another shape than it left: "
            "keep layers local that are not narrowed, or leave out variants."
        )


def offered(  # noqa: PLR0913 - what a rule may know
    rule: Variants,
    device: DeviceProfile,
    *,
    round_number: int,
    chain: Chain,
    base: Variant = WHOLE,
    memory: Any = None,
    seconds_of: SecondsOf | None = None,
) -> tuple[Variant, ...]:
    """Ask a rule what to offer a device; raise ``InvalidTask`` if it offers nothing.

    ``base`` is what is left of a model that was pruned: all that the rule knows.
    """
    if isinstance(rule, Whole):  # Nobody need know the model's channels.
        return (base,)
    request = VariantRequest(
        device=device,
        round_number=round_number,
        groups=groups_for(rule, chain, base),
        units=chain.unit_parameters,
        memory=memory,
    )
    if seconds_of is not None:
        request = replace(
            request, seconds_of=lambda each: seconds_of(device, within(base, each))
        )
    variants = tuple(rule.offered(request))
    if not variants or not all(isinstance(each, Variant) for each in variants):
        raise InvalidTask(
            f"{rule!r:.80} offers client {device.client_key!r} {variants!r:.80}: "
            "return at least one Variant, such as WHOLE, the most wanted first."
        )
    known = steps_of(rule, chain.unit_names)
    for variant in variants:
        problem = "" if variant in known else _problem_of(variant, chain, base)
        if problem:
            raise InvalidTask(
                f"{rule!r:.80} offers client {device.client_key!r} variant "
                f"{variant.name!r}, which is none of this model: {problem}."
            )
    return tuple(within(base, variant) for variant in variants)


def groups_for(
    rule: Variants, chain: Chain, base: Variant = WHOLE
) -> tuple[ChannelGroup, ...]:
    """List the channels that a rule may leave out; a rule of steps leaves out none."""
    if steps_of(rule, chain.unit_names):
        return ()
    return groups_under(chain.channels.groups, base)


def _problem_of(variant: Variant, chain: Chain, base: Variant) -> str:
    if variant == WHOLE:
        return ""
    if variant.is_step:
        return "it is none of the rule's steps"
    if not variant.kept:
        return f"it leaves nothing out, and is not {WHOLE.name!r}"
    if base == WHOLE:
        return chain.problem_of(variant)
    return kept_problem(variant, groups_under(chain.channels.groups, base))
