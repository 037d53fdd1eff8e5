"""Hybrid-FL: the server trains on its own data as one client more, in every round.

References
----------
Yoshida, Nishio, Morikura, Yamamoto, Yonetani: Hybrid-FL for Wireless Networks:
Cooperative Learning Mechanism Using Non-IID Data. ICC 2020. arXiv:1905.07210.
"""

from flwr_smartsplit import HybridFL
from simulations.experiments.data import server_loader
from simulations.methods.server_steps.feddu import method_of

HYBRID = method_of(
    "hybrid",
    "fedavg, and the server's data are one client more",
    lambda experiment: (
        HybridFL(server_loader(experiment), epochs=experiment.local_epochs),
    ),
)
