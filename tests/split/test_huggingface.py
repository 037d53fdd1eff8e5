"""Hugging Face models as units: exact, with padding; or refused, and why."""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.profile.profile import profile_chain
from flwr_smartsplit.split import huggingface
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.huggingface import decoder_units, encoder_units
from flwr_smartsplit.split.template import parameters_on_meta
from flwr_smartsplit.types import Route
from flwr_smartsplit.verify.equivalence import RouteChecker
from tests.architectures import (
    BATCH_SIZE,
    TOKENS,
    Architecture,
    hugging_face,
    hugging_face_model,
    padded,
)
from tests.models import OPTIMIZERS

transformers = pytest.importorskip("transformers")

ENCODERS = tuple(huggingface._ENCODERS)
DECODERS = tuple(huggingface._DECODERS)
MASK = torch.ones_like(TOKENS)
MIXED = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 3,
    "use_sliding_window": True,
}
BATCHES = {
    "padded": None,
    "tokens alone": TOKENS,
    "dict without a mask": {"input_ids": TOKENS},
}


def check_routes(architecture: Architecture, routes: list[Route]) -> None:
    """Compare routes with the stock model, and their bytes with the prediction."""
    task = architecture.task(OPTIMIZERS["adam"])
    with RouteChecker(task, architecture.batches(task)) as checker:
        profile = profile_chain(checker.chain, batch_size=BATCH_SIZE, task=task)
        for route in routes:
            check = checker.check(route)
            assert check.differences == ()
            assert check.measured_peak_bytes == predicted_peak_bytes(profile, route)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "kind",
    [
        "RobertaForSequenceClassification",
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
    ],
)
def test_each_family_is_exact_when_cut_in_the_middle(kind):
    """Dropout, padding, gradients and bytes; the slow test below has all cuts of all.

    Others are in ``tests/test_architectures_exact.py``.
    """
    check_routes(hugging_face_model(kind), [Route.split(2)])


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_every_cut_of_every_supported_class_is_exact(kind, form, attention):
    """Whatever the batch has, and whichever attention is configured."""
    architecture = hugging_face_model(
        kind, inputs=BATCHES[form], attn_implementation=attention
    )
    check_routes(architecture, [Route.whole(), *map(Route.split, range(1, 4))])


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("BertForTokenClassification", {"attn_implementation": "eager"}),
        ("GPT2LMHeadModel", {"attn_implementation": "eager"}),
        ("GPT2LMHeadModel", {"use_cache": False, "attn_pdrop": 0.0}),
        ("LlamaForCausalLM", {"num_key_value_heads": 1, "use_cache": False}),
        ("MistralForCausalLM", {"sliding_window": 3}),
        ("Qwen2ForCausalLM", MIXED),
    ],
    ids=[
        *("eager bert", "eager gpt", "gpt without cache", "llama in groups"),
        *("mistral with a window", "qwen with two windows"),
    ],
)
def test_options_of_the_configuration_are_kept(kind, options):
    """A unit reads the configuration as the stock model does."""
    check_routes(hugging_face_model(kind, **options), [Route.split(2)])


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "inputs",
    [
        TOKENS,
        {"input_ids": TOKENS, "attention_mask": MASK, "token_type_ids": TOKENS % 2},
    ],
    ids=["tokens alone", "token types"],
)
def test_a_batch_may_have_more_or_less_than_a_mask(inputs):
    """A tensor is the tokens; token types reach the embeddings."""
    bert = hugging_face_model("BertForSequenceClassification", inputs=inputs)
    check_routes(bert, [Route.split(1)])


def deaf_units(model):
    """Drop the mask after the embeddings."""
    first, *others = encoder_units(model)

    def embed(root, input_ids, attention_mask):
        del attention_mask
        return first.forward(root, input_ids)

    return [replace(first, forward=embed), *others]


def test_units_that_lose_the_mask_would_be_seen():
    """The checker's batches are padded, so every loss and gradient is another."""
    bert = hugging_face_model("BertForSequenceClassification")
    task = replace(bert, units_fn=deaf_units).task(OPTIMIZERS["sgd"])
    with RouteChecker(task, bert.batches(task)) as checker:
        found = checker.check(Route.split(2)).differences
    assert any(line.startswith("loss ") for line in found)
    assert "gradient classifier.weight of step 0" in found


def test_a_mask_that_hides_nothing_costs_no_more_than_predicted():
    """Then the library makes none, which a prediction without values cannot know."""
    llama = hugging_face_model("LlamaForCausalLM")
    task = llama.task(OPTIMIZERS["sgd"])
    inputs = {"input_ids": TOKENS, "attention_mask": MASK}
    with RouteChecker(task, [(inputs, TOKENS), (inputs, TOKENS)]) as checker:
        profile = profile_chain(checker.chain, batch_size=len(TOKENS), task=task)
        for route in (Route.whole(), Route.split(2)):
            check = checker.check(route)
            assert check.differences == ()
            assert check.measured_peak_bytes < predicted_peak_bytes(profile, route)


