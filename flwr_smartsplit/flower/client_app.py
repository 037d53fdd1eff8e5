"""build_client_app: the on-device manager as a Message-API ``ClientApp``."""

from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_smartsplit.flower.numpy_client import SmartSplitNumPyClient
from flwr_smartsplit.flower.records import (
    OURS,
    PROFILE_ACTION,
    evaluate_reply,
    from_array_record,
    profile_to_scalars,
    train_reply,
)


def build_client_app(
    client_fn: Callable[[Context], SmartSplitNumPyClient],
    *,
    mods: Sequence[Any] = (),
    weighted_by_key: str = "num-examples",
) -> ClientApp:
    """Make a ``ClientApp`` for ``SmartSplit`` or any stock Message-API strategy.

    Parameters
    ----------
    client_fn : Callable[[Context], SmartSplitNumPyClient]
        Makes the client of one node, as Flower's own ``client_fn`` does.
    mods : Sequence
        Flower mods, as for ``ClientApp``.
    weighted_by_key : str
        The metric that replies are weighted by, as for ``FedAvg``.
    """
    app = ClientApp(mods=list(mods))

    def make_client(context: Context) -> SmartSplitNumPyClient:
        client = client_fn(context)
        if not isinstance(client, SmartSplitNumPyClient):
            raise TypeError(
                f"client_fn returns a {type(client).__name__}; return the "
                "SmartSplitNumPyClient itself, without .to_client()."
            )
        return client

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = make_client(context)
        plan = client.plan_for(_config(message.content))
        outcome = client.train(plan, _arrays(message.content))
        reply = train_reply(plan, outcome, weighted_by_key=weighted_by_key)
        return Message(reply, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = make_client(context)
        plan = client.plan_for(_config(message.content))
        report = client.test(plan, _arrays(message.content))
        reply = evaluate_reply(plan, report, weighted_by_key=weighted_by_key)
        return Message(reply, reply_to=message)

    @app.query(PROFILE_ACTION)
    def profile(message: Message, context: Context) -> Message:
        scalars = profile_to_scalars(make_client(context).profile)
        return Message(RecordDict({OURS: ConfigRecord(scalars)}), reply_to=message)

    return app


def _config(content: RecordDict) -> dict[str, Any]:
    """Join the config records, whatever key the strategy keeps them under."""
    config: dict[str, Any] = {}
    for record in content.config_records.values():
        config |= dict(record)
    return config


def _arrays(content: RecordDict) -> dict[str, Any]:
    """Join the array records, whatever key the strategy keeps them under."""
    arrays: dict[str, Any] = {}
    for record in content.array_records.values():
        arrays |= from_array_record(record)
    return arrays
