"""build_client_app: the on-device manager as a Message-API ``ClientApp``."""

from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_smartsplit.flower.client import SmartSplitNumPyClient
from flwr_smartsplit.flower.serde.records import (
    LEGACY,
    OURS,
    PROFILE_ACTION,
    arrays_of,
    config_of,
)
from flwr_smartsplit.flower.serde.replies import evaluate_reply, train_reply


def build_client_app(
    client_fn: Callable[[Context], SmartSplitNumPyClient],
    *,
    mods: Sequence[Any] = (),
    weighted_by_key: str = "num-examples",
) -> ClientApp:
    """Make a ``ClientApp`` for our strategies or any stock one.

    It understands both of Flower's APIs, whichever the server speaks.

    Parameters
    ----------
    client_fn : Callable[[Context], SmartSplitNumPyClient]
        Makes the client of one node, as Flower's own ``client_fn`` does.
    mods : Sequence
        Flower mods, as for ``ClientApp``.
    weighted_by_key : str
        The metric that replies are weighted by, as for ``FedAvg``.
    """
    _check_mods(mods)

    def make_client(context: Context) -> SmartSplitNumPyClient:
        client = client_fn(context)
        if not isinstance(client, SmartSplitNumPyClient):
            raise TypeError(
                f"client_fn returns a {type(client).__name__}; return the "
                "SmartSplitNumPyClient itself, without .to_client()."
            )
        if client.context is None:
            client.context = context
        return client

    app = _BothApis(make_client, mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = make_client(context)
        plan = client.plan_for(config_of(message.content))
        outcome = client.train(plan, arrays_of(message.content))
        reply = train_reply(plan, outcome, weighted_by_key=weighted_by_key)
        return Message(reply, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = make_client(context)
        plan = client.plan_for(config_of(message.content))
        report = client.test(plan, arrays_of(message.content))
        reply = evaluate_reply(plan, report, weighted_by_key=weighted_by_key)
        return Message(reply, reply_to=message)

    @app.query(PROFILE_ACTION)
    def profile(message: Message, context: Context) -> Message:
        scalars = make_client(context).profile_scalars()
        return Message(RecordDict({OURS: ConfigRecord(scalars)}), reply_to=message)

    return app


class _BothApis(ClientApp):
    """A Message-API app that also answers as a ``NumPyClient`` app would."""

    def __init__(
        self, make_client: Callable[[Context], SmartSplitNumPyClient], mods: Any
    ) -> None:
        super().__init__(mods=list(mods))
        self._legacy = ClientApp(lambda c: make_client(c).to_client(), list(mods))

    def __call__(self, message: Message, context: Context) -> Message:
        if any(key in message.content for key in _LEGACY_KEYS):
            return self._legacy(message, context)
        return super().__call__(message, context)


_LEGACY_KEYS = (
    LEGACY.train_keys[1],
    LEGACY.evaluate_keys[1],
    "getpropertiesins.config",
    "getparametersins.config",
)
_ARRAY_MODS = ("centraldp_mods", "localdp_mod", "secagg_mod", "secaggplus_mod")


def _check_mods(mods: Sequence[Any]) -> None:
    """Refuse those of Flower's mods that need a client's whole model."""
    refused = [
        str(getattr(mod, "__name__", type(mod).__name__))
        for mod in mods
        if str(getattr(mod, "__module__", "")).endswith(_ARRAY_MODS)
    ]
    if refused:
        raise TypeError(
            f"mods {', '.join(refused)}: these clip, noise or mask a client's whole "
            "model. A split client sends a part, and the edge the rest, which they "
            "would not see; their guarantee would not hold."
        )