def outputs_of(architecture: Architecture, inputs: dict[str, torch.Tensor]):
    """Run the stock model and the chain of its own units."""
    model = architecture.model_fn().eval()
    chain = Chain.from_units(model, architecture.units_fn(model), inputs)
    with torch.no_grad():
        return model(**inputs), chain.own_segment(0, len(chain)).eval()(inputs)


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_the_last_unit_returns_what_the_model_returns(kind):
    """The same class, by attribute, by name and by place."""
    inputs = padded({"input_ids": TOKENS.repeat(2, 1), "attention_mask": MASK})
    stock, found = outputs_of(hugging_face_model(kind, use_cache=False), inputs)
    assert type(found) is type(stock)
    assert torch.equal(found.logits, stock.logits)
    assert torch.equal(found["logits"], stock["logits"])
    assert torch.equal(found[0], stock[0])


def test_padding_is_hidden_by_every_unit():
    """What stands behind the padding changes no logit, but does without a mask."""
    bert = hugging_face_model("BertForSequenceClassification")
    ids = TOKENS.repeat(2, 1)
    inputs = padded({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    other = inputs | {"input_ids": ids}
    torch.manual_seed(1)
    _, first = outputs_of(bert, inputs)
    torch.manual_seed(1)
    _, second = outputs_of(bert, other)
    assert torch.equal(first.logits, second.logits)
    torch.manual_seed(1)
    _, bare = outputs_of(bert, {"input_ids": ids})
    assert not torch.equal(first.logits, bare.logits)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_units_hold_nothing_of_the_model_they_were_listed_for(kind):
    """A copied segment has its own modules, and its buffers outside the state."""
    task = hugging_face_model(kind).task(OPTIMIZERS["sgd"])
    with parameters_on_meta():
        model = task.model_fn()
    units = task.units_fn(model)
    held = [part for unit in units for part in parts_of(unit.forward)]
    assert not any(isinstance(part, nn.Module | torch.Tensor) for part in held)
    chain = build_chain(task)
    buffers = dict(chain.own_segment(0, 1).named_buffers())
    stock = dict(hugging_face_model(kind).model_fn().named_buffers())
    assert buffers.keys() == stock.keys()
    assert all(torch.equal(value, stock[name]) for name, value in buffers.items())


def parts_of(function):
    """List what a partial function has been given."""
    if not isinstance(function, partial):
        return []
    given = [*function.args, *function.keywords.values()]
    return [*given, *(part for value in given for part in parts_of(value))]


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units_fn", "known"), [(encoder_units, ENCODERS), (decoder_units, DECODERS)]
)
def test_another_class_is_refused_with_the_names_of_those_that_are_known(
    units_fn, known
):
    """So is a subclass, whose forward may be another."""

    class BertForMaskedLM(transformers.BertForMaskedLM):
        pass

    renamed = hugging_face("BertForMaskedLM", "BertConfig")
    renamed.__class__ = BertForMaskedLM
    for model in (nn.Linear(2, 2), renamed):
        with pytest.raises(NotSplittable) as refused:
            units_fn(model)
        text = str(refused.value)
        assert f"{units_fn.__name__} has no units for {type(model).__name__}" in text
        assert all(name in text for name in known)
        assert "Task(units_fn=...)" in text


@pytest.mark.parametrize(
    ("kind", "config", "options", "reason"),
    [
        ("BertForMaskedLM", "BertConfig", {"is_decoder": True}, "is_decoder is True"),
        ("GPT2LMHeadModel", "GPT2Config", {"is_causal": False}, "is_causal is set"),
    ],
)
def test_an_option_that_changes_the_forward_is_refused_by_name(
    kind, config, options, reason
):
    """The units would run other code than the stock model."""
    units_fn = encoder_units if "Bert" in kind else decoder_units
    with pytest.raises(NotSplittable, match=f"{kind} cannot .* while config.{reason}"):
        units_fn(hugging_face(kind, config, **options))


def test_gradient_checkpointing_is_refused():
    """It runs layers twice, which units do not know of."""
    model = hugging_face("GPT2LMHeadModel", "GPT2Config")
    model.transformer.h[1].gradient_checkpointing = True
    with pytest.raises(NotSplittable, match="while gradient checkpointing is on"):
        decoder_units(model)


def test_what_the_embeddings_do_not_take_is_named():
    """A batch with labels is refused with torch's or Python's own words."""
    inputs = {"input_ids": TOKENS, "labels": TOKENS}
    bert = hugging_face_model("BertForMaskedLM", inputs=inputs)
    with pytest.raises(InvalidTask, match=r"unit 'bert\.embeddings' .*'labels'"):
        build_chain(bert.task(OPTIMIZERS["sgd"]))


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GPT2LMHeadModel", "give Task(units_fn=decoder_units) of flwr_smartsplit"),
        ("LlamaForCausalLM", "give Task(units_fn=decoder_units) of flwr_smartsplit"),
    ],
)
def test_who_does_not_list_the_units_is_told_who_does(kind, advice):
    """These cannot be traced; the error names the function here that lists them."""
    task = hugging_face_model(kind).task(OPTIMIZERS["sgd"])
    with pytest.raises(NotSplittable) as caught:
        build_chain(replace(task, units_fn=None))
    assert advice in str(caught.value)


# --- transformers is optional ---------------------------------------------------------


def test_where_it_is_not_installed_the_error_says_how_to(monkeypatch):
    """Only who lists the units of such a model needs it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match='need transformers: pip install "transf'):
        encoder_units(nn.Linear(1, 1))


def test_a_version_that_is_too_old_is_named(monkeypatch):
    """Its mask functions would not understand how they are called."""
    old = SimpleNamespace(__version__="4.57.1")
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(ImportError, match=r"4\.57\.1 is too old: pip install"):
        decoder_units(nn.Linear(1, 1))
