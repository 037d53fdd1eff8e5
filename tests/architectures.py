"""Small models of every common kind, each with its task; importable, so edges can too.

The Hugging Face ones are built from configurations, so nothing is downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_smartsplit.split.huggingface import decoder_units, encoder_units
from flwr_smartsplit.task import Task
from flwr_smartsplit.verify.equivalence import Batches, example_batches
from tests.models import OptimizerFn

VOCABULARY, LENGTH, WIDTH, CLASSES = 50, 6, 16, 3
BATCH_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model and what it is trained on.

    Parameters
    ----------
    model_fn : Callable[[], nn.Module]
        Builds the model.
    inputs : Tensor, tuple[Tensor, ...] or dict[str, Tensor]
        Example inputs, from whose values batches are drawn.
    targets : Tensor
        Example targets.
    loss_fn : Callable
        Mean loss of a batch.
    num_units : int
        How many units its chain has; one if it must not be cut.
    units_fn : Callable, optional
        Lists its units.
    """

    model_fn: Callable[[], nn.Module]
    inputs: Any
    targets: Tensor
    loss_fn: Callable[..., Tensor]
    num_units: int
    units_fn: Callable[..., Any] | None = None

    def task(self, optimizer: OptimizerFn) -> Task:
        """Make the task of training it with one optimizer."""
        return Task(
            model_fn=self.model_fn,
            loss_fn=self.loss_fn,
            optimizer_fn=optimizer,
            example_inputs=self.inputs,
            example_targets=self.targets,
            units_fn=self.units_fn,
        )

    def batches(self, task: Task) -> Batches:
        """Draw two batches; where there is a mask, each example is padded."""
        drawn = example_batches(task, batch_size=BATCH_SIZE)[:2]
        return [(padded(inputs), targets) for inputs, targets in drawn]


def padded(inputs: Any) -> Any:
    """Pad one more token in each example than in the one before, if there is a mask."""
    if not isinstance(inputs, dict) or "attention_mask" not in inputs:
        return inputs
    batch_size, length = inputs["input_ids"].shape
    missing = torch.arange(batch_size)[:, None] % (length - 1)
    mask = (torch.arange(length)[None] < length - missing).long()
    return inputs | {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}


def tokens_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compare ``(batch, length, vocabulary)`` with the tokens ``(batch, length)``."""
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def logits_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Take the logits out of what a Hugging Face model returns."""
    logits = outputs.logits
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


TOKENS = torch.arange(1, VOCABULARY).repeat(2, 1)[:, :LENGTH]
LABELS = torch.arange(CLASSES).repeat(2)[:2]


# --- language models in plain torch ---------------------------------------------------


class CausalLayer(nn.Module):
    """A layer of attention to what came before; its mask is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = attention_layer()
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, src_mask=self.mask, is_causal=True)


def attention_layer() -> nn.Module:
    """Build a layer of attention to everything."""
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)


class LanguageModel(nn.Module):
    """Say a token at each place; GPT's with causal layers, else BERT's."""

    def __init__(self, layer_fn: Callable[[], nn.Module], *, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.layers = nn.Sequential(layer_fn(), layer_fn())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.tokens(x) + self.places)
        return self.head(self.norm(x))


def language_model(
    layer_fn: Callable[[], nn.Module], *, tied: bool, num_units: int
) -> Architecture:
    """Train a language model on the token at each place."""
    return Architecture(
        model_fn=partial(LanguageModel, layer_fn, tied=tied),
        inputs=TOKENS,
        targets=TOKENS,
        loss_fn=tokens_loss,
        num_units=num_units,
    )


# --- language models of Hugging Face --------------------------------------------------


def hugging_face(kind: str, config: str, **options: Any) -> nn.Module:
    """Build a small model of transformers."""
    library = import_module("transformers")
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 2 * LENGTH,
        "num_labels": CLASSES,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if config != "GPT2Config":
        sizes["intermediate_size"] = 2 * WIDTH
    if config[:4] in ("Mist", "Qwen"):
        sizes |= {"num_key_value_heads": 1, "head_dim": WIDTH // 2}
    model: nn.Module = getattr(library, kind)(
        getattr(library, config)(**sizes | options)
    )
    return model


def hugging_face_model(
    kind: str, *, inputs: Any = None, num_units: int = 4, **options: Any
) -> Architecture:
    """Train a model of transformers on padded batches, or on the given inputs."""
    family = kind[: kind.index("For")] if "For" in kind else "GPT2"
    if inputs is None:
        inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    targets = TOKENS
    if "Classification" in kind:
        targets = LABELS if "Sequence" in kind else TOKENS % CLASSES
    return Architecture(
        model_fn=partial(hugging_face, kind, f"{family}Config", **options),
        inputs=inputs,
        targets=targets,
        loss_fn=logits_loss,
        num_units=num_units,
        units_fn=encoder_units if "ert" in family else decoder_units,
    )


# --- other kinds ----------------------------------------------------------------------


class GRUClassifier(nn.Module):
    """Read tokens one after the other and classify what is left at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(self.tokens(x))
        return self.head(states[:, -1])


