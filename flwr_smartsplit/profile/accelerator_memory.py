"""What a step takes on CUDA beyond a dry run of the CPU's operators."""

from functools import partial

from torch import Tensor

from flwr_smartsplit.memory.meter import CUDA_BLOCK_BYTES
from flwr_smartsplit.profile.fake_step import DryStep
from flwr_smartsplit.profile.memory_trace import LoggingMeter
from flwr_smartsplit.profile.optimizer_memory import OptimizerCosts
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.task import Task
from flwr_smartsplit.train.optimizer_in_backward import stepped_in_backward

_COPIES_OF_A_BOUNDARY = 3  # Sent, received, and unpacked or packed


def accelerator_overhead(chain: Chain, *, batch_size: int, task: Task) -> int:
    """Bound the bytes that a step of any part of a chain takes more on CUDA.

    A plan's peak is predicted on the CPU, also on a server without a GPU. On CUDA,
    torch's allocator gives out blocks of 512 bytes, so each live storage may take 511
    bytes more; and torch's optimizers update all parameters at once (``foreach``), so
    their temporaries live together. Both are bounded by those of the whole chain.

    Not in it: what CUDA's kernels save in another form than the CPU's, and their
    workspaces, which no meter of tensors sees.
    """
    dry = DryStep(chain, batch_size=batch_size, task=task)
    sparse: set[str] = set()  # They are updated one by one there, too.

    def note(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.is_sparse:
            sparse.add(name)

    for name, parameter in dry.segment.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(note, name))
    for step in range(2):  # The first one makes the optimizer's state.
        dry.run(step)
    num_boundary = _COPIES_OF_A_BOUNDARY * task.max_boundary_tensors
    blocks = _most_storages(dry.meter) + num_boundary
    rounding_bytes = blocks * (CUDA_BLOCK_BYTES - 1)
    return rounding_bytes + _at_once_bytes(chain, dry, task, sparse)


def _most_storages(meter: LoggingMeter) -> int:
    """Count the most storages that were alive at once."""
    sizes: dict[int, int] = {}
    most = 0
    for birth, change in zip(meter.births, meter.changes, strict=True):
        sizes[birth] = sizes.get(birth, 0) + change
        if not sizes[birth]:
            del sizes[birth]
        most = max(most, len(sizes))
    return most


def _at_once_bytes(chain: Chain, dry: DryStep, task: Task, sparse: set[str]) -> int:
    """Size of the temporaries if all parameters that wait are updated at once."""
    named = chain.segment(0, len(chain)).named_parameters()
    trained = [p for name, p in named if p.requires_grad and name not in sparse]
    early = stepped_in_backward(trained) if dry.runner.steps_in_backward else []
    ids = {id(parameter) for parameter in early}
    late = [parameter for parameter in trained if id(parameter) not in ids]
    return OptimizerCosts(task, is_at_once=True).temporary_bytes_at_once(late)
