"""Observations from replies, for later selections and the edges' advice."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import inf, isfinite

from flwr_smartsplit.flower.rounds.exchange import Dispatch, Sent, moved_plan
from flwr_smartsplit.plan.advisor import Advisor
from flwr_smartsplit.plan.coding import route_profile
from flwr_smartsplit.plan.selection.history import History, Observation
from flwr_smartsplit.plan.timing import work_of
from flwr_smartsplit.plan.variants.variants import ClientOutcome
from flwr_smartsplit.types import (
    KEEP_ALL,
    Assignment,
    ClientPlan,
    ClientReply,
    Cohort,
    DeviceProfile,
    EdgeProfile,
    StepReport,
    Work,
)

ClientSeconds = Callable[[ClientPlan, StepReport], float]
"""Says how long a client's part of a round took."""


def measured_seconds(plan: ClientPlan, report: StepReport) -> float:
    """Return the time that the client measured.

    Measured times differ from run to run, and so do the clients chosen by them.
    """
    del plan
    return report.seconds


def observed(
    dispatch: Dispatch,
    accepted: Mapping[str, ClientReply],
    client_seconds: ClientSeconds | None,
) -> Iterator[Observation]:
    """Make an observation of every merged reply, in client_key order.

    Without ``client_seconds``, a client took as long as was predicted.
    """
    for key, reply in sorted(accepted.items()):
        sent, report = dispatch.sent[key], reply.report
        seconds = sent.assignment.option.seconds
        if client_seconds is not None:
            seconds = client_seconds(sent.plan, report)
        edges = sent.plan.route.edges()
        yield Observation(
            client_key=key,
            round_number=dispatch.round_number,
            num_examples=report.num_examples,
            # A loss that is not finite affects no other client.
            loss_rms=max(report.loss_rms, 0.0) if isfinite(report.loss_rms) else 0.0,
            seconds=seconds if seconds is not None and 0 <= seconds < inf else None,
            step_seconds=report.step_seconds if client_seconds is not None else None,
            work=_work(sent, report),
            edge=edges[0] if edges else None,
            beyond=edges[1:],
        )


def client_outcomes(
    dispatch: Dispatch,
    accepted: Mapping[str, ClientReply],
    seen: Iterable[Observation],
) -> dict[str, ClientOutcome]:
    """Say what each client that was merged trained, and how that ended."""
    seconds = {each.client_key: each.seconds for each in seen}
    return {
        key: ClientOutcome(
            variant=dispatch.sent[key].plan.variant,
            num_examples=reply.report.num_examples,
            loss=reply.report.loss,
            seconds=seconds[key],
            metrics=reply.report.metrics,
        )
        for key, reply in sorted(accepted.items())
    }


def cohort_in(
    advisor: Advisor,
    assignments: Iterable[Assignment],
    devices: Mapping[str, DeviceProfile],
    history: History,
    *,
    edges: Iterable[EdgeProfile] = (),
) -> Cohort | None:
    """Summarise the chosen clients, by the time of whole rounds; None without speeds.

    Edges whose memory is limited are to be relieved.
    """
    pairs = []
    for each in assignments:
        key, seconds = each.client_key, each.option.seconds
        seen = history.latest.get(key)
        if seconds is None and seen is not None and seen.step_seconds is not None:
            seconds = seen.step_seconds * devices[key].num_steps
        pairs.append((seconds, history.importance.get(key)))
    cohort = advisor.cohort(pairs)
    if cohort is None:
        return None
    is_limited = any(edge.memory_bytes is not None for edge in edges)
    return replace(cohort, relieves_edge=is_limited)


def _work(sent: Sent, report: StepReport) -> Work | None:
    """Return the least work of a step as the round ended."""
    if sent.profile is None:
        return None
    profile = route_profile(sent.profile, sent.plan.route, sent.plan.codecs)
    plan = moved_plan(sent.plan, report.moves)
    is_as_planned = not (report.moves or report.replans)
    recompute = plan.recompute if is_as_planned else KEEP_ALL
    return work_of(profile, plan.route, recompute)
