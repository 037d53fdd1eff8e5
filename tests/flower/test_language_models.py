"""Language models in whole federated runs: adapters, padding, labels left out.

Each run on routes of every kind is compared with one in which all clients train whole
models: the state to the last bit, and the loss of an evaluation at another length.
"""

from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flwr_smartsplit import Route, RouteRequest, Task
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.split.build import build_chain, state_of
from tests.adapters import PEFT, lora
from tests.architectures import LENGTH, VOCABULARY, Architecture, hugging_face_model
from tests.flower.apps import Run, arrays_of, message_app, messages, run, smart_split
from tests.models import OPTIMIZERS
from tests.tasks import State, differences

IGNORED = -100
EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
ROUTES = (
    Route.split(1, edge="near"),
    Route.u_shape(1, 3, edge="far"),
    Route.hops((1, 2), edges=("near", "far")),
    Route.whole(),
)


def token_loss(outputs: Any, labels: Tensor) -> Tensor:
    """Leave out the tokens whose label is -100."""
    logits = outputs.logits.flatten(0, -2)
    return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)


def task_of(architecture: Architecture) -> Task:
    """Make a task whose loss leaves labels out."""
    task = architecture.task(OPTIMIZERS["adam"])
    return replace(task, loss_fn=token_loss)


def examples(client: int, length: int, *, per_token: bool) -> list[Any]:
    """Draw a client's examples, each padded by another number of tokens."""
    chance = torch.Generator().manual_seed(client)
    drawn = []
    for index in range(5 + client):
        ids = torch.randint(1, VOCABULARY, (length,), generator=chance)
        mask = (torch.arange(length) < length - index % 3).long()
        labels = ids.roll(-1).masked_fill(mask == 0, IGNORED)
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        drawn.append((inputs, labels if per_token else labels[0] % 3))
    return drawn


def trained(task: Task, *, is_whole: bool, per_token: bool = True) -> Run:
    """Run four clients, on routes of every kind or all on whole models."""

    def route_of(request: RouteRequest) -> Route:
        return Route.whole() if is_whole else ROUTES[request.index]

    def loader(client: int, length: int) -> DataLoader[Any]:
        drawn = examples(client, length, per_token=per_token)
        return DataLoader(drawn, batch_size=2, shuffle=True)

    apps = [
        message_app(
            index,
            task=task,
            edges=EDGES,
            train_loader=loader(index, LENGTH),
            eval_loader=loader(10 + index, LENGTH - 2),
        )
        for index in range(len(ROUTES))
    ]
    torch.manual_seed(3)
    arrays = to_array_record(state_of(task.model_fn()))
    strategy = smart_split(
        EDGES, task=task, choose_route=route_of, fraction_evaluate=1.0
    )
    return run(apps, strategy, arrays=arrays)


KINDS = {
    "tied gpt with lora": PEFT["tied gpt"],
    "tied llama with lora": PEFT["tied llama"],
    "tied bert with lora": PEFT["tied bert"],
    "bert classifier with lora": PEFT["bert classifier"],
    "gpt, all of it": hugging_face_model("GPT2LMHeadModel"),
    "distilbert, all of it": hugging_face_model("DistilBertForMaskedLM"),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if "tied gpt" in kind else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_a_run_on_every_kind_of_route_is_that_of_whole_models(kind: str) -> None:
    """State bit for bit; each round's loss at a length that was not trained on."""
    per_token = "classifier" not in kind
    task = task_of(KINDS[kind])
    cut = trained(task, is_whole=False, per_token=per_token)
    whole = trained(task, is_whole=True, per_token=per_token)
    assert cut.kinds() == whole.kinds() == []
    assert differences(cut.state, whole.state) == []
    found, wanted = (
        [dict(m)["loss"] for m in made.result.evaluate_metrics_clientapp.values()]
        for made in (cut, whole)
    )
    assert len(found) == 2
    assert found == wanted


def test_labels_that_are_left_out_count() -> None:
    """The planted error: a loss that does not leave them out differs or fails."""
    task = task_of(PEFT["tied gpt"])
    made = trained(replace(task, loss_fn=all_tokens_loss), is_whole=False)
    whole = trained(task, is_whole=True)
    assert differences(made.state, whole.state) != []


def all_tokens_loss(outputs: Any, labels: Tensor) -> Tensor:
    """Take a label that should be left out as token 0."""
    return token_loss(outputs, labels.clamp(min=0))


# --- adapters alone -------------------------------------------------------------------


def adapters_of(state: State) -> State:
    """Take the adapters out of a run's result, under peft's names."""
    peft = import_module("peft")
    model = PEFT["tied gpt"].model_fn()
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    found = peft.get_peft_model_state_dict(model, state_dict=tensors)
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_adapters_are_saved_alone_and_go_on_where_they_were(tmp_path: Any) -> None:
    """As the documentation says it, with peft's own functions."""
    peft = import_module("peft")
    made = trained(task_of(PEFT["tied gpt"]), is_whole=False)
    torch.manual_seed(3)
    model = PEFT["tied gpt"].model_fn()
    model.load_state_dict(made.result.arrays.to_torch_state_dict())
    model.save_pretrained(tmp_path)
    saved = adapters_of(made.state)
    names = build_chain(task_of(PEFT["tied gpt"])).changed_names(0, 4)
    assert len(saved) == len(names)
    file = tmp_path / "adapter_model.safetensors"
    assert file.stat().st_size < 2 * sum(array.nbytes for array in saved.values())

    torch.manual_seed(3)
    base = lora_base()
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    arrays = ArrayRecord(again.state_dict())
    assert differences(from_record(arrays), made.state) == []


def lora_base() -> nn.Module:
    """Build the base as the run did: with the same seed, before its adapters."""
    made = lora("GPT2LMHeadModel", tie_word_embeddings=True)
    factory: partial[nn.Module] = made.model_fn  # type: ignore[assignment]
    base: nn.Module = factory.args[0]()
    return base


def from_record(record: ArrayRecord) -> State:
    """Read a record."""
    return {name: array.numpy() for name, array in record.items()}


def test_only_adapters_travel_after_the_first_round() -> None:
    """To every client, whatever its route; and back in every round."""
    made = trained(task_of(PEFT["tied gpt"]), is_whole=False)
    asked = messages(made.grid, "train")
    later = asked[len(ROUTES) :]
    assert len(later) == len(ROUTES)
    answers = [m for m in made.grid.replied if m.metadata.message_type == "train"]
    for message in (*later, *answers):
        assert all("lora_" in name for name in arrays_of(message))
    assert any(arrays_of(message) for message in later)
