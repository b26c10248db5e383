"""The demo, shortened, on the shipped assets."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.commands.demo import PROXY, QUANTITIES, RECIPE, SHARPNESS, TRUTH, Measured, _verdict
from rsaft_fast.recipe.load import find_recipe, load_config
from rsaft_fast.report.sources import find_runs
from rsaft_fast.train.logging import read_metrics


def measured(proxy: list[float], truth: list[float], sharpness: list[float], spread: float = 0.0) -> Measured:
    """A run of four pictures with these means; `spread` between pictures."""
    curves = {PROXY: proxy, TRUTH: truth, SHARPNESS: sharpness}
    noise = spread * torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    scores = {name: [value + noise for value in values] for name, values in curves.items()}
    return Measured(steps=list(range(len(proxy))), scores=scores)


@pytest.mark.parametrize(
    ("plain", "smoothed", "words", "absent"),
    [
        # It won.
        (
            measured([0, 1, 2], [0.5, 0.6, 0.4], [5, 6, 7]),
            measured([0, 1, 2], [0.5, 0.6, 0.7], [5, 4, 3]),
            ["plain: its proxy rose and the true", "hacking", "nothing was hacked", "ends higher", "flatter"],
            ["lower", "sharper"],
        ),
        # It lost, and is said to have.
        (
            measured([0, 1, 2], [0.5, 0.6, 0.7], [5, 4, 3]),
            measured([0, 1, 2], [0.5, 0.6, 0.55], [5, 6, 7]),
            ["below its best", "lower than plain", "did not help", "sharper"],
            ["ends higher", "flatter", "hacking"],
        ),
        # Too close to call, and one that did not learn.
        (
            measured([0, 1, 2], [0.5, 0.6, 0.7], [5, 4, 3], spread=1),
            measured([0, 1, -1], [0.5, 0.6, 0.71], [5, 4, 3.1], spread=-1),
            ["RSA-FT: its proxy did not rise", "true preference: no difference", "sharpness: no difference"],
            ["higher", "flatter", "hacking"],
        ),
    ],
)
def test_what_is_concluded_is_what_was_measured(plain, smoothed, words, absent):
    said = "\n".join(_verdict({"plain": plain, "RSA-FT": smoothed}))
    assert all(word in said for word in words), said
    assert not any(word in said.split("\n\n")[1] for word in absent), said


@pytest.mark.slow
def test_the_demo_trains_twice_from_one_start_and_reports_both(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--steps", "2", "--seed", "3", "--output", str(folder)]) == 0
    text = capsys.readouterr().out
    for words in ("plain", "RSA-FT", *QUANTITIES, "before", "after", str(folder / "comparison.png")):
        assert words in text
    record = json.loads((folder / "comparison.json").read_text())
    plain, smoothed = record["runs"]["plain"], record["runs"]["RSA-FT"]
    assert plain["steps"] == smoothed["steps"] == [0, 1, 2]
    for name in QUANTITIES:
        assert plain[name][0] == smoothed[name][0]
        assert all(math.isfinite(value) for value in plain[name] + smoothed[name])
        # What is printed is what was measured.
        assert f"{plain[name][-1]:.3f}" in text and f"{smoothed[name][-1]:.3f}" in text
    assert plain["proxy reward"][-1] != smoothed["proxy reward"][-1]
    logs = [read_metrics(folder / name) for name in ("plain", "rsa-ft")]
    # The same seeds: the first update sees the same pictures; only RSA-FT perturbs the weights.
    assert logs[0][0]["reward"] == logs[1][0]["reward"]
    rho = load_config(find_recipe(RECIPE)).smoothing.parameters.rho
    assert logs[0][0]["eps_norm"] == 0 and logs[1][0]["eps_norm"] == pytest.approx(rho, rel=1e-4)
    # The page of both, and the runs themselves, have the true preference as a held-out reward.
    assert str(folder / "report.html") in text and "Held out: r*" in (folder / "report.html").read_text()
    for source in find_runs([str(folder)]):
        values = record["runs"]["plain" if source.label == "plain" else "RSA-FT"]
        assert source.evaluated("held_out/r*").values == values[TRUTH] and source.evaluated("s1").steps == [0, 1, 2]
    image = Image.open(folder / "comparison.png")
    assert image.width > 800 and image.height > 600
    assert main(["demo", "--steps", "1", "--output", str(folder)]) == 2
    assert "not empty" in capsys.readouterr().err
