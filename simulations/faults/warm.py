"""What every process of a stage would do first, done once before they are forked.

Nothing here may go backward: PyTorch lets nobody do so again in a forked process.
"""

from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.task_digest.facts import all_facts
from simulations.faults import run, stage, task

all_facts(task.TASK, build_chain(task.TASK).model)
LOADED = run, stage
