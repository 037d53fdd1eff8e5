"""HeteroFL: weak devices train a slice of each layer's channels.

The slices are nested: a width holds the first channels of every wider one. Each value
is averaged over the clients that hold it. Of the paper's three means for that:

* Scaler ("Heterogeneous Federated Learning", scaler): a slice's activations are
  multiplied by the inverse of its width after each convolution, in training only.
* Masked cross-entropy ("Experimental Results", masking for non-IID data): a client
  sets the scores of classes it has no example of to zero, and its rows of the
  classifier for them are left out of the mean. The server knows who has which classes.
* Static batch normalisation: not needed, since group normalisation keeps no statistics.
  A group has as many channels at every width, so a slice is normalised as in the whole
  network.

The paper's clients hold equally many examples and count alike. Here each counts by its
number of examples, as in FedAvg and in every other method of this folder, which is the
same where they are equal.

References
----------
Diao, Ding, Tarokh: HeteroFL: Computation and Communication Efficient Federated Learning
for Heterogeneous Clients. ICLR 2021. arXiv:2010.01264.
"""

from flwr.serverapp.strategy import Strategy

from simulations.experiments.data import load_images
from simulations.experiments.experiment import Experiment
from simulations.methods.method import Method, Setting
from simulations.methods.submodels.nested_rounds import (
    Ladder,
    NestedRounds,
    Variant,
    variant_of,
)
from simulations.methods.submodels.variants import WIDTH, local_labels, width_task

WIDTHS = (1.0, 0.5, 0.25, 0.125)
"""Shares of the channels: the paper's computation complexity levels a to d."""

CLASSIFIER = ("classify.weight", "classify.bias")


def width_variants(experiment: Experiment) -> tuple[Variant, ...]:
    """Work out the widths of the experiment's model and what they need."""
    every_label = tuple(range(load_images(experiment).num_classes))
    return tuple(
        variant_of(
            width_task(experiment, width, every_label),
            name=f"width {width:g}",
            config={WIDTH: width},
            batch_size=experiment.batch_size,
        )
        for width in WIDTHS
    )


def build_strategy(setting: Setting) -> Strategy:
    """Build the strategy that gives each client the widest slice it can hold."""
    labels = local_labels(setting.experiment)
    ladder = Ladder(
        variants=width_variants(setting.experiment),
        rows_fn=lambda key: dict.fromkeys(CLASSIFIER, labels[int(key)]),
    )
    return NestedRounds(ladder, setting)


HETEROFL = Method(
    name="heterofl",
    summary="weak devices train a slice of the channels",
    strategy_fn=build_strategy,
)
