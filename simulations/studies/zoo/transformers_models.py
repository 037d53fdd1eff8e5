"""Models of transformers: tiny ones, from configurations, with random weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit import Task
from flwr_smartsplit.cli.specs import OPTIMIZERS
from flwr_smartsplit.split.huggingface import decoder_units, encoder_units
from simulations.experiments.errors import ExperimentError

_VOCABULARY, _LENGTH, _CLASSES, _SIDE = 50, 8, 3, 32
_TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
UNTIED = {"tie_word_embeddings": False}
_UNCACHED = {"use_cache": False}
_TEXT = _TINY | {
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 2 * _LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": _CLASSES,
}
_GROUPED = _TEXT | {"num_key_value_heads": 1}
_BOTH = (
    _TEXT
    | _UNCACHED
    | {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "decoder_start_token_id": 1,
    }
)
_IMAGE = _TINY | {"image_size": _SIDE, "patch_size": 8, "num_labels": _CLASSES}
_STAGES = {
    "num_channels": 3,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_stages": 2,
    "embedding_size": 8,
    "num_labels": _CLASSES,
}

TOKENS = torch.arange(1, _VOCABULARY)[: 2 * _LENGTH].reshape(2, _LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A class of transformers, how its configuration gets tiny, and its examples."""

    options: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    targets: Tensor
    units_fn: Callable[..., Any] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)  # Of the options
    max_boundary_tensors: int = 1


_READ = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
_LABELS = torch.arange(_CLASSES)
_text = partial(Tiny, options=_TEXT, inputs=_READ, targets=TOKENS)
_grouped = partial(_text, options=_GROUPED)
_both = partial(
    _text, options=_BOTH, inputs={**_READ, "decoder_input_ids": TOKENS.flip(1)}
)
_image = partial(
    Tiny,
    options=_IMAGE,
    inputs={"pixel_values": torch.zeros(1, 3, _SIDE, _SIDE)},
    targets=_LABELS,
)
_staged = partial(_image, options=_STAGES)

MODELS: dict[str, Tiny] = {
    # Encoders
    "BertForMaskedLM": _text(units_fn=encoder_units),
    "BertForMaskedLM untied": _text(units_fn=encoder_units, changes=UNTIED),
    "RobertaForSequenceClassification": _text(units_fn=encoder_units, targets=_LABELS),
    "DistilBertForTokenClassification": _text(
        units_fn=encoder_units, targets=TOKENS % _CLASSES
    ),
    "AlbertForMaskedLM": _text(changes={"embedding_size": 16}),
    "ElectraForSequenceClassification": _text(
        targets=_LABELS, changes={"embedding_size": 16}
    ),
    "DebertaV2ForMaskedLM": _text(),
    "MPNetForMaskedLM": _text(),
    # Decoders
    "GPT2LMHeadModel": _text(units_fn=decoder_units, changes={"n_inner": 32}),
    "GPT2LMHeadModel untied": _text(
        units_fn=decoder_units, changes={"n_inner": 32, **UNTIED}
    ),
    "LlamaForCausalLM": _grouped(units_fn=decoder_units),
    "MistralForCausalLM": _grouped(units_fn=decoder_units),
    "Qwen2ForCausalLM": _grouped(units_fn=decoder_units),
    "MixtralForCausalLM": _grouped(
        changes={"num_local_experts": 4, "num_experts_per_tok": 2, **_UNCACHED}
    ),
    "GPTNeoXForCausalLM": _text(changes=_UNCACHED, max_boundary_tensors=4),
    "OPTForCausalLM": _text(
        max_boundary_tensors=4,
        changes={"ffn_dim": 32, "word_embed_proj_dim": 16, **UNTIED, **_UNCACHED},
    ),
    "BloomForCausalLM": _text(changes=UNTIED | _UNCACHED, max_boundary_tensors=4),
    "MambaForCausalLM": _text(changes={"state_size": 4, **_UNCACHED}),
    # Encoders and decoders
    "T5ForConditionalGeneration": _both(
        max_boundary_tensors=4,
        changes={"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    ),
    "BartForConditionalGeneration": _both(),
    "MarianMTModel": _both(),
    # Images
    "ViTForImageClassification": _image(),
    "BeitForImageClassification": _image(),
    "Dinov2ForImageClassification": _image(),
    "SwinForImageClassification": _image(
        options={"image_size": _SIDE, "num_labels": _CLASSES},
        changes={
            **{"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]},
            **{"patch_size": 2, "window_size": 4},
        },
    ),
    "ConvNextForImageClassification": _staged(),
    "ResNetForImageClassification": _staged(),
    # Sound
    "Wav2Vec2ForSequenceClassification": _image(
        options=_TINY,
        inputs={"input_values": torch.zeros(1, 400)},
        changes={
            **{"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3]},
            **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16},
            **{"num_conv_pos_embedding_groups": 2, "num_labels": _CLASSES},
        },
    ),
    "ASTForAudioClassification": _image(
        options=_TINY,
        inputs={"input_values": torch.zeros(1, 32, 16)},
        changes={
            **{"max_length": 32, "num_mel_bins": 16, "num_labels": _CLASSES},
            **{"patch_size": 8, "frequency_stride": 8, "time_stride": 8},
        },
    ),
    "WhisperForConditionalGeneration": _both(
        max_boundary_tensors=4,
        inputs={
            "input_features": torch.zeros(1, 8, 32),
            "decoder_input_ids": TOKENS[:1],
        },
        changes={
            **{"num_mel_bins": 8, "max_source_positions": 16},
            **{"max_target_positions": 2 * _LENGTH},
        },
    ),
}
"""Classes that users train, of every kind; ``untied`` has embeddings of its own."""


def names(num_models: int, *, seed: int) -> list[str]:
    """Choose models; all, if there are not more."""
    _library()
    chosen = Random(seed).sample(list(MODELS), min(num_models, len(MODELS)))
    return [name for name in MODELS if name in chosen]


def task_of_model(name: str, optimizer: str) -> Task:
    """Train a tiny model of a class."""
    tiny = MODELS[name]
    return Task(
        model_fn=partial(_built, name),
        loss_fn=logits_loss,
        optimizer_fn=OPTIMIZERS[optimizer],
        example_inputs=dict(tiny.inputs),
        example_targets=tiny.targets,
        units_fn=tiny.units_fn,
        max_boundary_tensors=tiny.max_boundary_tensors,
    )


def logits_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Compare the logits that a model returns with classes or tokens."""
    logits = outputs.logits if hasattr(outputs, "logits") else outputs["logits"]
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _built(name: str) -> nn.Module:
    tiny = MODELS[name]
    kind = getattr(_library(), name.partition(" ")[0])
    model: nn.Module = kind(kind.config_class(**{**tiny.options, **tiny.changes}))
    return model


@cache
def _library() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ExperimentError(
            "--library transformers needs it: pip install transformers"
        ) from error
