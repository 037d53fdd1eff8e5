"""FedRolex: weak devices train a slice of the channels that moves on in each round.

As ``heterofl_widths``, but the slice begins one channel later in each round, in every
layer alike, as in the authors' code. Their clients count alike; here each counts by its
number of examples.

References
----------
Alam, Liu, Yan, Zhang: FedRolex: Model-Heterogeneous Federated Learning with Rolling
Sub-Model Extraction. NeurIPS 2022. arXiv:2212.01548.
"""

from functools import partial

from simulations.methods.heterofl_widths import width_strategy
from simulations.methods.method import Method

FEDROLEX = Method(
    name="fedrolex",
    summary="weak devices train a slice of the channels, another one each round",
    strategy_fn=partial(width_strategy, roll=True),
)