def signal_cnn() -> nn.Module:
    """Build a classifier of ``(batch, 2, 16)`` signals."""
    return nn.Sequential(
        nn.Conv1d(2, 8, 3, padding=1),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 8, 3, stride=2),
        nn.GELU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


class TwoInputs(nn.Module):
    """Read an image's and a table's features, which meet at once or late."""

    def __init__(self, *, meet_late: bool) -> None:
        super().__init__()
        self.meet_late = meet_late
        self.image = nn.Linear(8, WIDTH)
        self.table = nn.Linear(4, WIDTH)
        self.deep = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        x = self.image(image)
        if self.meet_late:
            return self.head(self.deep(x) + self.table(table))
        return self.head(self.deep(x + self.table(table)))


def two_inputs(*, meet_late: bool, by_name: bool, num_units: int) -> Architecture:
    """Train on two tensors, in a tuple or a dict."""
    image, table = torch.zeros(2, 8), torch.zeros(2, 4)
    return Architecture(
        model_fn=partial(TwoInputs, meet_late=meet_late),
        inputs={"image": image, "table": table} if by_name else (image, table),
        targets=LABELS,
        loss_fn=functional.cross_entropy,
        num_units=num_units,
    )


class Heads(NamedTuple):
    """What two heads say."""

    main: Tensor
    side: Tensor


class Auxiliary(nn.Module):
    """Have a second output, in a container of some form or in training only."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first = nn.Linear(8, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.main = nn.Linear(WIDTH, CLASSES)
        self.side = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = functional.gelu(self.middle(self.first(x).relu()))
        main = self.main(x)
        if self.form == "training" and not self.training:
            return main
        side = self.side(x)
        if self.form == "dict":
            return {"main": main, "side": side}
        return Heads(main, side) if self.form == "named" else (main, side)


def auxiliary_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Weigh the second output less."""
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    if isinstance(outputs, Heads):
        outputs = (outputs.main, outputs.side)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    losses = [functional.cross_entropy(output, targets) for output in outputs]
    return losses[0] if len(losses) == 1 else losses[0] + 0.4 * losses[1]


def auxiliary(form: str) -> Architecture:
    """Train a model with a second output."""
    return Architecture(
        model_fn=partial(Auxiliary, form),
        inputs=torch.zeros(2, 8),
        targets=LABELS,
        loss_fn=auxiliary_loss,
        num_units=5,
    )


class Segmentation(nn.Module):
    """Say for each pixel of ``(batch, 3, 8, 8)`` whether it belongs; go around once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.last = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.last(torch.cat([x, self.up(self.down(x).relu())], dim=1))


def autoencoder() -> nn.Module:
    """Build a model that gives its input back."""
    return nn.Sequential(
        nn.Linear(12, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
        nn.Linear(3, 8),
        nn.Tanh(),
        nn.Linear(8, 12),
    )


ARCHITECTURES: dict[str, Architecture] = {
    "bert": language_model(attention_layer, tied=False, num_units=6),
    "gpt": language_model(CausalLayer, tied=False, num_units=6),
    "gru": Architecture(
        model_fn=GRUClassifier,
        inputs=TOKENS,
        targets=LABELS,
        loss_fn=functional.cross_entropy,
        num_units=3,
    ),
    "1-d cnn": Architecture(
        model_fn=signal_cnn,
        inputs=torch.zeros(2, 2, 16),
        targets=LABELS,
        loss_fn=functional.cross_entropy,
        num_units=8,
    ),
    "two inputs, tuple": two_inputs(meet_late=False, by_name=False, num_units=4),
    "two inputs, dict": two_inputs(meet_late=False, by_name=True, num_units=4),
    "late input, tuple": two_inputs(meet_late=True, by_name=False, num_units=2),
    "late input, dict": two_inputs(meet_late=True, by_name=True, num_units=2),
    **{
        f"auxiliary {form}": auxiliary(form)
        for form in ("dict", "tuple", "named", "training")
    },
    "segmentation": Architecture(
        model_fn=Segmentation,
        inputs=torch.zeros(2, 3, 8, 8),
        targets=torch.arange(128.0).reshape(2, 1, 8, 8) % 2,
        loss_fn=functional.binary_cross_entropy_with_logits,
        num_units=5,
    ),
    "autoencoder": Architecture(
        model_fn=autoencoder,
        inputs=torch.zeros(2, 12),
        targets=torch.linspace(-1, 1, 24).reshape(2, 12),
        loss_fn=functional.mse_loss,
        num_units=6,
    ),
}
TIED = {
    "bert": language_model(attention_layer, tied=True, num_units=1),
    "gpt": language_model(CausalLayer, tied=True, num_units=1),
}
HUGGING_FACE = {
    "bert": hugging_face_model("BertForMaskedLM"),
    "bert classifier": hugging_face_model("BertForSequenceClassification"),
    "gpt": hugging_face_model("GPT2LMHeadModel"),
}
HUGGING_FACE_TIED = {
    "bert": hugging_face_model(
        "BertForMaskedLM", tie_word_embeddings=True, num_units=1
    ),
    "gpt": hugging_face_model("GPT2LMHeadModel", tie_word_embeddings=True, num_units=1),
}
