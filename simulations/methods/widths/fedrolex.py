"""FedRolex: weak devices train a slice of the channels that moves on in each round.

As ``heterofl_widths``, but the slice begins one channel later in each round, in every
layer alike. In the authors' code it begins one channel earlier, which is the same but
for the names of channels, and clients count alike; here by their number of examples.

References
----------
Alam, Liu, Yan, Zhang: FedRolex: Model-Heterogeneous Federated Learning with Rolling
Sub-Model Extraction. NeurIPS 2022. arXiv:2212.01548.
"""

from functools import partial

from simulations.methods.method import Method
from simulations.methods.widths.heterofl_widths import width_strategy

FEDROLEX = Method(
    name="fedrolex",
    summary="weak devices train a slice of the channels, another one each round",
    strategy_fn=partial(width_strategy, roll=True),
)
