"""What Python asks of a traced value: ``if x.dim() > 2``, ``*x.shape``, ``range(n)``.

torch.fx cannot follow that. What depends on shapes only is answered by a dry run of
what was traced so far, at two batch sizes; the trace follows the answer, and the model
checks at each step that it would be the same.
"""

import operator
from collections.abc import Callable
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
QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "len": len,
    "index": operator.index,
    "int": int,
    "float": float,
}
"""What Python asks, by names that can stand in the code of a graph."""


_OF_AUTOGRAD = {"grad", "grad_fn", "is_leaf", "requires_grad", "retains_grad"}


class Conditions:
    """Answer what a trace asks, by what its graph gives so far."""

    def __init__(self, model: nn.Module, inputs: Batch, graph: fx.Graph) -> None:
        self._model = model
        with _disable_current_modes():
            self._runs = [_Run(model, inputs, graph, size) for size in _BATCH_SIZES]

    def answer(self, question: str, node: fx.Node) -> Any:
        """Answer one of ``QUESTIONS`` about a value.

        Raises ``NotSplittable`` if shapes do not tell, or the batch size does.
        """
        name = type(self._model).__name__
        ask = QUESTIONS[question]
        does = "branch on" if question == "bool" else f"ask for {question}() of"
        if about := _about_autograd(node):
            raise NotSplittable(
                f"torch.fx cannot trace {name}: its forward must not {does} {about}: "
                "that is one thing in training and another in evaluation, and torch.fx "
                "follows one. Ask self.training, or list the model's units by hand, "
                "with Chain.from_units and Task(units_fn=...): it may be inside a unit."
            )
        try:
            # While fx traces, it would see the modules that run here.
            with _symbolic_trace._maybe_revert_all_patches(), _disable_current_modes():
                found = [ask(run.value_of(node)) for run in self._runs]
        except Exception as error:
            raise NotSplittable(
                f"torch.fx cannot trace {name}: its forward must not {does} the "
                f"values of tensors, and {node.name} does ({_first_line(error)}). "
                "Write it without that (torch.where for a branch), or list the "
                "model's units by hand, with Chain.from_units and Task(units_fn=...): "
                "it may be inside a unit."
            ) from error
        if len(set(found)) > 1:
            raise NotSplittable(
                f"torch.fx cannot trace {name}: its forward must not {does} the "
                f"size of the batch ({node.name}: {found[0]} for {_BATCH_SIZES[0]} "
                f"examples, {found[1]} for {_BATCH_SIZES[1]}). Write it without that, "
                "or list its units by hand with Task(units_fn=...)."
            )
        return found[0]


class _Run(fx.Interpreter):
    """A graph under fake tensors, run as far as it is known."""

    def __init__(
        self, model: nn.Module, inputs: Batch, graph: fx.Graph, batch_size: int
    ) -> None:
        self._mode, self._model = DryRun(), model
        root = fake_copy(model, self._mode)
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False  # Of generated code, which says nobody anything.
        batch = fake_batch(inputs, self._mode, batch_size=batch_size)
        self.args_iter = iter(tree_leaves(batch))

    def fetch_attr(self, target: str) -> Any:
        """Find a part of the model, or a constant that torch.fx has added since."""
        if hasattr(self._model, target) and not hasattr(self.module, target):
            constant = getattr(self._model, target)
            setattr(self.module, target, self._mode.from_tensor(constant))
        return super().fetch_attr(target)

    def value_of(self, node: fx.Node) -> Any:
        """Run the graph up to a node."""
        with self._mode, torch.no_grad():
            for each in self.graph.nodes:
                if each not in self.env:
                    self.env[each] = self.run_node(each)
        return self.env[node]


def check_answer(value: Any, question: str, expected: Any, text: str) -> None:
    """Raise ``InvalidTask`` if an answer is another one than in the trace."""
    if (found := QUESTIONS[question](value)) != expected:
        raise InvalidTask(
            f"forward asks for {question}({text}): for the task's example_inputs "
            f"that is {expected}, for this batch {found}. The model was read for the "
            "former: give example_inputs as your loader yields them, and batches of "
            "one kind."
        )


def _about_autograd(node: fx.Node) -> str:
    """Name what of autograd's record a value depends on; ``""`` if nothing."""
    left, seen = [node], {node}
    while left:
        each = left.pop()
        if each.target is getattr and each.args[1] in _OF_AUTOGRAD:
            return f"{each.args[0]}.{each.args[1]}"
        new = set(each.all_input_nodes) - seen
        seen |= new
        left += new
    return ""


def condition_text(node: fx.Node) -> str:
    """Write a condition as a user might have."""
    args = [f"{arg}" for arg in node.args]
    name = getattr(node.target, "__name__", str(node.target))
    return f"{name}({', '.join(args)})"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
