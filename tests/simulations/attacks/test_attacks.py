"""The attacks find what is there to be found, and nothing where there is nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from flwr_smartsplit import Defence, Route
from simulations.__main__ import app
from simulations.attacks.hijacking import Hijacker
from simulations.attacks.inversion import Likeness, inverted, structural_similarity
from simulations.attacks.labels import guessed
from simulations.attacks.reports import ATTACKS, CHECK, MEAN, report_of
from simulations.attacks.suite import figures
from simulations.attacks.victims import KINDS, Victim
from simulations.studies.measurement import Row
from simulations.studies.quickstart import quickstart


def smooth_images(num: int) -> torch.Tensor:
    """Draw images from four numbers each, so that a decoder can learn them."""
    basis = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    images = (torch.randn(num, 4) @ basis).sigmoid()
    return images.view(num, 1, 8, 8)


def test_inversion_needs_pairs_that_belong_together() -> None:
    """It succeeds on a linear boundary, and not if the pairs are mixed up."""
    torch.manual_seed(0)
    own, known = smooth_images(50), smooth_images(400)
    mix = torch.randn(64, 32) / 8
    codes = known.flatten(1) @ mix
    made = inverted(own.flatten(1) @ mix, (codes, known), num_steps=300, seed=0)
    good = Likeness.of(made, own)
    mixed = known[torch.randperm(400)]
    wrong = inverted(own.flatten(1) @ mix, (codes, mixed), num_steps=300, seed=0)
    bad = Likeness.of(wrong, own)
    assert good.ssim > 0.9
    assert bad.ssim < 0.5
    assert good.mse < bad.mse / 4
    assert good.psnr > bad.psnr + 6


def test_likeness_is_1_for_equals_and_0_for_strangers() -> None:
    """SSIM of an image with itself, with noise, and with its negative."""
    image = torch.rand(8, 1, 16, 16)
    assert structural_similarity(image, image) == pytest.approx(1)
    assert abs(structural_similarity(image, torch.rand(8, 1, 16, 16))) < 0.2
    assert structural_similarity(image, 1 - image) < -0.8


def test_labels_are_guessed_from_directions_alone() -> None:
    """Gradients of a linear classifier tell all; random rows tell chance."""
    torch.manual_seed(0)
    rows = torch.randn(300, 12, requires_grad=True)
    classes = torch.randint(0, 10, (300,))
    F.cross_entropy(rows @ torch.randn(12, 10), classes).backward()
    assert rows.grad is not None
    assert guessed(rows.grad, classes) > 0.9
    assert guessed(torch.randn(300, 12), classes) < 0.25


def test_a_hijacker_pulls_boundaries_towards_its_codes() -> None:
    """Free boundaries that follow its gradients become what its decoder inverts."""
    torch.manual_seed(0)
    images = smooth_images(200)
    hijacker = Hijacker(images, 16, seed=0)
    boundary = torch.randn(32, 16) + 3

    def realism() -> float:
        return hijacker._judge(boundary).mean().item()

    for _ in range(60):
        hijacker(boundary)
    before = realism()
    for _ in range(300):
        boundary = boundary - 4 * hijacker(boundary)
    assert realism() > before + 0.5
    assert hijacker.invert(boundary).shape == (32, 1, 8, 8)


def test_a_victim_trains_and_its_defence_shows() -> None:
    """One epoch learns something; strong noise hides it."""
    victim = Victim.of(quickstart(), seed=0)
    few = replace(victim, own=replace(victim.own, images=victim.own.images[:320]))
    few = replace(few, own=replace(few.own, classes=victim.own.classes[:320]))
    state = dict(few.train(Route.whole(), epochs=2).state)
    assert few.accuracy(state) > 0.5
    noisy = few.defended(Defence(after="pool2", clip=1.0, noise=5.0))
    assert noisy.accuracy(state) < 0.4
    assert noisy.cut_after("pool2") == few.cut_after("pool2") + 1
    assert set(KINDS) >= {"batch norm", "frozen front", "micro-batches"}


def made_rows() -> list[Row]:
    """Make the rows of a small run."""
    like = {"mse": 0.01, "psnr": 20.0, "ssim": 0.9}
    image = [[[0, 255], [255, 0]]] * 6
    attack = {"part": ATTACKS, "num_values": 4, "accuracy": 0.9, "epsilon": None}
    attack |= {"inversion": like, "hijacking": like, "shown": image}
    attack |= {"labels_by_gradient": 0.5, "labels_by_boundary": 0.5}
    check = {"part": CHECK, "kind": "as it is", "honest": 3, "accused": 0}
    check |= {"hijacking": 3, "noticed": 3, "noticed_after": 8}
    return [
        {"key": "m", "part": MEAN, "inversion": like, "shown": image},
        {"key": "c", **check},
        *({"key": cut, **attack, "cut": cut, "defence": "none"} for cut in "ab"),
        {"key": "an", **attack, "cut": "a", "defence": "noise 1", "epsilon": 3.0},
    ]


def test_a_report_says_who_was_accused() -> None:
    """An honest edge that is accused fails the run."""
    rows = made_rows()
    report = report_of(rows)
    assert report.headline.startswith("leakage: 3 of 3 hijackers were noticed, 0 of 3")
    assert all(section.picture for section in report.sections[1:])
    assert report.problems == []
    rows[1]["accused"] = 1
    assert report_of(rows).problems == ["1 honest edges were accused"]
    assert report_of([]).sections == []
    assert "shown" not in figures(rows)["m"]


@pytest.mark.slow
def test_the_suite_runs_small(tmp_path: Path) -> None:
    """Inversion beats the mean image; noise makes it worse; hijackers are noticed."""
    command = ["run", "leakage", "--small", "--json", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = {
        row["key"]: row
        for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    }
    mean, none, noise = (
        rows[key]["inversion"]["ssim"]
        for key in ("mean image", "attacks: pool2, none", "attacks: pool2, noise 0.1")
    )
    assert none > 0.9 > noise
    assert none > mean + 0.2
    check = rows["check: as it is"]
    assert (check["accused"], check["noticed"]) == (0, check["hijacking"])
