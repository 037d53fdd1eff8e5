"""The journal of Flower's strategies: a row per client and round, whatever happens."""

import json

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.task_identity import TaskIdentity

from flwr_smartsplit.flower.serde.records import OURS, profile_to_scalars
from flwr_smartsplit.types import DeviceProfile
from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import Iid
from simulations.fleets.presets import half_weak
from simulations.methods.fedavg import build_strategy
from simulations.methods.method import Setting

EXPERIMENT = Experiment(
    name="test", methods=("fedavg",), fleet=half_weak, partition=Iid(), num_clients=3
)
METRICS = {
    "num-examples": 10,
    "loss": 0.5,
    "device-peak-bytes": 700,
    "sent-bytes": 0,
    "received-bytes": 0,
    "seconds": 0.1,
    "num-steps": 2,
}


class StubGrid:
    """Three nodes; Flower's own grid needs a running simulation."""

    def get_node_ids(self):
        return [7, 8, 9]

    def send_and_receive(self, messages, *, timeout):
        """Answer what the sampler asks: the keys are 0, 1 and 2."""
        for message in messages:  # A grid names what it sends.
            name = str(message.metadata.dst_node_id)
            message.metadata.__dict__["_message_id"] = name
        return [self._profile_of(message) for message in messages]

    def _profile_of(self, message):
        profile = DeviceProfile(
            client_key=str(message.metadata.dst_node_id - 7),
            budget_bytes=100,
            num_examples=10,
            batch_size=16,
        )
        scalars = ConfigRecord(profile_to_scalars(profile))
        return Message(RecordDict({OURS: scalars}), reply_to=message)


def weights(value):
    return ArrayRecord({"w": Array(np.full(4, value, np.float32))})


def reply_to(message, key, value, num_examples):
    content = {
        "arrays": weights(value),
        "metrics": MetricRecord({**METRICS, "num-examples": num_examples}),
        OURS: ConfigRecord({"client-key": key}),
    }
    return Message(RecordDict(content), reply_to=message)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A strategy that has just asked its three nodes, and what it sent by node."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)  # messages can be made in runs only
    journal = tmp_path / "fedavg.jsonl"
    setting = Setting(
        experiment=EXPERIMENT, task=None, journal=journal, devices=(), clock=None
    )
    strategy = build_strategy(setting)
    sent = strategy.configure_train(1, weights(0.0), ConfigRecord(), StubGrid())
    by_node = {message.metadata.dst_node_id: message for message in sent}
    return strategy, by_node, journal


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_merge_is_flowers_and_the_order_of_replies_is_no_matter(asked):
    strategy, sent, _ = asked
    replies = [reply_to(sent[7], "0", 1.0, 10), reply_to(sent[8], "1", 4.0, 20)]

    arrays, _ = strategy.aggregate_train(1, replies)
    backwards, _ = strategy.aggregate_train(1, replies[::-1])

    assert arrays["w"].numpy().tolist() == [3.0] * 4
    assert backwards["w"].data == arrays["w"].data


def test_rows_tell_who_was_merged_and_who_was_lost(asked):
    strategy, sent, journal = asked
    lost = Message(Error(code=0, reason="gone"), reply_to=sent[9])
    strategy.aggregate_train(2, [lost, reply_to(sent[7], "0", 1.0, 10)])

    first, second, total = rows_of(journal)
    assert (first["client_key"], first["status"]) == ("0", "accepted")
    assert first["peak_bytes"] == 700
    assert first["budget_bytes"] is None
    assert (second["client_key"], second["status"]) == ("2", "lost")
    assert second["cause"] == "gone"
    assert (total["round"], total["selected"], total["accepted"]) == (2, 3, 1)


def test_bytes_are_counted_on_both_ways(asked):
    strategy, sent, journal = asked

    strategy.aggregate_train(1, [reply_to(sent[7], "0", 1.0, 10)])

    client, total = rows_of(journal)
    array_bytes = len(weights(0.0)["w"].data)
    assert client["bytes_down"] == array_bytes
    assert client["bytes_up"] == array_bytes + len("0")
    assert total["comm_bytes_total"] == 3 * array_bytes + client["bytes_up"]
