"""What a round's replies teach the selections to come."""

from collections.abc import Callable, Iterator, Mapping

from flwr_smartsplit.flower.dispatch import Dispatch
from flwr_smartsplit.policy.history import Observation
from flwr_smartsplit.types import ClientPlan, ClientReply, StepReport

ClientSeconds = Callable[[ClientPlan, StepReport], float]
"""Says how long a client's part of a round took."""


def measured_seconds(plan: ClientPlan, report: StepReport) -> float:
    """Take the time that the client measured.

    What it measures differs from run to run, and with it the clients that are chosen.
    """
    del plan
    return report.seconds


def observed(
    dispatch: Dispatch,
    accepted: Mapping[str, ClientReply],
    client_seconds: ClientSeconds | None,
) -> Iterator[Observation]:
    """Make an observation of every part that was merged, in client_key order.

    Parameters
    ----------
    dispatch : Dispatch
        What went out.
    accepted : Mapping[str, ClientReply]
        What came back and was merged.
    client_seconds : Callable[[ClientPlan, StepReport], float], optional
        How long a part took; without it, as long as was predicted.
    """
    for key, reply in sorted(accepted.items()):
        sent, report = dispatch.sent[key], reply.report
        seconds = sent.assignment.predicted_seconds
        if client_seconds is not None:
            seconds = client_seconds(sent.plan, report)
        edges = sent.plan.route.edges()
        yield Observation(
            client_key=key,
            round_number=dispatch.round_number,
            num_examples=report.num_examples,
            loss_rms=report.loss_rms,
            loss_drop=report.loss_drop,
            seconds=seconds,
            edge=edges[0] if edges else None,
            features=sent.assignment.features,
        )
