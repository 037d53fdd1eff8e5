"""Conditions on shapes in a forward: ``assert x.shape[1] == 10``, ``if x.dim() > 2``.

torch.fx cannot follow a branch. One that depends on shapes only is decided by a dry run
of what was traced so far, at two batch sizes; the trace follows it, and the model
checks at each step that it would decide the same.
"""

from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from flwr_smartsplit.errors import InvalidTask, NotSplittable
from flwr_smartsplit.split.fake_tensors import DryRun, fake_batch, fake_copy
from flwr_smartsplit.split.segment import Batch

_BATCH_SIZES = (2, 3)  # A BatchNorm refuses to train on one.


class Conditions:
    """Decide the conditions that a trace meets, by what its graph gives so far."""

    def __init__(self, model: nn.Module, inputs: Batch, graph: fx.Graph) -> None:
        self._model = model
        with _disable_current_modes():
            self._runs = [_Run(model, inputs, graph, size) for size in _BATCH_SIZES]

    def decide(self, node: fx.Node) -> bool:
        """Say how a condition ends; raise ``NotSplittable`` if shapes do not tell."""
        name = type(self._model).__name__
        try:
            # While fx traces, it would see the modules that run here.
            with _symbolic_trace._maybe_revert_all_patches(), _disable_current_modes():
                found = [run.is_true(node) for run in self._runs]
        except Exception as error:
            raise NotSplittable(
                f"torch.fx cannot trace {name}: its forward must not branch on the "
                f"values of tensors, and {node.name} does ({_first_line(error)}). "
                "Write it without the branch (torch.where), or list the model's units "
                "by hand, with Chain.from_units and Task(units_fn=...): a branch may "
                "be inside a unit."
            ) from error
        if len(set(found)) > 1:
            raise NotSplittable(
                f"torch.fx cannot trace {name}: its forward branches on the size of "
                f"the batch ({node.name} is {found[0]} for {_BATCH_SIZES[0]} examples, "
                f"{found[1]} for {_BATCH_SIZES[1]}). Write it without that branch, or "
                "list its units by hand with Task(units_fn=...)."
            )
        return found[0]


class _Run(fx.Interpreter):
    """A graph under fake tensors, run as far as it is known."""

    def __init__(
        self, model: nn.Module, inputs: Batch, graph: fx.Graph, batch_size: int
    ) -> None:
        self._mode = DryRun()
        root = fake_copy(model, self._mode)
        super().__init__(root, garbage_collect_values=False, graph=graph)
        batch = fake_batch(inputs, self._mode, batch_size=batch_size)
        self.args_iter = iter(tree_leaves(batch))

    def is_true(self, node: fx.Node) -> bool:
        """Run the graph up to a node, and say whether its value is true."""
        with self._mode, torch.no_grad():
            for each in self.graph.nodes:
                if each not in self.env:
                    self.env[each] = self.run_node(each)
            return bool(self.env[node])


def check_condition(value: Any, expected: bool, text: str) -> None:
    """Raise ``InvalidTask`` if a condition ends otherwise than it did in the trace."""
    if bool(value) is not expected:
        raise InvalidTask(
            f"forward asks whether {text}: for the task's example_inputs that is "
            f"{expected}, for this batch {not expected}. The model was read for the "
            "former: give example_inputs as your loader yields them, and batches of "
            "one kind."
        )


def condition_text(node: fx.Node) -> str:
    """Write a condition as a user might have."""
    args = [f"{arg}" for arg in node.args]
    name = getattr(node.target, "__name__", str(node.target))
    return f"{name}({', '.join(args)})"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
