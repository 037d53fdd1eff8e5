"""The versions that ``make install`` takes: named, plain, and enough."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text("utf-8")
# No address, no comment, and no local version: those no package index has.
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9]+(?:\.[a-z0-9]+)*")


def direct_requirements(extra: str) -> Iterator[Requirement]:
    """List what the package asks for by itself, with an extra of it."""
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                yield from direct_requirements(other)
        else:
            yield requirement


def problems_of(constraints: str) -> list[str]:
    """List what is wrong with the text of a constraints file."""
    lines = constraints.splitlines()
    problems = [f"not plain: {line}" for line in lines if not PLAIN.fullmatch(line)]
    pairs = [line.partition("==") for line in lines]
    names = [name.lower() for name, _, _ in pairs]
    if names != sorted(set(names)):
        problems.append("not sorted, or twice")
    versions = {canonicalize_name(name): version for name, _, version in pairs}
    for wanted in direct_requirements("dev"):
        version = versions.get(canonicalize_name(wanted.name))
        if version is None:
            problems.append(f"missing: {wanted.name}")
        elif not wanted.specifier.contains(version):
            problems.append(f"{wanted.name} {version} is not {wanted.specifier}")
    return problems


def test_constraints_are_plain_sorted_and_name_all_that_is_asked_for():
    assert problems_of(CONSTRAINTS) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: "a @ file:///a.whl\n" + text, "not plain: a @ file:///a.whl"),
        (lambda text: "--find-links x\n" + text, "not plain: --find-links x"),
        (lambda text: "a==1+cpu\n" + text, "not plain: a==1+cpu"),
        (lambda text: text + "\n", "not plain: "),
        (lambda text: text + "aaa==1\n", "not sorted, or twice"),
        (lambda text: text + text.splitlines()[-1], "not sorted, or twice"),
        (lambda text: re.sub("torch==.*\n", "", text, count=1), "missing: torch"),
        (
            lambda text: re.sub("flwr==.*\n", "flwr==1.39.0\n", text),
            "flwr 1.39.0 is not <1.43,>=1.40",
        ),
    ],
)
def test_a_file_of_another_form_is_refused(change, problem):
    assert problem in problems_of(change(CONSTRAINTS))
