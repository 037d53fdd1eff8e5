"""The shape of the house: who imports whom, how large a room is, what is public.

Each rule is a function from (module, source) to a list of problems, so that a planted
violation can prove that the rule sees one.
"""

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import flwr_smartsplit

ROOT = Path(__file__).parents[1]
PACKAGE = "flwr_smartsplit"
PUBLIC_NAMES = [
    "AdaptiveWidths",
    "AsyncSmartSplit",
    "BFloat16",
    "Chain",
    "Checkpoints",
    "ClientOutcome",
    "CodecRequest",
    "Constraints",
    "DeadlineWidths",
    "Defence",
    "DeviceTraits",
    "DynamicStaleness",
    "Float16",
    "GatePhase",
    "GrpcEdge",
    "HessianRate",
    "HybridFL",
    "Integer",
    "LegacySmartSplit",
    "Link",
    "MemoryBudget",
    "Momentum",
    "Movement",
    "Offer",
    "Packed",
    "Planning",
    "PolynomialStaleness",
    "Prediction",
    "Predictor",
    "Progressive",
    "PruneAt",
    "PruneSchedule",
    "Raw",
    "RayEdge",
    "RecomputePlan",
    "RoundOutcome",
    "Route",
    "RouteRequest",
    "SelectByUtility",
    "Selection",
    "SelectionRequest",
    "ServerData",
    "Serving",
    "SmartSplit",
    "SmartSplitNumPyClient",
    "StragglerAdvisor",
    "Task",
    "TopK",
    "Unit",
    "Variant",
    "VariantRequest",
    "Whole",
    "Widths",
    "build_client_app",
    "codec_by_rate",
    "cut_at_gate",
    "deepest_split",
    "deepest_u_shape",
    "first_that_fits",
    "gated",
    "grown",
    "measured_seconds",
    "memory_cap",
    "narrowed",
    "plan_recompute",
    "predicted_peak_bytes",
    "profile_chain",
    "proximal",
    "select_at_random",
    "with_crossing",
]

