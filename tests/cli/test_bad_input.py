"""Wrong input through the real command line: one line that says what to mend, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders.messages import says
from builders.recipes import recipe, run_cli, write_recipe
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from rsaft_fast.algorithms.denoising import DenoisingLoss
from rsaft_fast.cli import main
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import DenoisingSettings
from rsaft_fast.sampling import flow_schedule

STAGE = re.compile(r"\[ *\d+ s\] ")


def attempt(arguments, capsys, *, out: Path) -> str:
    """Run the command line in this process; the one line it must leave on stderr, below what tells how far it came."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2
    lines = [line for line in captured.err.strip().splitlines() if not STAGE.match(line)]
    assert len(lines) == 1 and lines[0].startswith("rsaft-fast: error: "), captured.err
    assert captured.out == ""
    assert not out.exists()
    return lines[0]


@pytest.fixture
def path(tiny, out, tmp_path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", recipe(tiny, out, samples={"every": 1, "count": 1}))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.kk=3", ["method.kk", "method.k?"]),
        ("method.k=3", ["method.k is 3", "sampler.steps is 2"]),
        ("smoothing.parameters.rho=0", ["smoothing.parameters.rho is 0", "greater than 0", "null turns"]),
        ("smoothing.parameters.rho=-0.1", ["smoothing.parameters.rho is -0.1", "greater than 0"]),
        ("smoothing.image.radius=0", ["smoothing.image.radius is 0", "greater than 0"]),
        ("backbone.height=33", ["height is 33", "multiples of"]),
        ("backbone.width=1001", ["width is 1001", "multiples of"]),
        ("backbone.path=/nowhere/at/all", ["/nowhere/at/all"]),
        ("backbone.device=cuda:7", ["cuda:7", "CUDA devices"]),
        ("backbone.device=abacus", ["'abacus'", "auto, cpu"]),
        ("reward.path=/nowhere/at/all", ["/nowhere/at/all"]),
        ("reward.path=playground/splendid", ["splendid", "fair"]),
        ("data.prompts=missing.txt", ["missing.txt"]),
        ("samples.prompts=missing.txt", ["missing.txt"]),
        ("denoising.images=missing", ["missing", "folder"]),
        ("parameters.lora.targets=[nothing]", ["nothing", "parameters.lora.targets"]),
        ("smoothing.parameters.groups=[{match: zzz, rho: 0.1}]", ["zzz", "smoothing.parameters.groups"]),
        ("smoothing.parameters.groups=[{match: '(', rho: 0.1}]", ["'('", "regular expression"]),
        ("sharpness.space=reward_input", ["sharpness.space", "pixel01"]),
        ("sampler.negative_prompt=ugly", ["guidance_scale 1"]),
        ("resume=nowhere", ["nowhere", "not a run folder"]),
        ("sampler.steps=2000", ["2000", "1000"]),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(path, out, capsys, monkeypatch, override, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = attempt(["train", path, override], capsys, out=out)
    assert all(word in line for word in words), line


def test_a_flow_has_no_eta(tiny, out, tmp_path, capsys):
    file = write_recipe(tmp_path / "recipe.yaml", recipe(tiny, out, "sd3", sampler__eta=0.5))
    assert says("eta", 0.5).search(attempt(["train", file], capsys, out=out))


@pytest.mark.parametrize(("text", "words"), [("", "no prompt"), ("\n  \n\n", "no prompt"), ("\xff\xfe", "not UTF-8")])
def test_a_prompt_file_without_prompts_is_refused(path, out, tmp_path, capsys, text, words):
    (tmp_path / "empty.txt").write_bytes(text.encode("latin-1"))
    assert words in attempt(["train", path, f"data.prompts={tmp_path / 'empty.txt'}"], capsys, out=out)


def test_a_pipeline_of_another_class_is_refused(tiny, path, out, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny.sd15, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "AudioLDMPipeline"}))
    line = attempt(["train", path, f"backbone.path={other}"], capsys, out=out)
    assert "AudioLDMPipeline" in line and "StableDiffusionPipeline" in line


def test_a_folder_that_is_no_pipeline_is_refused(path, out, tmp_path, capsys):
    (tmp_path / "plain").mkdir()
    assert "model_index.json" in attempt(["train", path, f"backbone.path={tmp_path / 'plain'}"], capsys, out=out)


