"""Which replies may be merged. A refused reply affects no other one."""

from collections.abc import Mapping

from flwr_smartsplit.edge.protocol import State
from flwr_smartsplit.edge.regions import cut_array
from flwr_smartsplit.edge.weighted_mean import has_diverged
from flwr_smartsplit.errors import RefusedReply
from flwr_smartsplit.types import (
    WHOLE,
    ClientReply,
    Expectation,
    Failure,
    Status,
    StepReport,
)

_TOO_MANY = 2**29  # From it on, weight times float32 is not exact in float64


def check_reply(
    reply: ClientReply,
    *,
    round_number: int,
    expected: Mapping[str, Expectation],
    accepted: Mapping[str, ClientReply],
    current: State,  # The global state, for shapes and dtypes
) -> None:
    """Check that a reply can be merged with those accepted so far.

    Its ``RefusedReply.kind`` is late, duplicate, refused, out_of_memory or edge_failed.
    """
    key = reply.client_key
    asked = expected[key].round_number if key in expected else None
    wanted = round_number if asked is None else asked
    if reply.round_number != wanted:
        raise _refused(
            f"client {key!r} answers round {reply.round_number} in round "
            f"{wanted}: raise the timeout or give it less work.",
            kind="late",
        )
    if key not in expected:
        raise _refused(f"client {key!r} was not chosen in this round.")
    if key in accepted:
        raise _refused(f"client {key!r} has answered already.", kind="duplicate")
    if reply.report.status is not Status.OK:
        raise _refused(reply.report.message, kind=reply.report.status.value)
    _check_state(reply, expected[key], current)
    _check_receipts(reply, expected[key])


def check_evaluation(reply: ClientReply, *, round_number: int) -> None:
    """Check an evaluation; raise ``RefusedReply`` as ``check_reply`` does."""
    report = reply.report
    if reply.round_number != round_number:
        raise _refused(f"evaluated round {reply.round_number}.", kind="late")
    if report.status is not Status.OK:
        raise _refused(report.message, kind=report.status.value)
    if report.num_examples < 1:
        raise _refused(f"evaluated {report.num_examples} examples.")
    if not all(0 <= n <= report.num_examples for n in report.metric_examples.values()):
        raise _refused(
            f"has metrics over {dict(report.metric_examples)} of its "
            f"{report.num_examples} examples."
        )


def refusal(reply: ClientReply, error: RefusedReply) -> Failure:
    """Describe a refused reply as a failure, with its measurements."""
    return Failure(
        client_key=reply.client_key,
        kind=error.kind,
        cause=str(error),
        report=reply.report,
    )


def _check_state(reply: ClientReply, expectation: Expectation, current: State) -> None:
    key, state = reply.client_key, reply.state
    if not 1 <= reply.report.num_examples < _TOO_MANY:
        raise _refused(
            f"client {key!r} trained on {reply.report.num_examples} examples: a "
            f"weight must be at least 1 and less than {_TOO_MANY}."
        )
    missing = sorted(expectation.device_names - state.keys())
    surplus = sorted(state.keys() - expectation.device_names)
    if missing or surplus:
        raise _refused(
            f"client {key!r} must send the state of its own segments and nothing "
            f"else: missing {missing}, surplus {surplus}."
        )
    for name, array in state.items():
        wanted = cut_array(current[name], expectation.regions.get(name))
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise _refused(
                f"client {key!r} sends {name} as {array.dtype}{array.shape}, the "
                f"{_model(expectation)} has {wanted.dtype}{wanted.shape}."
            )
        if has_diverged(array, wanted):
            raise _refused(
                f"client {key!r} sends values of {name} that are not finite."
            )


def _model(expectation: Expectation) -> str:
    name = expectation.variant.name
    return "model" if expectation.variant == WHOLE else f"model of variant {name!r}"


def _check_receipts(reply: ClientReply, expectation: Expectation) -> None:
    key = reply.client_key
    receipts = {receipt.place: receipt for receipt in reply.receipts}
    if receipts.keys() != expectation.tails.keys():
        raise _refused(
            f"client {key!r} must send receipts of {sorted(expectation.tails)}, not "
            f"of {sorted(receipts)}: a tail that is not sealed is not merged."
        )
    for place, tail in expectation.tails.items():
        receipt = receipts[place]
        if receipt.session != tail.session or set(receipt.names) != tail.names:
            raise _refused(
                f"client {key!r} sends a receipt for session {receipt.session} with "
                f"{len(receipt.names)} names; {tail.session} with {len(tail.names)} "
                "was expected."
            )
        if receipt.variant != tail.variant:
            raise _refused(
                f"client {key!r} sends a receipt for variant "
                f"{receipt.variant.name!r}; {tail.variant.name!r} was planned."
            )
        if not _are_steps_of(reply.report, receipt.num_examples):
            raise _refused(
                f"client {key!r} claims {reply.report.num_examples} examples in "
                f"{reply.report.num_epochs} epochs, its tail at {place!r} saw "
                f"{receipt.num_examples}."
            )
        if receipt.num_steps != reply.report.num_steps:
            raise _refused(
                f"client {key!r} did {reply.report.num_steps} steps, its tail at "
                f"{place!r} did {receipt.num_steps}."
            )


def _are_steps_of(report: StepReport, num_stepped: int) -> bool:
    """Check the examples of all passes; a released client's last may be incomplete.

    Passes may differ by what the sampler draws; the report has their mean, rounded off.
    """
    all_passes = report.num_examples * report.num_epochs
    if not report.released or report.num_epochs == 1:
        return 0 <= num_stepped - all_passes < report.num_epochs
    return all_passes - report.num_examples < num_stepped <= all_passes


def _refused(message: str, *, kind: str = "refused") -> RefusedReply:
    return RefusedReply(message, kind=kind)