# One folder, one job. A folder imports itself and those before it, never one after it.
ORDER = (
    "errors",
    "types",
    "loss_terms",
    "defence",
    "gates",
    "task",
    "memory",
    "split",
    "task_digest",
    "train",
    "profile",
    "plan",
    "edge",
    "device",
    "server",
    "serve",
    "verify",
    "flower",
    "cli",
    "__init__",
    "__main__",
)
ONLY_IN = {
    "flwr": "flower/",
    "ray": "edge/hosts/ray.py",
    "grpc": "edge/hosts/grpc.py",
}
TYPING_ONLY = {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
OUTSIDE = ("simulations", "examples", "tests")

STANDARD = sys.stdlib_module_names
PURE = {
    "errors": (frozenset[str](), "nothing"),
    "types": (STANDARD | {"numpy"}, "the standard library and numpy"),
    "task": (STANDARD | {"numpy"}, "the standard library and numpy"),
    "plan": (STANDARD | {"numpy"}, "the standard library and numpy"),
}

MAX_FUNCTION_LINES = 40
MAX_FILE_LINES = 500
MAX_FOLDER_FILES = 13
REASON = re.compile(r"\s*# longer than 40 lines because \S")

STRAY_CHANCE = re.compile(
    r"(numpy\.)?random\."
    r"(?!(Random|Generator|BitGenerator|SeedSequence|PCG64|Philox|default_rng)$)\w+"
)
LOOKS_AT_CHANCE = {"split/python_state.py", "split/template.py"}
"""They compare the generators' states before and after user code, and restore them."""
STRAY_TIME = re.compile(r"time\.time(_ns)?|datetime\.(datetime|date)\.(now|today)")


def imported_names(node: ast.AST, module: str) -> list[str]:
    """Spell out in full what an import statement or a literal import call names."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=base, names=names, level=level):
            folders = [PACKAGE, *Path(module).parts[:-1]]
            anchor = folders[: len(folders) - level + 1] if level else []
            stem = ".".join([*anchor, *([base] if base else [])])
            return [f"{stem}.{alias.name}" for alias in names]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__")
            | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def imports(
    node: ast.AST, module: str, typing: bool = False
) -> Iterator[tuple[str, bool]]:
    """Yield (full name, is for the type checker only) of all imports, however deep."""
    yield from ((name, typing) for name in imported_names(node, module))
    guarded: list[ast.stmt] = []
    if isinstance(node, ast.If) and ast.unparse(node.test) in TYPING_ONLY:
        guarded = node.body
    for child in ast.iter_child_nodes(node):
        yield from imports(child, module, typing or child in guarded)


def room_of(dotted: str) -> str:
    """Name the room that ``flwr_smartsplit.model.chain.Chain`` is imported from."""
    first = [*dotted.split("."), "__init__"][1]
    return first if first in ORDER else "__init__"


def inner_problem(room: str, target: str) -> str | None:
    """Say why one room of the package may not import another."""
    if room == "plan" and target not in {"plan", "types", "errors"}:
        return "plan/ decides on values alone: it imports types/ and errors only"
    if ORDER.index(target) > ORDER.index(room):
        return f"{target} stands above it in the order of the house"
    return None


def outer_problem(module: str, room: str, top: str, typing: bool) -> str | None:
    """Say why a module may not import a package that is not ours."""
    if top in OUTSIDE:
        return "the package imports none of " + ", ".join(OUTSIDE)
    if not module.startswith(ONLY_IN.get(top, "")):
        return f"only {ONLY_IN[top]} may"
    if (room, top, typing) == ("task", "torch", True):
        return None
    allowed, in_words = PURE.get(room, ({top}, ""))
    return None if top in allowed | {"__future__"} else f"it may import {in_words}"


def import_problems(module: str, source: str) -> list[str]:
    """List the imports of ``module``, a path below the package, that break the plan."""
    room = Path(module).parts[0].removesuffix(".py")
    if room not in ORDER:
        return [f"{module} has no place in the house plan"]
    problems = []
    for name, typing in imports(parsed(source), module):
        top = name.split(".")[0]
        if top == PACKAGE:
            top = f"{PACKAGE}.{room_of(name)}".removesuffix(".__init__")
            reason = inner_problem(room, room_of(name))
        else:
            reason = outer_problem(module, room, top, typing)
        if reason:
            problems.append(f"{module} imports {top}; {reason}")
    return list(dict.fromkeys(problems))


@cache
def parsed(source: str) -> ast.Module:
    """Parse a module once for all rules; no rule changes the tree."""
    return ast.parse(source)


# --- how large a room is --------------------------------------------------------------


def docstring_lines(tree: ast.Module) -> set[int]:
    """Collect the lines of strings that stand alone as a statement."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines.update(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def code_lines(source: str) -> set[int]:
    """Collect the lines that hold code: no docstring, no blank, no comment alone."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT and token.string.strip():
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(parsed(source))


def size_problems(module: str, source: str) -> list[str]:
    """List the file and the functions that are larger than the house allows."""
    text, code, problems = source.splitlines(), code_lines(source), []
    if len(text) > MAX_FILE_LINES:
        problems.append(f"{module} has {len(text)} lines of {MAX_FILE_LINES} allowed")
    for node in ast.walk(parsed(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        size = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        has_reason = any(map(REASON.match, text[max(start - 2, 0) : node.lineno - 1]))
        if size > MAX_FUNCTION_LINES and not has_reason:
            problems.append(
                f"{module}:{node.lineno} {node.name} has {size} code lines of "
                f"{MAX_FUNCTION_LINES} allowed; split it, or write on the line above "
                "'# longer than 40 lines because ...'"
            )
    return problems


def folder_problems(modules: list[str]) -> list[str]:
    """List the folders that hold more files than the house allows."""
    files = Counter(str(Path(m).parent) for m in modules if not m.endswith("__.py"))
    return [
        f"{folder} has {count} files of {MAX_FOLDER_FILES} allowed"
        for folder, count in sorted(files.items())
        if count > MAX_FOLDER_FILES
    ]


# --- chance and time are passed in ----------------------------------------------------


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """Spell ``np.random.rand`` as ``numpy.random.rand``, given what ``np`` is."""
    match node:
        case ast.Name(id=name):
            return names.get(name, "")
        case ast.Attribute(value=value, attr=attr):
            return f"{full_name(value, names)}.{attr}"
    return ""


def local_names(tree: ast.Module) -> dict[str, str]:
    """Map each name that an absolute import binds to what it stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def chance_and_time_problems(module: str, source: str) -> list[str]:
    """List what draws from a generator, or reads a clock, that nobody passed in."""
    if module in LOOKS_AT_CHANCE:
        return []
    tree = parsed(source)
    names = local_names(tree)
    found = {"random"} & set(names.values())
    for node in ast.walk(tree):
        name = full_name(node, names)
        if STRAY_CHANCE.fullmatch(name):
            found.add(name)
        if isinstance(node, ast.Call):
            called = full_name(node.func, names)
            unseeded = called == "numpy.random.default_rng" and not node.args
            if STRAY_TIME.fullmatch(called) or unseeded:
                found.add(f"{called}()")
    return [f"{module} uses {name}; pass rng or clock in" for name in sorted(found)]


# --- the rules, on the code as it is --------------------------------------------------


def sources(folder: str) -> list[tuple[str, str]]:
    """Read every module below a folder, or skip the test if the folder is not there."""
    top = ROOT / folder
    if not top.is_dir():
        pytest.skip(f"{folder}/ has no content yet")
    paths = sorted(top.rglob("*.py"))
    return [
        (path.relative_to(top).as_posix(), path.read_text("utf-8")) for path in paths
    ]


@pytest.mark.parametrize(
    ("rule", "folder"),
    [
        (import_problems, PACKAGE),
        (size_problems, PACKAGE),
        (size_problems, "simulations"),
        (chance_and_time_problems, PACKAGE),
    ],
)
def test_no_module_breaks_the_rule(rule, folder):
    modules = sources(folder)
    assert modules
    problems = [problem for module in modules for problem in rule(*module)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("folder", [PACKAGE, "simulations"])
def test_no_folder_overflows(folder):
    problems = folder_problems([module for module, _ in sources(folder)])
    assert not problems, "\n".join(problems)


# --- each rule sees a planted violation -----------------------------------------------

PLANTED = {
    "flwr": ("plan/routes.py", "import flwr", "imports flwr; only flower/ may"),
    "in a function": ("cli.py", "def f():\n    import flwr.app", "only flower/ may"),
    "dynamic": ("edge/a.py", "import_module('flwr')", "only flower/ may"),
    "for types": ("split/a.py", "if TYPE_CHECKING:\n    import flwr", "only flower/"),
    "ray": ("flower/a.py", "from ray import get, put", "only edge/hosts/ray.py may"),
    "grpc": ("edge/hosts/ray.py", "import grpc", "only edge/hosts/grpc.py may"),
    "sklearn": ("plan/a.py", "import sklearn", "it may import the standard"),
    "torch in plan": ("plan/a.py", "import torch", "it may import the standard"),
    "torch in types": ("types.py", "import torch", "it may import the standard"),
    "torch in task": ("task.py", "import torch", "it may import the standard"),
    "else": ("task.py", "if TYPE_CHECKING: 0\nelse: import torch", "it may import"),
    "if not": ("task.py", "if not TYPE_CHECKING: import torch", "it may import"),
    "errors": ("errors.py", "import typing", "it may import nothing"),
    "up": ("edge/a.py", f"import {PACKAGE}.flower.a", "flower stands above it"),
    "up, relative": ("split/a.py", "from ..train.a import b", "train stands above"),
    "up, by name": ("device/a.py", "from .. import server", "server stands above it"),
    "up, deep": ("split/trace/a.py", "from ...profile import a", "profile stands"),
    "to the door": ("flower/a.py", f"from {PACKAGE} import Chain", "stands above it"),
    "types to plan": ("types.py", f"from {PACKAGE}.plan import a", "plan stands above"),
    "errors to types": ("errors.py", "from .types import Route", "types stands above"),
    "plan to split": ("plan/a.py", "from ..split import chain", "on values alone"),
    "simulations": ("cli.py", "from simulations import a", "imports none of"),
    "examples": ("flower/a.py", "import examples.a", "imports none of"),
    "tests": ("split/a.py", "import tests.oracle", "imports none of"),
    "new room": ("utils.py", "", "has no place in the house plan"),
}


@pytest.mark.parametrize(("module", "source", "problem"), PLANTED.values(), ids=PLANTED)
def test_a_forbidden_import_is_seen_once_and_named(module, source, problem):
    (found,) = import_problems(module, source)
    assert found.startswith(module)
    assert problem in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("__init__.py", f"from {PACKAGE}.flower.strategy import SmartSplit"),
        ("cli.py", f"from {PACKAGE}.verify.equivalence import RouteChecker"),
        ("flower/a.py", "import flwr\nfrom . import serde\nfrom ..device import a"),
        ("edge/hosts/ray.py", "import ray, torch\nfrom ..weighted_mean import a"),
        ("edge/hosts/grpc.py", "import grpc\nfrom ... import split, plan"),
        ("plan/selection/a.py", "import numpy\nfrom ...types import Route"),
        ("task.py", "if typing.TYPE_CHECKING:\n    import torch\nfrom . import types"),
        ("errors.py", "from __future__ import annotations"),
    ],
)
def test_an_allowed_import_is_not_a_problem(module, source):
    assert import_problems(module, source) == []


