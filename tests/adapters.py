"""Small models with adapters and frozen parts, by hand and by peft; importable."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures import Architecture, hugging_face, hugging_face_model

RANK = 2


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank term beside it, written by hand."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def by_hand() -> nn.Module:
    """Build a network whose linear layers are adapted by hand."""
    return nn.Sequential(
        nn.Linear(8, 16).requires_grad_(False),
        nn.ReLU(),
        Adapted(nn.Linear(16, 16)),
        nn.ReLU(),
        Adapted(nn.Linear(16, 3)),
    )


def plain_net() -> nn.Module:
    """Build a convolutional network that torch.fx can trace."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def frozen_except(make: Callable[[], nn.Module], trained: Sequence[str]) -> nn.Module:
    """Build a model in which only the named parts are trained."""
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trained)))
    return model


def with_lora(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    """Give a model the adapters of peft."""
    peft = import_module("peft")
    config = peft.LoraConfig(r=RANK, lora_dropout=0.1, **options)
    model: nn.Module = peft.get_peft_model(make(), config)
    return model


def lora(kind: str, *targets: str, **options: Any) -> Architecture:
    """Train the adapters of a model of transformers on padded batches."""
    plain = hugging_face_model(kind, use_cache=False, **options)
    make = partial(
        with_lora,
        plain.model_fn,
        target_modules=list(targets),
        fan_in_fan_out=kind.startswith("GPT2"),
    )
    return replace(plain, model_fn=make)


def images(model_fn: Callable[[], nn.Module], num_units: int) -> Architecture:
    """Train a classifier of ``(batch, 1, 8, 8)`` images."""
    return Architecture(
        model_fn=model_fn,
        inputs=torch.zeros(2, 1, 8, 8),
        targets=torch.arange(2),
        loss_fn=nn.functional.cross_entropy,
        num_units=num_units,
    )


def frozen_net(*trained: str) -> Architecture:
    """Freeze all of the convolutional network but the named modules."""
    return images(partial(frozen_except, plain_net, trained), 7)


def frozen_llama(*trained: str) -> Architecture:
    """Freeze all of a tied LLaMA but the named modules."""
    plain = hugging_face_model("LlamaForCausalLM", tie_word_embeddings=True)
    make = partial(
        hugging_face, "LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True
    )
    return replace(plain, model_fn=partial(frozen_except, make, trained))


BY_HAND = Architecture(
    model_fn=by_hand,
    inputs=torch.zeros(2, 8),
    targets=torch.arange(2),
    loss_fn=nn.functional.cross_entropy,
    num_units=5,
)
FROZEN = {
    "adapters by hand": BY_HAND,
    "frozen backbone": frozen_net("6."),
    "frozen middle": frozen_net("0.", "6."),
    "frozen end": frozen_net("0.", "1."),
    "biases only": frozen_net("0.bias", "1.bias", "3.bias", "6.bias"),
    "norm behind a frozen layer": frozen_net("1.", "6."),
    "one layer of a tied decoder": frozen_llama("model.layers.1.mlp"),
}
PEFT = {
    "convolutions": images(
        partial(with_lora, plain_net, target_modules=["0", "3"], modules_to_save=["6"]),
        7,
    ),
    "tied gpt": lora("GPT2LMHeadModel", "c_attn", "c_fc", tie_word_embeddings=True),
    "tied llama": lora("LlamaForCausalLM", "q_proj", tie_word_embeddings=True),
    "tied bert": lora("BertForMaskedLM", "query", "value", tie_word_embeddings=True),
    "bert classifier": lora("BertForSequenceClassification", "query"),
}
