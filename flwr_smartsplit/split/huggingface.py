"""Units of Hugging Face's transformers, which torch.fx cannot trace.

A unit calls the library's own modules and mask functions, so its numbers are the stock
model's. The padding mask crosses each cut with the hidden state, as it is in the batch:
the library drops it where nothing is padded, which only its values can say. A model of
peft is listed like the model in it, under its own names.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from flwr_smartsplit.errors import NotSplittable
from flwr_smartsplit.split.segment import Unit

_OLDEST = 5  # Older mask functions take other arguments.


def encoder_units(model: nn.Module) -> list[Unit]:
    """List the units of a BERT-like model: embeddings, each layer, the head.

    Parameters
    ----------
    model : nn.Module
        A ``Bert...``, ``DistilBert...`` or ``Roberta...`` for masked tokens, or for the
        classification of sequences or tokens, or ``peft.get_peft_model(...)`` of one;
        its parameters may be on meta. A batch is ``input_ids`` alone, or a dict with
        ``attention_mask`` and ``token_type_ids``.

    Returns
    -------
    list[Unit]
        For ``Task(units_fn=encoder_units)``. The last returns ``logits`` as the model
        does.

    Raises
    ------
    NotSplittable, ImportError
        If the model or its configuration is not supported; if transformers is not
        installed, or too old.
    """
    return _listed(model, _ENCODERS, "encoder_units")


def decoder_units(model: nn.Module) -> list[Unit]:
    """List the units of a GPT-like model: embeddings, each layer, the head.

    Tied embeddings that are trained are on both sides of every cut: build the model
    with ``tie_word_embeddings=False``. Where they are frozen, as under LoRA, each place
    has its own. Set ``use_cache=False``, or each layer copies its keys and values, as
    the stock model does. Otherwise as ``encoder_units``.

    Parameters
    ----------
    model : nn.Module
        A ``GPT2LMHeadModel``, ``GPT2ForTokenClassification``, or a
        ``LlamaForCausalLM``, ``MistralForCausalLM``, ``Qwen2ForCausalLM`` or
        ``Qwen3ForCausalLM``, or ``peft.get_peft_model(...)`` of one; its parameters may
        be on meta. A batch is ``input_ids`` alone, or a dict with ``attention_mask``.
    """
    return _listed(model, _DECODERS, "decoder_units")


@dataclass(frozen=True, slots=True)
class _Parts:
    """Where a model keeps its parts, by module name.

    The first unit calls ``embed(root, input_ids, ...)`` and reads ``front``; each of
    ``layers`` is a unit and runs as ``run_layer(config, layer, hidden, *context)``; the
    last unit calls each step of ``head`` and returns the ``output`` class of
    ``transformers.modeling_outputs``.
    """

    embed: Callable[..., Any]
    front: tuple[str, ...]
    run_layer: Callable[..., Any]
    layers: str
    head: tuple[str | Callable[[Tensor], Tensor], ...]
    output: str


def _listed(model: nn.Module, table: Mapping[str, _Parts], caller: str) -> list[Unit]:
    prefix, inner = _without_peft(model)
    parts, config = _parts_of(inner, table, caller), cast(Any, inner.config)
    names = [f"{parts.layers}.{i}" for i in range(config.num_hidden_layers)]
    head = tuple(step for step in parts.head if isinstance(step, str))
    units = [
        Unit(parts.front[-1], parts.embed, parts.front),
        *(Unit(n, partial(_layer, parts.run_layer, config, n), (n,)) for n in names),
        Unit(head[-1], partial(_finish, parts.head, parts.output), head),
    ]
    return [_below(prefix, unit) for unit in units] if prefix else units


def _below(prefix: str, unit: Unit) -> Unit:
    """Have a unit find its model below a module of another one."""
    reads = tuple(f"{prefix}.{name}" for name in unit.reads)
    return Unit(f"{prefix}.{unit.name}", partial(_run_below, prefix, unit), reads)


def _run_below(
    prefix: str, unit: Unit, root: nn.Module, /, *args: Any, **kwargs: Any
) -> Any:
    return unit.forward(root.get_submodule(prefix), *args, **kwargs)


def _layer(
    run_layer: Callable[..., Any], config: Any, name: str, root: nn.Module, *values: Any
) -> Any:
    hidden = run_layer(config, root.get_submodule(name), *values)
    return hidden if len(values) == 1 else (hidden, *values[1:])


def _finish(
    head: tuple[str | Callable[[Tensor], Tensor], ...],
    output: str,
    root: nn.Module,
    hidden: Tensor,
    *context: Tensor,
) -> Any:
    del context
    for step in head:
        run = root.get_submodule(step) if isinstance(step, str) else step
        hidden = run(hidden)
    return getattr(_library("modeling_outputs"), output)(logits=hidden)


def _boundary(*values: Tensor | None) -> Any:
    """Drop the values that are None; return a single tensor as itself."""
    kept = tuple(value for value in values if value is not None)
    return kept if len(kept) > 1 else kept[0]


# --- BERT and its like ----------------------------------------------------------------


def _embed_bert(
    name: str,
    root: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    **others: Tensor,
) -> Any:
    hidden = root.get_submodule(name)(input_ids=input_ids, **others)
    return _boundary(hidden, attention_mask)


def _run_bert(
    config: Any, layer: nn.Module, hidden: Tensor, attention_mask: Tensor | None = None
) -> Any:
    make_mask = _library("masking_utils").create_bidirectional_mask
    return layer(hidden, make_mask(config, hidden, attention_mask))


def _first_token(hidden: Tensor) -> Tensor:
    return hidden[:, 0]


def _bert(body: str, layers: str) -> Callable[..., _Parts]:
    front = f"{body}.embeddings"
    embed = partial(_embed_bert, front)
    return partial(_Parts, embed, (front,), _run_bert, f"{body}.{layers}")


_BERT = _bert("bert", "encoder.layer")
_ROBERTA = _bert("roberta", "encoder.layer")
_DISTILBERT = _bert("distilbert", "transformer.layer")
_TOKENS = (("dropout", "classifier"), "TokenClassifierOutput")
_ENCODERS: Mapping[str, _Parts] = {
    "BertForMaskedLM": _BERT(("cls",), "MaskedLMOutput"),
    "BertForSequenceClassification": _BERT(
        ("bert.pooler", "dropout", "classifier"), "SequenceClassifierOutput"
    ),
    "BertForTokenClassification": _BERT(*_TOKENS),
    "DistilBertForMaskedLM": _DISTILBERT(
        ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
        "MaskedLMOutput",
    ),
    "DistilBertForSequenceClassification": _DISTILBERT(
        (_first_token, "pre_classifier", torch.relu, "dropout", "classifier"),
        "SequenceClassifierOutput",
    ),
    "DistilBertForTokenClassification": _DISTILBERT(*_TOKENS),
    "RobertaForMaskedLM": _ROBERTA(("lm_head",), "MaskedLMOutput"),
    "RobertaForSequenceClassification": _ROBERTA(
        ("classifier",), "SequenceClassifierOutput"
    ),
    "RobertaForTokenClassification": _ROBERTA(*_TOKENS),
}


# --- GPT-2, and LLaMA and its like ---------------------------------------------------


def _embed_gpt2(
    root: Any, input_ids: Tensor, *, attention_mask: Tensor | None = None
) -> Any:
    body = root.transformer
    hidden = body.wte(input_ids) + body.wpe(_positions(input_ids))
    return _boundary(body.drop(hidden), attention_mask)


def _run_gpt2(
    config: Any, layer: nn.Module, hidden: Tensor, attention_mask: Tensor | None = None
) -> Any:
    make_mask = _library("masking_utils").create_causal_mask
    mask = make_mask(config, hidden, attention_mask, None)
    return layer(hidden, attention_mask=mask, **_cache(config, layer))


def _embed_llama(
    root: Any, input_ids: Tensor, *, attention_mask: Tensor | None = None
) -> Any:
    hidden = root.model.embed_tokens(input_ids)
    cosines, sines = root.model.rotary_emb(hidden, position_ids=_positions(input_ids))
    return _boundary(hidden, cosines, sines, attention_mask)


def _never(config: Any, layer: nn.Module) -> bool:
    del config, layer
    return False


def _by_window(config: Any, layer: nn.Module) -> bool:
    del layer
    return config.sliding_window is not None


def _by_layer(config: Any, layer: Any) -> bool:
    is_sliding: bool = (
        config.layer_types[layer.self_attn.layer_idx] == "sliding_attention"
    )
    return is_sliding


def _run_llama(
    slides: Callable[[Any, nn.Module], bool],
    config: Any,
    layer: nn.Module,
    hidden: Tensor,
    *context: Tensor,
) -> Any:
    """Run a layer with rotary positions; ``slides`` says if its mask is a window."""
    attention_mask = context[2] if len(context) > 2 else None  # noqa: PLR2004
    masks = _library("masking_utils")
    make_mask = masks.create_causal_mask
    if slides(config, layer):
        make_mask = masks.create_sliding_window_causal_mask
    return layer(
        hidden,
        attention_mask=make_mask(config, hidden, attention_mask, None),
        position_embeddings=context[:2],
        **_cache(config, layer),
    )


def _positions(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)


def _cache(config: Any, layer: nn.Module) -> dict[str, Any]:
    """Make the cache of a stock model: it decides the layout of keys and values."""
    if not config.use_cache:
        return {}
    name = _cache_argument(type(layer).forward)
    return {name: _library("cache_utils").DynamicCache(config=config)}


@cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """Name a layer's argument for its cache, which transformers has renamed."""
    is_new = "cache" in inspect.signature(forward).parameters
    return "cache" if is_new else "past_key_values"


