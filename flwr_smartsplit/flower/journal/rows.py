"""Journal rows of clients and rounds, named as in Flower's own benchmark."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from flwr_smartsplit.flower.rounds.exchange import Dispatch
from flwr_smartsplit.types import (
    RAW,
    WHOLE,
    ClientPlan,
    ClientReply,
    DeviceProfile,
    Failure,
    StepReport,
)

Row = dict[str, object]

_MEASURED = """peak_bytes resident_growth_bytes num_examples num_steps num_threads loss
    loss_rms seconds""".split()


def client_rows(
    dispatch: Dispatch, accepted: Mapping[str, ClientReply], failures: Sequence[Failure]
) -> Iterator[Row]:
    """Make one row for every client of the phase, and every stray reply."""
    for key, reply in accepted.items():
        yield _row(dispatch, key, reply.report) | {"status": "accepted"}
    for failure in failures:
        row = _row(dispatch, failure.client_key, failure.report)
        yield row | {"status": failure.kind, "cause": failure.cause}


def skipped_row(
    profile: DeviceProfile,
    reason: str,
    round_number: int,
    *,
    phase: str = "train",
    is_unfit: bool = False,
) -> Row:
    """Make the row of a client that was not chosen, or could not be."""
    return {
        **_client(phase, round_number, profile.client_key),
        "status": "sat_out" if is_unfit else "not_sampled",
        "cause": reason,
        "budget_bytes": profile.budget_bytes,
        "num_examples": profile.num_examples,
    }


def failure_row(failure: Failure, round_number: int, phase: str) -> Row:
    """Make the row of a failure before anything was sent."""
    return {
        **_client(phase, round_number, failure.client_key),
        "status": failure.kind,
        "cause": failure.cause,
    }


def round_row(
    dispatch: Dispatch,
    accepted: Mapping[str, ClientReply],
    failures: Sequence[Failure],
    *,
    edge_state_bytes: int,
    seconds: float,
    aggregation_seconds: float,
) -> Row:
    """Make the row of one round's training or evaluation.

    ``edge_state_bytes`` went between the strategy and its edges since the row before.
    """
    messages = sum(dispatch.sent_bytes.values())
    messages += sum(dispatch.received_bytes.values())
    reports = [reply.report for reply in accepted.values()]
    reports += [failure.report for failure in failures if failure.report is not None]
    boundaries = sum(report.sent_bytes + report.received_bytes for report in reports)
    more: Row = {"weight": dispatch.weight, "at_seconds": dispatch.at_seconds}
    return {
        "kind": "round" if dispatch.is_train else "evaluation_round",
        "round": dispatch.round_number,
        "selected": len(dispatch.sent),
        "accepted": len(accepted),
        "edge_state_bytes": edge_state_bytes,
        "comm_bytes_total": messages + boundaries + edge_state_bytes,
        "round_wall_clock_sec": seconds,
        "server_aggregation_time_sec": aggregation_seconds,
        **{name: value for name, value in more.items() if value is not None},
    }


def _row(dispatch: Dispatch, key: str, report: StepReport | None) -> Row:
    """Join a client's report and plan; our keys come last, so metrics replace none."""
    row: Row = {} if report is None else {**report.metrics, **_measured(report)}
    phase = "train" if dispatch.is_train else "evaluate"
    row |= _client(phase, dispatch.round_number, key)
    sent = dispatch.sent.get(key)
    if sent is not None:
        row |= {
            "route": str(sent.plan.route),
            "recompute": str(sent.plan.recompute),
            "budget_bytes": sent.plan.budget_bytes,
            "bytes_down": dispatch.sent_bytes.get(key, 0),
            "bytes_up": dispatch.received_bytes.get(key, 0),
            **_unusual(sent.plan),
        }
        if key in dispatch.staleness:
            row |= {
                "version": sent.plan.round_number - 1,
                "staleness": dispatch.staleness[key],
            }
        if dispatch.is_train:
            row["predicted_peak_bytes"] = sent.assignment.option.peak_bytes
            row["predicted_seconds"] = sent.assignment.option.seconds
            row["why"] = sent.assignment.why
            if sent.plan.variant != WHOLE:  # Whoever reads it has the model's costs.
                work = sent.assignment.option.work
                row["step_flops"] = work.device_flops
                row["edge_step_flops"] = work.edge_flops
    return row


def _unusual(plan: ClientPlan) -> Row:
    """List what few plans have."""
    found: Row = {
        "variant": "" if plan.variant == WHOLE else plan.variant.name,
        "codecs": list(map(str, plan.codecs)) if set(plan.codecs) - {RAW} else [],
        "accumulate": 0 if plan.accumulate == 1 else plan.accumulate,
    }
    return {name: value for name, value in found.items() if value}


def _client(phase: str, round_number: int, client_key: str) -> Row:
    return {
        "kind": "client",
        "phase": phase,
        "round": round_number,
        "client_key": client_key,
    }


def _measured(report: StepReport) -> Row:
    changes: Row = {
        "released": report.released,
        "moves": [asdict(move) for move in report.moves],
        "replans": [asdict(replan) for replan in report.replans],
        "metric_examples": dict(report.metric_examples),
    }
    plain = report.plain_sent_bytes, report.plain_received_bytes
    if any(plain):
        changes["edge_bytes_raw_up"], changes["edge_bytes_raw_down"] = plain
    return {
        **{name: rows for name, rows in changes.items() if rows not in ("", [], {})},
        **{name: getattr(report, name) for name in _MEASURED},
        "edge_bytes_up": report.sent_bytes,
        "edge_bytes_down": report.received_bytes,
    }