def function_of(num_lines: int) -> str:
    """Write a function of so many code lines, dressed in lines that do not count."""
    dress = '    """Say.\n\n    More.\n    """\n\n    # why\n'
    body = "    text = '''\n# a string, not a comment\n'''\n" + "    x = 1\n" * 36
    return f"@final\ndef f():\n{dress}{body}" + "    x = 2\n" * (num_lines - 40)


def test_a_function_may_have_40_code_lines_and_not_41():
    assert size_problems("a.py", function_of(40)) == []
    (found,) = size_problems("a.py", function_of(41))
    assert found.startswith("a.py:2 f has 41 code lines of 40 allowed")


def test_a_longer_function_needs_a_reason_and_not_only_the_words():
    words = "# longer than 40 lines because"
    assert size_problems("a.py", f"{words} it is a table\n{function_of(41)}") == []
    assert len(size_problems("a.py", f"{words}\n{function_of(41)}")) == 1


def test_a_file_may_have_500_lines_and_not_501():
    assert size_problems("a.py", "x = 1\n" * 500) == []
    (found,) = size_problems("a.py", "x = 1\n" * 501)
    assert found == "a.py has 501 lines of 500 allowed"


def test_a_folder_may_have_13_files_and_not_14():
    modules = ["plan/__init__.py", *(f"plan/{name}.py" for name in "abcdefghijklm")]
    assert folder_problems(modules) == []
    (found,) = folder_problems([*modules, "plan/n.py", "plan/deeper/a.py"])
    assert found == "plan has 14 files of 13 allowed"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import random", "random"),
        ("from random import sample\nsample([1], 1)", "random.sample"),
        ("import numpy as np\nnp.random.rand(3)", "numpy.random.rand"),
        ("from numpy import random\nrandom.seed(0)", "numpy.random.seed"),
        ("import numpy as np\nnp.random.default_rng()", "numpy.random.default_rng()"),
        ("import time\nnow = time.time()", "time.time()"),
        ("from time import time as now\nnow()", "time.time()"),
        ("import datetime as d\nd.datetime.now()", "datetime.datetime.now()"),
    ],
)
def test_chance_or_time_from_nowhere_is_seen_once_and_named(source, name):
    (found,) = chance_and_time_problems("plan/a.py", source)
    assert found == f"plan/a.py uses {name}; pass rng or clock in"


