"""build_client_app: the on-device manager as a Message-API ``ClientApp``."""

from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_smartsplit.flower.client import SmartSplitNumPyClient
from flwr_smartsplit.flower.serde.records import (
    LEGACY,
    OURS,
    PROFILE_ACTION,
    from_array_record,
    profile_to_scalars,
    records_of,
)
from flwr_smartsplit.flower.serde.replies import (
    evaluate_reply,
    train_reply,
)


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


class _BothApis(ClientApp):
    """A Message-API app that also answers as a ``NumPyClient`` app would."""

    def __init__(
        self, make_client: Callable[[Context], SmartSplitNumPyClient], mods: Any
    ) -> None:
        super().__init__(mods=list(mods))
        self._legacy = ClientApp(lambda c: make_client(c).to_client(), list(mods))

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message of either API."""
        is_legacy = any(key in message.content for key in _LEGACY_KEYS)
        if is_legacy:
            return self._legacy(message, context)
        return super().__call__(message, context)


_LEGACY_KEYS = (
    LEGACY.train_config,
    LEGACY.evaluate_config,
    "getpropertiesins.config",
    "getparametersins.config",
)
_ARRAY_MODS = ("centraldp_mods", "localdp_mod", "secagg_mod", "secaggplus_mod")


def _check_mods(mods: Sequence[Any]) -> None:
    """Refuse mods that would see half a model and take it for a whole one."""
    refused = [mod for mod in mods if _changes_arrays(mod)]
    if refused:
        raise TypeError(
            f"mods {', '.join(map(_name_of, refused))}: these clip, noise or mask a "
            "client's whole model. A split client sends a part, and the edge the rest, "
            "which they would not see; their guarantee would not hold."
        )


def _changes_arrays(mod: Any) -> bool:
    """Say whether a mod is one of Flower's that change what a client sends."""
    return str(getattr(mod, "__module__", "")).endswith(_ARRAY_MODS)


def _name_of(mod: Any) -> str:
    return str(getattr(mod, "__name__", type(mod).__name__))


def _config(content: RecordDict) -> dict[str, Any]:
    """Join the config records, whatever key the strategy keeps them under."""
    config: dict[str, Any] = {}
    for record in records_of(content, ConfigRecord):
        config |= dict(record)
    return config


def _arrays(content: RecordDict) -> dict[str, Any]:
    """Join the array records, whatever key the strategy keeps them under."""
    arrays: dict[str, Any] = {}
    for record in records_of(content, ArrayRecord):
        arrays |= from_array_record(record)
    return arrays
