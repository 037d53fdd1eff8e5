"""A small GPT-2 with LoRA adapters, how they are trained, and the text."""

import warnings
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sklearn import datasets
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from flwr_smartsplit import Task
from flwr_smartsplit.split.huggingface import decoder_units

BATCH_SIZE = 16
LENGTH = 64
VOCABULARY = 128  # ASCII
IGNORED = -100  # A label that torch's cross_entropy leaves out
BUDGETS_BYTES = (None, 16 * 2**20, 2 * 2**20)  # one per device; None is no limit
TEXTS = ("load_breast_cancer", "load_wine", "load_digits")  # one per device
PUBLIC_TEXTS = ("load_diabetes", "load_iris", "load_linnerud")


def build_base() -> GPT2LMHeadModel:
    """Build the model that is adapted; its embeddings are tied, as GPT-2's are."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=2 * LENGTH,
        n_embd=64,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def build_model() -> nn.Module:
    """Build the base with its adapters; only they are trained."""
    config = LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft uses a name that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(build_base(), config)


def loss_fn(outputs: Any, labels: Tensor) -> Tensor:
    """Compare each token's prediction with its label."""
    logits = outputs.logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)


def metrics_fn(outputs: Any, labels: Tensor) -> Mapping[str, float]:
    """Count how many characters were predicted right."""
    right = outputs.logits.argmax(-1) == labels
    return {"accuracy": float(right[labels != IGNORED].float().mean())}


def build_task(model_fn: Any = build_model) -> Task:
    """Say what is trained and how: the server, the devices and the edge all need it."""
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    return Task(
        model_fn=model_fn,
        loss_fn=loss_fn,
        optimizer_fn=partial(torch.optim.AdamW, lr=5e-3),
        example_inputs={"input_ids": tokens, "attention_mask": tokens},
        example_targets=tokens,
        metrics_fn=metrics_fn,
        units_fn=decoder_units,
    )


def load_train(index: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Load four fifths of a device's text."""
    return [pair for i, pair in enumerate(examples(TEXTS[index])) if i % 5]


def load_eval(index: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Load the rest of it."""
    return examples(TEXTS[index])[::5]


def load_public() -> list[tuple[dict[str, Tensor], Tensor]]:
    """Load the text that the base is trained on, which is no device's."""
    return [pair for name in PUBLIC_TEXTS for pair in examples(name)]


@cache
def examples(name: str) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Divide the description of one of scikit-learn's data sets; pad the last part."""
    text = getattr(datasets, name)().DESCR.encode("ascii", "replace")
    tokens = torch.tensor(list(text))
    padding = -(len(tokens) - 1) % LENGTH
    tokens = nn.functional.pad(tokens, (0, padding))
    mask = torch.arange(len(tokens)) < len(text)
    labels = tokens.masked_fill(~mask, IGNORED)[1:]
    parts = (part[: len(labels)].view(-1, LENGTH) for part in (tokens, mask.long()))
    return [
        ({"input_ids": ids, "attention_mask": kept}, wanted)
        for ids, kept, wanted in zip(*parts, labels.view(-1, LENGTH), strict=True)
    ]
