"""Server data: what a tenth of the examples is worth where the server has them.

Settings are those of the paper's code, made small: two shards a client, a fifth of the
clients in a round, a server with half of the classes. The test set is drawn from all
images, so that its writers are in the training set, too. Everybody has memory for
everything, so that the methods differ in what the server does and in nothing else.
"""

from dataclasses import replace

from simulations.experiments.experiment import Experiment
from simulations.experiments.partitions import Shards, WithServer
from simulations.fleets.presets import unlimited
from simulations.studies.study import Case, Study

METHODS = ("fedavg", "hybrid", "feddu", "feddu_holdout")
"""Without any momentum."""

MOMENTUM_METHODS = (
    *("fedavg", "fedavgm", "hybrid", "feddu", "feddu_momentum", "feddum", "feddumap"),
)
"""With momentum on the devices, and some with momentum on the server, too."""

DIGITS = Experiment(
    name="server_data",
    data="digits_mixed",
    methods=METHODS,
    fleet=unlimited,
    partition=WithServer(clients=Shards(2), fraction=0.1, num_classes=5),
    num_clients=50,
    num_rounds=24,
    fraction_train=0.2,
    local_epochs=2,
    batch_size=10,
    learning_rate=0.05,
    momentum=0.0,
    share_labels=True,
)
CIFAR = replace(
    DIGITS,
    data="cifar10",
    methods=MOMENTUM_METHODS,
    num_clients=100,
    num_rounds=200,
    fraction_train=0.1,
    local_epochs=5,
    learning_rate=0.01,
    momentum=0.9,
    max_train_examples=20000,
    max_test_examples=4000,
)

CLAIM = (
    "feddu should be above fedavg in every seed, most so in the first rounds. hybrid "
    "has the same data and counts them in each round, feddu less and less: which of "
    "them ends above the other is what there is to see."
)
MOMENTUM_CLAIM = (
    "feddu_momentum should be above fedavgm, which has no data, and above fedavg "
    "without momentum on the devices. feddumap is feddu_momentum that is pruned after "
    "a third of the rounds: its rounds are shorter from then on. feddum, as published, "
    "averages the changes and lags behind them, so that it should need more rounds."
)


def server_data_cases(is_small: bool) -> tuple[Case, ...]:
    """Return the cases: digits, and CIFAR-10 if it may take hours."""
    plain = Case(
        name="digits",
        title="digits, 10 of 50 clients with 2 shards each",
        claim=CLAIM,
        experiment=DIGITS,
        num_seeds=3,
        target_accuracy=0.9,
    )
    momentum = replace(
        plain,
        name="digits_momentum",
        title="the same with momentum 0.9 on the devices",
        claim=MOMENTUM_CLAIM,
        experiment=replace(
            DIGITS, methods=MOMENTUM_METHODS, learning_rate=0.01, momentum=0.9
        ),
    )
    cifar = replace(
        momentum,
        name="cifar10",
        title="CIFAR-10, 10 of 100 clients with 2 shards each",
        experiment=CIFAR,
        target_accuracy=0.4,
    )
    return (plain, momentum) if is_small else (plain, momentum, cifar)


SERVER_DATA = Study(
    name="server_data",
    summary="What the server's own data add: FedDU, momentum, pruning, Hybrid-FL.",
    cases_fn=server_data_cases,
    claims=("server", "accuracy", "classes", "traffic", "time"),
    cost="Small: about 6 minutes on 2 idle cores; in full: 8 CPU-hours, an estimate.",
)