def test_chance_and_time_that_are_passed_in_are_not_a_problem():
    source = """
        from random import Random
        import numpy as np, time
        def f(rng: Random, numbers: np.random.Generator, clock=time.time):
            return np.random.default_rng(rng.random()).random(), clock()
    """
    assert chance_and_time_problems("plan/a.py", inspect.cleandoc(source)) == []


def heavy_modules_loaded_by(statement: str, folder: Path) -> list[str]:
    """Run a statement in a fresh interpreter; say what heavy it loaded."""
    show = "import sys; print(*sorted({'ray', 'flwr', 'grpc'} & set(sys.modules)))"
    command = [sys.executable, "-c", f"{statement}; {show}"]
    return subprocess.check_output(command, cwd=folder, text=True).split()


def test_importing_the_package_loads_neither_ray_nor_flwr():
    assert heavy_modules_loaded_by(f"import {PACKAGE}", ROOT) == []


def test_a_device_without_a_split_needs_no_ray():
    """Describing an edge is not reaching it; each Flower message is a new process."""
    made = f"from {PACKAGE} import GrpcEdge, RayEdge; RayEdge().profile, GrpcEdge()"
    assert heavy_modules_loaded_by(made, ROOT) == []


def test_a_package_that_loads_ray_would_be_seen(tmp_path):
    (tmp_path / "ray.py").touch()
    assert heavy_modules_loaded_by("import ray", tmp_path) == ["ray"]


def test_the_public_names_are_these_sorted_and_there():
    assert flwr_smartsplit.__all__ == PUBLIC_NAMES
    assert sorted(PUBLIC_NAMES) == PUBLIC_NAMES
    assert [name for name in PUBLIC_NAMES if not hasattr(flwr_smartsplit, name)] == []
