"""The clients' app: it hands each message to a client with the task it asks for.

A method that trains another task than the experiment's own names itself in the
message's config, and its ``task_fn`` builds the task.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from flwr_smartsplit import SmartSplitNumPyClient, build_client_app
from flwr_smartsplit.flower.serde.records import records_of
from simulations.experiments.experiment import Experiment
from simulations.methods.method import METHOD, TaskFn, usual_task


@final
class MethodApp(ClientApp):
    """Answer every message of every method."""

    def __init__(
        self,
        client_fn: Callable[..., SmartSplitNumPyClient],
        experiment: Experiment,
        task_fns: Mapping[str, TaskFn],
    ) -> None:
        super().__init__()
        self._client_fn = client_fn
        self._experiment = experiment
        self._task_fns = task_fns

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        config: dict[str, Any] = {}
        for record in records_of(message.content, ConfigRecord):
            config |= dict(record)
        task_fn = self._task_fns.get(config.get(METHOD, ""), usual_task)
        client = int(context.node_config["partition-id"])
        task = task_fn(self._experiment, client, config)
        return build_client_app(partial(self._client_fn, task=task))(message, context)