def _rotary(slides: Callable[[Any, nn.Module], bool]) -> _Parts:
    return _Parts(
        _embed_llama,
        ("model.embed_tokens", "model.rotary_emb"),
        partial(_run_llama, slides),
        "model.layers",
        ("model.norm", "lm_head"),
        "CausalLMOutputWithPast",
    )


_GPT2 = partial(
    _Parts,
    _embed_gpt2,
    ("transformer.wte", "transformer.wpe", "transformer.drop"),
    _run_gpt2,
    "transformer.h",
)
_DECODERS: Mapping[str, _Parts] = {
    "GPT2ForTokenClassification": _GPT2(
        ("transformer.ln_f", "dropout", "classifier"), "TokenClassifierOutput"
    ),
    "GPT2LMHeadModel": _GPT2(
        ("transformer.ln_f", "lm_head"), "CausalLMOutputWithCrossAttentions"
    ),
    "LlamaForCausalLM": _rotary(_never),
    "MistralForCausalLM": _rotary(_by_window),
    "Qwen2ForCausalLM": _rotary(_by_layer),
    "Qwen3ForCausalLM": _rotary(_by_layer),
}


# --- what is supported ----------------------------------------------------------------


def _parts_of(model: nn.Module, table: Mapping[str, _Parts], caller: str) -> _Parts:
    """Look a model's class up, or raise ``NotSplittable``.

    A subclass may run other code, so it is not supported.
    """
    library = _library()
    name = type(model).__name__
    if name not in table or getattr(library, name, None) is not type(model):
        raise NotSplittable(
            f"{caller} has no units for {name}: give it one of {', '.join(table)}, or "
            "list the units by hand, with Task(units_fn=...)."
        )
    if caller == "encoder_units" and getattr(model.config, "is_decoder", False):
        raise _refused(model, "config.is_decoder is True")
    if getattr(model.config, "is_causal", None) is not None:
        raise _refused(model, "config.is_causal is set")
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise _refused(model, "gradient checkpointing is on")
    return table[name]