def test_a_pipeline_cut_short_is_refused(tiny, path, out, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny.sd15, other)
    weights = next((other / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(other) in attempt(["train", path, f"backbone.path={other}"], capsys, out=out)


def poisoned_reward(tiny, folder: Path) -> Path:
    """The tiny reward with a NaN among its weights, as a training run that diverged leaves it."""
    shutil.copytree(tiny.clip, folder)
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_nan_reward_is_refused_with_nothing_written(tiny, path, out, tmp_path, capsys):
    poisoned = poisoned_reward(tiny, tmp_path / "poisoned")
    line = attempt(["train", path, f"reward.path={poisoned}"], capsys, out=out)
    assert "not finite" in line and "nan" in line


def test_a_run_is_never_overwritten(tiny, path, out, capsys):
    assert main(["train", str(path)]) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["train", str(path)]) == 2
    assert "resume=auto" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_an_output_that_is_a_file_or_cannot_be_made_is_refused(path, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["train", str(path), f"output_dir={output}"]) == 2
        assert "output_dir" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_a_forced_backend_that_cannot_run_is_refused(path, out, capsys, monkeypatch):
    monkeypatch.setenv("RSAFT_BACKEND", "cuda")
    assert "RSAFT_BACKEND=cuda" in attempt(["train", path], capsys, out=out)
    monkeypatch.setenv("RSAFT_BACKEND", "metal")
    assert "cuda, triton, cpu, torch" in attempt(["train", path], capsys, out=out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], says("train", "recipe")),
        (["train", "nothing.yaml"], says("'nothing.yaml'", "playground")),
        (["train", "playground", "oops"], says("'oops'", "key=value")),
    ],
)
def test_a_train_command_that_is_incomplete_is_refused(arguments, words, capsys, tmp_path):
    assert words.search(attempt(arguments, capsys, out=tmp_path / "none"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--verbose"], "COMMAND"),
        (["trian", "playground"], "train?"),
        (["frobnicate"], "train, "),
        (["help", "scroe"], "score?"),
        (["train", "playground", "--max_steps", "5"], "max_steps=5?"),
        (["train", "playground", "--max-steps=5"], "max_steps=5?"),
        (["score", "a", "--reward", "clip=b", "--ouptut", "c"], "--output?"),
        (["train", "--help-config", "lr"], "optimizer.lr?"),
        (["train", "playground\udcff"], "half a character"),
        (["sample", "playground", "--prompts", "a", "--output", "n" * 300], "255"),
        (["sample", "playground", "--prompts", "a", "--output", "s3://x/y"], "address"),
        (["sample", "playground", "--prompts", "a", "--steps", "9" * 5000], "whole number"),
        (["estimate", "playground", "--card", "nan"], "from 1"),
        (["score", "a", "--reward", "clip=b,scale=2024-13-45"], "'2024-13-45'"),
        (["score", "a", "--reward", "clip=b,metadata=x"], "metadata is"),
        (["sample", "playground"], "--prompts"),
        (["sample", "playground", "--prompts", "a", "--seeds", "-1"], "at least 0"),
        (["demo", "--steps", "0"], "at least 1"),
        (["demo", "--proxy", "unfair"], "invalid choice"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as left:  # argparse's own way
        code = left.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and "Value error" not in captured.err
    assert len(captured.err.splitlines()) == 1 and captured.err.startswith("rsaft-fast: error: ")
    assert words in captured.err


@pytest.mark.parametrize("width", [60, 100, 200])
def test_help_keeps_to_the_terminals_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in ([], ["help"], ["help", "train"], ["score", "--help"]):
        try:
            assert main(arguments) == 0
        except SystemExit as left:
            assert left.code == 0
        lines = capsys.readouterr().out.splitlines()
        # An example's command stays whole, to be copied.
        assert all(len(line) <= width or line.startswith("  rsaft-fast ") for line in lines), lines
        assert len(lines) > 20


def test_the_version_is_told_without_loading_torch(tmp_path):
    code = "import sys, rsaft_fast.cli; print(rsaft_fast.__version__); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == metadata.version("rsaft_fast")
    done = subprocess.run([sys.executable, "-m", "rsaft_fast", "--version"], capture_output=True, text=True)
    assert done.stdout == f"rsaft-fast {metadata.version('rsaft_fast')}\n"


def test_a_terminal_without_a_character_does_not_end_the_command(tmp_path):
    """As `score`, whose table has a plus-minus sign, after all its work."""
    code = "import rsaft_fast.cli as c; c._run = lambda *_: print('0.5 \\u00b1 0.1') or 0; c.main(['doctor'])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "0.5" in done.stdout and "0.1" in done.stdout, done.stderr


def test_what_a_file_says_cannot_steer_the_terminal(path, out, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text('output_dir: x\n"\\e[31mred\\nline": 1\n')
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    assert all(line.startswith("rsaft-fast: error: ") for line in capsys.readouterr().err.splitlines())


def test_sample_refuses_what_it_cannot_use(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out, full = tmp_path / "pictures", tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    (tmp_path / "lora.bin").write_text("x")
    (tmp_path / "empty").mkdir()
    common = ["--prompts", "a", "--steps", "1"]
    for arguments, words in (
        ([tmp_path / "none", *common, "--output", out], "there is no folder"),
        ([tiny.sd15, *common, "--output", full], "is not empty"),
        ([tiny.sd15, *common, "--output", out, "--run", full], "not a run folder"),
        ([tiny.sd15, *common, "--output", out, "--lora", tmp_path / "no"], "does not exist"),
        ([tiny.sd15, *common, "--output", out, "--lora", tmp_path / "lora.bin"], "not a .safetensors file"),
        ([tiny.sd15, *common, "--output", out, "--lora", tmp_path / "empty"], "no LoRA"),
        ([tiny.sd15, *common, "--output", out, "--device", "cuda:9"], "cuda:9"),
        ([tiny.sd15, *common, "--output", out, "--height", "7"], "height is 7"),
    ):
        assert words in attempt(["sample", *arguments], capsys, out=out)
    assert (full / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_as_a_process_of_its_own_it_says_one_line_and_nothing_else(tiny, tmp_path, path, out):
    """Nothing that other libraries print while they are imported or load weights gets in between."""
    poisoned = poisoned_reward(tiny, tmp_path / "poisoned")
    for override, words in (("methd.k=1", "did you mean method?"), (f"reward.path={poisoned}", "not finite")):
        done = run_cli(["train", path, override], cwd=tmp_path)
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if not STAGE.match(line)]
        assert len(lines) == 1 and words in lines[0], done.stderr
        assert done.stdout == "" and not out.exists()


def test_a_nan_reward_in_the_gradient_alone_skips_updates_and_keeps_the_weights(tiny, path, out, monkeypatch):
    """A finite score with a NaN gradient is no error of the reward's: the step is skipped and counted."""
    from rsaft_fast.rewards import ClipReward
    from rsaft_fast.train.logging import read_metrics

    honest = ClipReward.score_inputs

    def kinked(self, inputs, prompts):
        scores = honest(self, inputs, prompts)
        if inputs.requires_grad:
            scores.register_hook(lambda gradient: gradient * float("nan"))
        return scores

    monkeypatch.setattr(ClipReward, "score_inputs", kinked)
    assert main(["train", str(path), "sharpness=null", "smoothing.image=null", "keep_checkpoints=null"]) == 0
    assert [record["skipped"] for record in read_metrics(out)] == [1, 2]
    weights = load_file(out / "checkpoints/step_2/weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_a_sampler_whose_last_step_leaves_the_picture_trains_nothing_and_says_so(tiny, out, tmp_path, capsys):
    """DDIM spaced "linspace" ends at timestep 0, where the prediction has no part; one call more has."""
    folder = shutil.copytree(tiny.sd15, tmp_path / "linspace")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"timestep_spacing": "linspace"}))
    raw = recipe(tiny, out, max_steps=1)
    raw["backbone"]["path"] = str(folder)
    path = write_recipe(tmp_path / "linspace.yaml", raw)
    said = attempt(["train", path], capsys, out=out)
    assert all(words in said for words in ("would train nothing", "sampler.steps 2", "timestep 0", "method.k"))
    assert main(["train", str(path), "method.k=2"]) == 0


def test_levels_that_the_scheduler_cannot_place_are_named(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    backbone = SimpleNamespace(schedule=lambda steps: flow_schedule(scheduler, steps))
    with pytest.raises(UserError, match=says("denoising.levels", 1, 2, 1000)):
        DenoisingLoss(backbone, DenoisingSettings(images=str(tmp_path), levels=1), [], seed=0)


@pytest.mark.parametrize(
    "key", ["output_dir", "backbone.path", "reward.path", "data.prompts", "denoising.images", "resume"]
)
def test_a_folder_that_may_not_be_entered_is_one_line(path, out, tmp_path, capsys, monkeypatch, key):
    locked, stat = tmp_path / "locked", os.stat
    locked.mkdir()

    def refused(place, *arguments, **options):
        if os.fspath(place).startswith(f"{locked}{os.sep}") if isinstance(place, (str, os.PathLike)) else False:
            raise PermissionError(13, "Permission denied", str(place))
        return stat(place, *arguments, **options)

    monkeypatch.setattr(os, "stat", refused)
    monkeypatch.setattr(os, "access", lambda place, mode: str(place) != str(locked))
    line = attempt(["train", path, f"{key}={locked / 'inside'}"], capsys, out=out)
    assert str(locked) in line


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": "many"}'])
def test_a_damaged_config_is_one_line_of_an_estimate(tiny, out, tmp_path, capsys, text):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tiny.sd15, pipeline)
    (pipeline / "text_encoder" / "config.json").write_text(text)
    raw = recipe(tiny, out, backbone__path=str(pipeline))
    line = attempt(["estimate", write_recipe(tmp_path / "r.yaml", raw), "--quick"], capsys, out=out)
    assert "text_encoder" in line
