"""Recipes whose reward is made of several: what is refused before loading, and what a run logs."""

from __future__ import annotations

import json

import pytest
from builders.clip import write_clip
from builders.messages import says
from builders.recipes import config

from rsaft_fast.cli import main
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.load import load_config, to_yaml
from rsaft_fast.train.inputs import check_config


def combination(*paths, **options):
    parts = [{"path": str(path), "label": f"r{i}"} for i, path in enumerate(paths)]
    return {"name": "combination", "parts": parts, **options}


def test_what_has_no_gradient_is_refused_before_anything_loads(tiny, out):
    with pytest.raises(UserError, match=says("reward.how rank", "gradient", "method.name draft")):
        check_config(config(tiny, out, reward=combination("/nowhere", "/else", how="rank")))
    image = {"radius": 0.1, "space": "reward_input"}
    with pytest.raises(
        UserError, match=says("smoothing.image.space", "reward_input", "combination", "pixel01, pixel11")
    ):
        check_config(config(tiny, out, reward=combination("/nowhere", "/else"), smoothing__image=image))
    with pytest.raises(UserError, match=says("calibration", "'/no/file'", "No such file")):
        check_config(config(tiny, out, reward=combination(tiny.clip, tiny.clip, calibration="/no/file")))


def test_errors_name_the_part(tiny, out, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config(tiny, out, reward=combination(tiny.clip, tiny.clip))))
    for override, line in [
        ("reward.parts=[{path: a, szale: 1}]", "reward.parts[0].szale"),
        ("reward.parts=[{path: a}, {name: clap, path: b}]", "reward.parts[1].name is 'clap'"),
        ("reward.parts=[{path: a}, {name: aesthetic}]", "missing key reward.parts[1].path"),
        ("reward.how=wurst", "did you mean worst?"),
    ]:
        with pytest.raises(UserError) as caught:
            load_config(recipe, [override])
        assert line in str(caught.value)


@pytest.mark.slow
def test_a_run_logs_each_part_and_follows_their_sum(tiny, tmp_path):
    """Half of a reward and half of the same reward are that reward: the run does not tell them apart."""
    runs = {}
    for name, reward in {
        "one": {"path": str(tiny.clip)},
        "halves": combination(tiny.clip, tiny.clip),
        "two": combination(tiny.clip, write_clip(tmp_path / "other", image_size=24, seed=3), how="worst"),
    }.items():
        out = tmp_path / name
        for part in reward.get("parts", ()) if name == "halves" else ():
            part["weight"] = 0.5
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(to_yaml(config(tiny, out, reward=reward)))
        assert main(["train", str(recipe)]) == 0
        runs[name] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for alone, halves in zip(runs["one"], runs["halves"]):
        for key in ("reward", "s1", "smoothed_reward", "grad_norm"):
            assert halves[key] == pytest.approx(alone[key], rel=1e-4)
        assert halves["reward/r0"] == halves["reward/r1"] == pytest.approx(alone["reward"], rel=1e-6)
        assert not any(key.startswith("reward/") for key in alone)
    for record in runs["two"]:
        assert record["reward"] <= min(record["reward/r0"], record["reward/r1"]) + 1e-6
