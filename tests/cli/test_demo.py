"""The demo, shortened, on the shipped assets."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.commands.demo import QUANTITIES, RECIPE
from rsaft_fast.train.logging import read_metrics
from rsaft_fast.train.recipe import find_recipe, load_config


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
    image = Image.open(folder / "comparison.png")
    assert image.width > 800 and image.height > 600
    assert main(["demo", "--steps", "1", "--output", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err
