"""`rsaft-fast sample`: before and after a run, what it refuses, and what it says."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import yaml
from builders.messages import says
from builders.recipes import config
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.data.picture_lists import LISTING
from rsaft_fast.recipe.load import to_yaml
from rsaft_fast.train.loop import train


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("0*.png")}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config(tiny, folder, sampler={"steps": 3}, checkpoint_every=1, keep_checkpoints=None, optimizer__lr=0.1))
    return folder


def draw(tmp_path, name, *arguments, prompts=("a red circle", "one")) -> dict[str, bytes]:
    output = tmp_path / name
    code = main(["sample", *map(str, arguments), "--prompts", *prompts, "--output", str(output)])
    assert code == 0
    return pixels(output)


@pytest.mark.slow
def test_before_and_after_a_run_that_knows_its_pipeline(tiny, run, tmp_path):
    after = draw(tmp_path, "after", "--run", run)
    assert after == draw(tmp_path, "named", tiny.sd15, "--run", run)
    before = draw(tmp_path, "before", "--run", run, "--untrained")
    assert before == draw(tmp_path, "plain", tiny.sd15, "--steps", 3, "--guidance", 1)
    assert set(before) == set(after) and before != after
    first, last = (draw(tmp_path, f"step {n}", "--run", run, "--checkpoint", n) for n in (1, 2))
    assert last == after and first not in (before, after)


def test_pictures_are_numbered_apart_for_every_prompt_and_seed(tiny, tmp_path):
    drawn = draw(
        tmp_path, "a", tiny.sd15, "--steps", 1, "--seeds", 0, 1, 0, "--batch-size", 2, prompts=["one", "one", "two"]
    )
    assert len(drawn) == 6
    listed = json.loads((tmp_path / "a/pictures.json").read_text())
    assert [(e["prompt"], e["seed"]) for e in listed] == [(p, s) for s in (0, 1) for p in ("one", "one", "two")]
    assert drawn["0000_seed_1.png"] == drawn["0001_seed_1.png"] != drawn["0002_seed_1.png"]


def test_cut_prompts_are_counted_and_one_is_named(tiny, tmp_path, capsys):
    long = "x" * 90
    for name, option in (("a", []), ("b", ["--guidance", "1"])):
        draw(tmp_path, name, tiny.sd15, "--steps", 1, *option, prompts=["one", long])
        said = [line for line in capsys.readouterr().err.splitlines() if "does not see the end" in line]
        assert len(said) == 1 and "77" in said[0] and "1 of" in said[0] and "xxx" in said[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompts", "a"], "PIPELINE"),
        (["playground", "--prompts", "a", "--untrained"], "--untrained"),
        (["playground", "--prompts", "a", "--checkpoint", "3"], "--checkpoint"),
        (["--prompts", "a", "--run", "RUN", "--checkpoint", "1", "--untrained"], "--untrained"),
        (["--prompts", "a", "--run", "RUN", "--checkpoint", "9"], "step_1, step_2"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(run, tmp_path, capsys, arguments, words):
    arguments = [str(run) if argument == "RUN" else argument for argument in arguments]
    assert main(["sample", *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and error[-1].startswith("rsaft-fast: error:")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family, steps, guidance", [("sd15", 50, "7.5"), ("sd3", 28, "7")])
def test_without_a_run_the_models_usual_settings_hold(tiny, tmp_path, capsys, family, steps, guidance):
    if not hasattr(tiny, family):
        pytest.skip(f"no tiny {family}")
    draw(tmp_path, family, getattr(tiny, family), prompts=["one"])
    assert says(f"{steps} steps", f"guidance {guidance}").search(capsys.readouterr().out)


def test_the_playground_is_drawn_as_its_recipe_draws(tmp_path, capsys):
    draw(tmp_path, "p", "playground", prompts=["a red circle"])
    assert says("10 steps", "guidance 1").search(capsys.readouterr().out)


def test_a_lora_of_another_family_is_an_error_and_nothing_is_drawn(tiny, run, tmp_path, capsys):
    assert main(
        ["sample", str(tiny.sd3), "--lora", str(run / "lora"), "--prompts", "a", "--output", str(tmp_path / "o")]
    )
    assert "LoRA" in capsys.readouterr().err and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "option, words",
    [
        (["--guidance", "nan"], ["guidance_scale", "nan"]),
        (["--steps", "100000"], ["steps", "100000", "1000"]),
        (["--eta", "2"], ["eta", "2", "at most 1"]),
        (["--height", str(10**9)], ["height", "16384"]),
    ],
)
def test_options_have_the_limits_of_a_recipe(tiny, tmp_path, capsys, option, words):
    output = tmp_path / "out"
    assert main(["sample", str(tiny.sd15), "--prompts", "a", *option, "--output", str(output)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rsaft-fast: error:") and all(word in error for word in words), error
    assert not output.exists()


def test_pictures_of_a_full_disk_have_their_prompts(tiny, tmp_path, capsys, monkeypatch):
    def save(image, stream, format, **options):
        if ".0001" in stream.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(image, stream, format, **options)

    write = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", save)
    options = ["--steps", "1", "--batch-size", "1", "--output", str(tmp_path / "a")]
    assert main(["sample", str(tiny.sd15), "--prompts", "one", "two", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rsaft-fast: error:") and all(
        w in error for w in ("0001_seed_0.png", "ENOSPC", "make room")
    )
    listed = json.loads((tmp_path / "a" / LISTING).read_text())
    assert listed == [{"file": "0000_seed_0.png", "prompt": "one", "seed": 0}]


def test_a_run_finds_its_pipeline_from_every_working_directory(tiny, tmp_path):
    text = to_yaml(config(tiny, tmp_path, backbone__path=os.path.relpath(tiny.sd15)))
    assert yaml.safe_load(text)["backbone"]["path"] == str(tiny.sd15)