def units_advice(model: nn.Module) -> str:
    """Say how to list the units of a model that cannot be traced."""
    name, tables = type(model).__name__, {"encoder": _ENCODERS, "decoder": _DECODERS}
    found = [kind for kind, table in tables.items() if name in table]
    if found:
        return f"give Task(units_fn={found[0]}_units) of {__name__}"
    return "list its units by hand, with Chain.from_units and Task(units_fn=...)"


def _without_peft(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the model that a model of peft has its adapters in.

    ``NotSplittable`` is raised if its adapters are more than modules of that model.
    """
    if type(model).__module__.partition(".")[0] != "peft":
        return "", model
    tuner: Any = import_module("peft.tuners.tuners_utils").BaseTuner
    peft: Any = model
    configs = peft.peft_config.values()
    is_plain = isinstance(peft.base_model, tuner) and (
        type(peft.base_model).forward is tuner.forward
        and not any(getattr(each, "alora_invocation_tokens", None) for each in configs)
    )
    if not is_plain:
        kinds = ", ".join(sorted({type(each).__name__ for each in configs}))
        raise _refused(model, f"{kinds} adds to its forward (LoraConfig does not)")
    inner = peft.get_base_model()
    return next(n for n, module in model.named_modules() if module is inner), inner


def _refused(model: nn.Module, option: str) -> NotSplittable:
    return NotSplittable(
        f"{type(model).__name__} cannot be listed as units while {option}. Switch that "
        "off, or list the units by hand, with Task(units_fn=...)."
    )


def _library(part: str = "") -> Any:
    """Import a part of transformers, or raise ``ImportError``."""
    wanted = f'pip install "transformers>={_OLDEST}"'
    try:
        library = import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"the units of a Hugging Face model need transformers: {wanted}"
        ) from error
    version = library.__version__
    if int(version.split(".")[0]) < _OLDEST:
        raise ImportError(f"transformers {version} is too old: {wanted}")
    return import_module(f"transformers.{part}") if part else library
