"""Runs on tiny pipelines, in this process: the log, bitwise resume, accumulation, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from builders.messages import says
from builders.recipes import config
from PIL import Image
from safetensors.torch import load_file

from rsaft_fast.errors import NonFiniteRewardError, UserError
from rsaft_fast.rewards import ClipReward
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.logging import read_metrics
from rsaft_fast.train.loop import train
from rsaft_fast.train.trainer import Trainer

KEYS = {"step", "reward", "loss", "s1", "eps_norm", "projection", "grad_norm", "skipped", "seconds"}


def without_time(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def notes(said: list[str]) -> list[str]:
    """What was said of the run itself, without what tells how far it is."""
    return [line for line in said if not line.startswith(("[", "update "))]


def same_files(a: Path, b: Path, names=("weights", "optimizer")) -> None:
    for name in names:
        one, two = load_file(a / f"{name}.safetensors"), load_file(b / f"{name}.safetensors")
        assert one.keys() == two.keys() and len(one) > 0
        for key in one:
            assert torch.equal(one[key], two[key]), f"{name}: {key}"


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_run_leaves_a_log_grids_checkpoints_and_a_lora(tiny, out, family, capsys):
    smoothed = config(
        tiny, out, family, max_steps=3, checkpoint_every=2, samples={"every": 2, "count": 3}, logging__tensorboard=True
    )
    outcome = train(smoothed)
    records = read_metrics(out)
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert set(record) >= KEYS
        assert all(v is None or math.isfinite(v) for v in record.values())
        assert record["eps_norm"] == pytest.approx(0.01, rel=1e-5) and record["projection"] == pytest.approx(
            1, abs=1e-4
        )
        assert record["s1"] > 0 and record["skipped"] == 0 and record["grad_norm"] > 0
        assert record["loss"] == pytest.approx(-record["smoothed_reward"])
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["step_0.png", "step_2.png", "step_3.png"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_2", "step_3"]
    assert any((out / "tensorboard").iterdir())
    assert outcome.step == 3 and outcome.export == out / "lora" and outcome.stopped_by is None
    assert not list(out.glob(".*"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    mean = sum(record["reward"] for record in records) / 3
    assert last.startswith(f"update 3/3, reward {mean:.4g} (mean of 3), ")
    # The weights did move.
    first, last = (load_file(out / f"checkpoints/step_{n}/weights.safetensors") for n in (2, 3))
    assert any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        pytest.param({"smoothing": None}, marks=pytest.mark.slow),
        pytest.param(
            {"method": {"name": "draft_lv", "n_extra": 1}, "ema": {"decay": 0.5}, "data__accumulate": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"method": {"name": "alignprop"}, "sampler": {"steps": 3, "eta": 1.0, "guidance_scale": 2.0}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"method": {"name": "drtune", "k": 1}, "optimizer__schedule": "cosine", "optimizer__warmup_steps": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"method": {"name": "flowbp_lagrange"}, "sampler": {"steps": 4, "guidance_scale": 2.0}},
            marks=pytest.mark.slow,
        ),
        {"parameters": {"train": "full"}, "backbone__dtype": "bf16"},
        pytest.param({"family": "sdxl", "sampler": {"steps": 2, "guidance_scale": 3.0}}, marks=pytest.mark.slow),
        {"family": "flux", "sampler": {"steps": 2, "guidance_scale": 3.5}, "parameters": {"train": "full"}},
    ],
    ids=[
        "rsaft",
        "plain",
        "lv-ema-accumulate",
        "alignprop-eta-cfg",
        "drtune-cosine",
        "lagrange-cfg",
        "full-bf16",
        "sdxl",
        "flux-full",
    ],
)
def test_resuming_repeats_the_unbroken_run_bit_for_bit(tiny, tmp_path, overrides):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config(tiny, whole, max_steps=5, checkpoint_every=2, keep_checkpoints=None, **overrides))
    # What a kill in update 4 or 5 leaves: the run without anything later than its checkpoint, but with a longer log.
    shutil.copytree(whole, broken)
    for later in ("step_4", "step_5"):
        shutil.rmtree(broken / "checkpoints" / later)
    said = []
    train(
        config(tiny, broken, max_steps=5, checkpoint_every=2, keep_checkpoints=None, resume="auto", **overrides),
        log=said.append,
    )
    assert notes(said) == [f"resuming from {broken / 'checkpoints' / 'step_2'}, after update 2"]
    for step in (4, 5):
        same_files(whole / f"checkpoints/step_{step}", broken / f"checkpoints/step_{step}")
    if "ema" in overrides:
        same_files(whole / "checkpoints/step_5", broken / "checkpoints/step_5", ["ema"])
    assert without_time(read_metrics(broken)) == without_time(read_metrics(whole))


def test_grids_of_a_resumed_run_show_the_untrained_model_too(tiny, tmp_path):
    runs = [tmp_path / "whole", tmp_path / "broken"]
    grids = {"every": 2, "count": 2}
    train(config(tiny, runs[0], "sd3", max_steps=4, checkpoint_every=2, samples=grids))
    train(config(tiny, runs[1], "sd3", max_steps=2, checkpoint_every=2, samples=grids))
    train(config(tiny, runs[1], "sd3", max_steps=4, checkpoint_every=2, samples=grids, resume="auto"))
    for name in ("step_0.png", "step_2.png", "step_4.png"):
        assert (runs[0] / "samples" / name).read_bytes() == (runs[1] / "samples" / name).read_bytes()


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("original") / "run"
    train(config(tiny, out))
    return out


@pytest.fixture
def ran(original, out) -> Path:
    """A finished run of two updates, a copy."""
    return Path(shutil.copytree(original, out))


def test_a_resumed_log_has_each_update_once_also_after_a_torn_line(tiny, ran):
    with (ran / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "reward": 1.0}\n{"step": 4, "rew')
    train(config(tiny, ran, max_steps=4, resume=str(ran)))
    assert [record["step"] for record in read_metrics(ran)] == [1, 2, 3, 4]
    assert all(set(record) >= KEYS for record in read_metrics(ran))


def test_a_run_can_go_on_in_another_folder(tiny, ran, tmp_path):
    before = {p: p.read_bytes() for p in ran.rglob("*") if p.is_file()}
    other = tmp_path / "other"
    train(config(tiny, other, max_steps=3, resume=str(ran)))
    assert [record["step"] for record in read_metrics(other)] == [1, 2, 3]
    assert before == {p: p.read_bytes() for p in ran.rglob("*") if p.is_file()}


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tiny, out):
    train(config(tiny, out, max_steps=4, checkpoint_every=2))
    weights = out / "checkpoints/step_4/weights.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    said = []
    train(config(tiny, out, max_steps=4, checkpoint_every=2, resume="auto"), log=said.append)
    said = notes(said)
    assert says("step_4", "weights.safetensors").search(said[0]) and says("step_2", "update 2").search(said[1])
    assert weights.read_bytes() == good


def test_what_changed_since_the_checkpoint_is_said(tiny, ran):
    said = []
    train(config(tiny, ran, max_steps=3, resume="auto", optimizer__lr=5e-3), log=said.append)
    assert len(notes(said)) == 2 and says("optimizer.lr", 0.01, 0.005).search(notes(said)[1])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"parameters__lora": {"rank": 3}}, says("resume", "weights", "parameters")),
        ({"ema": {"decay": 0.9}}, says("resume", "ema")),
        ({"parameters": {"train": "full"}}, says("resume", "weights", "parameters")),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tiny, ran, overrides, line):
    before = {p: p.read_bytes() for p in ran.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=line):
        train(config(tiny, ran, max_steps=3, resume="auto", **overrides))
    assert before == {p: p.read_bytes() for p in ran.rglob("*") if p.is_file()}


def test_a_finished_run_says_so_and_changes_nothing_but_the_export(tiny, ran):
    shutil.rmtree(ran / "lora")
    said = []
    outcome = train(config(tiny, ran, resume="auto", optimizer__lr=5e-3), log=said.append)
    assert says(2, "updates").search(outcome.message) and (ran / "lora").is_dir()
    resumed, nothing, changed = notes(said)
    assert says("no update", "max_steps", 2).search(nothing) and says("optimizer.lr", 0.01, 0.005).search(changed)


def test_resume_auto_without_a_run_starts_one(tiny, out):
    assert train(config(tiny, out, resume="auto")).step == 2


def test_resume_auto_of_a_run_without_a_checkpoint_starts_over_says_so_and_keeps_what_was_there(tiny, out):
    (out / "checkpoints/step_1").mkdir(parents=True)  # a kill cut it short
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    said = []
    train(config(tiny, out, resume="auto"), log=said.append)
    assert "step_1" in said[0] and "beginning" in said[1]
    assert [set(record) >= KEYS for record in read_metrics(out)] == [True, True]
    assert (out / "superseded-1/metrics.jsonl").read_text() == '{"step": 1}\n'
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_2"]


def test_resume_auto_never_replaces_a_run_whose_only_checkpoint_is_damaged(tiny, ran):
    with (ran / "checkpoints/step_2/weights.safetensors").open("ab") as stream:
        stream.write(b"x")
    before = {p: p.read_bytes() for p in ran.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=says("resume", "step_2", "weights.safetensors", "output_dir")):
        train(config(tiny, ran, max_steps=3, resume="auto"))
    assert before == {p: p.read_bytes() for p in ran.rglob("*") if p.is_file()}


def test_a_comment_in_the_copied_config_makes_no_checkpoint_worthless(tiny, ran):
    copied = ran / "checkpoints/step_2/config.yaml"
    copied.write_text("# the good one\n" + copied.read_text())
    said = []
    assert train(config(tiny, ran, max_steps=3, resume="auto"), log=said.append).step == 3
    assert notes(said) == [f"resuming from {ran / 'checkpoints/step_2'}, after update 2"]
    copied = ran / "checkpoints/step_3/config.yaml"
    copied.write_text("{")
    assert train(config(tiny, ran, max_steps=4, resume="auto"), log=said.append).step == 4
    assert any("config.yaml" in line for line in said)


def gradients_after_one_update(tiny, out, **overrides) -> tuple[dict, dict]:
    settings = config(tiny, out, **overrides)
    trainer = Trainer(settings, check_config(settings))
    record = trainer.update()
    # An SGD-like view of the update: Adam's first step would hide all but the signs.
    moments = trainer.optimizer.state_dict()["state"]
    return {index: state["exp_avg"] for index, state in moments.items()}, record


@pytest.mark.parametrize("method", [{"name": "draft_lv", "n_extra": 1}, {"name": "alignprop"}])
def test_accumulating_four_micro_batches_is_one_batch(tiny, out, method):
    """Both smoothings on, through the trainer, in fp32: the same samples, plans and noise, whatever the split."""
    common = dict(method=method, sampler={"steps": 3, "eta": 1.0}, optimizer__max_grad_norm=None)
    if method["name"] == "draft_lv":
        common["sampler"] = {"steps": 2}
    one, at_once = gradients_after_one_update(tiny, out, data__batch_size=4, **common)
    four, split = gradients_after_one_update(tiny, out, data__batch_size=1, data__accumulate=4, **common)
    difference = sum((one[i] - four[i]).double().square().sum() for i in one)
    assert float((difference / sum(t.double().square().sum() for t in one.values())).sqrt()) < 1e-4
    for name in ("reward", "loss", "s1", "grad_norm"):
        assert split[name] == pytest.approx(at_once[name], rel=1e-4)


def test_the_mean_weights_are_what_is_drawn_and_exported(tiny, out):
    train(config(tiny, out, max_steps=3, ema={"decay": 0.9}))
    last = out / "checkpoints/step_3"
    weights, ema = load_file(last / "weights.safetensors"), load_file(last / "ema.safetensors")
    exported = load_file(out / "lora/pytorch_lora_weights.safetensors")
    assert any(not torch.equal(weights[name], ema[name]) for name in ema)
    for name, mean in ema.items():
        scale = 2.0 if "lora_B" in name else 1.0  # alpha 4, rank 2
        assert torch.equal(exported["unet." + name.replace(".default", "")], mean * scale)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_plain_diffusers_draws_the_same_pictures_from_the_exported_lora(tiny, out, family):
    from diffusers import DDIMScheduler, DiffusionPipeline

    from rsaft_fast.sampling import NoiseSource
    from rsaft_fast.sampling.pictures import SAMPLE_STEP

    settings = config(
        tiny, out, family, max_steps=2, sampler={"steps": 4, "guidance_scale": 3.0}, samples={"every": 2, "count": 2}
    )
    trainers = []
    train(settings, on_samples=lambda trainer, images, step: trainers.append(trainer))
    ours = trainers[-1].sample()
    pipeline = DiffusionPipeline.from_pretrained(settings.backbone.path)
    if family == "sd15":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    before = _draw(pipeline, trainers[-1].sample_prompts, NoiseSource(0, SAMPLE_STEP, (0, 1)))
    pipeline.load_lora_weights(out / "lora")
    theirs = _draw(pipeline, trainers[-1].sample_prompts, NoiseSource(0, SAMPLE_STEP, (0, 1)))
    assert (ours.clamp(0, 1) - theirs).abs().max() < 1e-4
    assert (before - theirs).abs().max() > 1e-3


def _draw(pipeline, prompts, noise) -> torch.Tensor:
    latents = noise.draw("initial", (4, 16, 16))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts, latents=latents, num_inference_steps=4, guidance_scale=3.0, height=32, width=32, output_type="pt"
    ).images


def test_full_parameters_are_exported_as_a_diffusers_folder(tiny, out):
    from diffusers import SD3Transformer2DModel

    train(config(tiny, out, "sd3", parameters={"train": "full"}))
    exported = SD3Transformer2DModel.from_pretrained(out / "transformer").state_dict()
    saved = load_file(out / "checkpoints/step_2/weights.safetensors")
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    assert not (out / "checkpoints/step_2/lora").exists()


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (40 + index, 50), (index * 80, 100, 30)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}\n")
    return folder


def test_the_denoising_loss_trains_beside_the_reward_and_resumes_bit_for_bit(tiny, tmp_path, pictures):
    denoising = {"images": str(pictures), "batch_size": 2, "every": 2, "levels": 10}
    runs = [tmp_path / "a", tmp_path / "b"]
    train(config(tiny, runs[0], "sd3", max_steps=4, checkpoint_every=2, keep_checkpoints=None, denoising=denoising))
    losses = [record["denoising_loss"] for record in read_metrics(runs[0])]
    assert losses[0] > 0 and losses[2] > 0 and losses[1] is None and losses[3] is None
    train(config(tiny, runs[1], "sd3", max_steps=4, resume=None))
    last = [load_file(run / "checkpoints/step_4/weights.safetensors") for run in runs]
    assert any(not torch.equal(last[0][name], last[1][name]) for name in last[0])
    for later in ("step_4",):
        shutil.rmtree(runs[0] / "checkpoints" / later)
    train(config(tiny, runs[0], "sd3", max_steps=4, resume="auto", denoising=denoising))
    again = load_file(runs[0] / "checkpoints/step_4/weights.safetensors")
    assert all(torch.equal(again[name], last[0][name]) for name in again)


def test_nothing_is_written_before_the_first_update_is_done(tiny, out, monkeypatch):
    def broken(self, inputs, prompts):
        return torch.full((len(inputs),), float("nan")) + inputs.sum() * 0

    monkeypatch.setattr(ClipReward, "score_inputs", broken)
    with pytest.raises(NonFiniteRewardError, match=says("2 of 2", "finite", "nan", "'a red circle'")):
        train(config(tiny, out, samples={"every": 1}))
    assert not out.exists()


def test_a_reward_that_turns_nan_keeps_the_last_checkpoint_and_the_weights(tiny, out, monkeypatch):
    honest, calls = ClipReward.score_inputs, []

    def fails_later(self, inputs, prompts):
        calls.append(1)
        scores = honest(self, inputs, prompts)
        return scores * float("nan") if len(calls) > 11 else scores

    monkeypatch.setattr(ClipReward, "score_inputs", fails_later)
    trainers = []
    with pytest.raises(NonFiniteRewardError):
        train(
            config(tiny, out, max_steps=20, checkpoint_every=1, samples={"every": 20, "count": 1}),
            on_samples=lambda trainer, images, step: trainers.append(trainer),
        )
    records = read_metrics(out)
    assert 1 <= len(records) < 20
    folder, passed_over = checkpoints.newest(out / "checkpoints")
    assert folder.name == f"step_{len(records)}" and not passed_over
    saved = checkpoints.read(folder)
    for name, parameter in trainers[-1].parameters.items():
        assert torch.equal(parameter, saved.weights[name])
    assert not trainers[-1].optimizer.is_perturbed


def test_out_of_memory_names_the_phase_and_restores_the_weights(tiny, out, monkeypatch):
    settings = config(tiny, out)
    trainer = Trainer(settings, check_config(settings))
    trainer.update()
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    decode, calls = trainer.backbone.decode, []

    def exhausted(latents):
        calls.append(1)
        if len(calls) == 4:  # in the second pass, at theta + eps
            assert trainer.optimizer.is_perturbed
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11 GiB")
        return decode(latents)

    monkeypatch.setattr(trainer.backbone, "decode", exhausted)
    line = says("update 2", "(the decoder's backward pass)", "weights are those before")
    with pytest.raises(UserError, match=line):
        trainer.update()
    assert all(torch.equal(before[name], p) for name, p in trainer.parameters.items())
    assert trainer.step == 1


def test_an_error_of_another_kind_is_not_dressed_up(tiny, out, monkeypatch):
    settings = config(tiny, out)
    trainer = Trainer(settings, check_config(settings))
    monkeypatch.setattr(trainer.backbone, "decode", lambda latents: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.update()


def test_a_perturbation_that_rounding_swallows_is_warned_of_once(tiny, out):
    from rsaft_fast.train.run import Run

    said = []
    settings = config(tiny, out)
    run = Run(settings, said.append)
    for step, projection in enumerate((0.9, 0.2, 0.1), 1):
        run._warn({"step": step, "projection": projection, "skipped": 0})
    assert len(said) == 1 and says("20%", "perturbation").search(said[0])
    run._warn({"step": 4, "projection": 0.0, "skipped": 1})
    run._warn({"step": 5, "projection": 0.9, "skipped": 1})
    assert len(said) == 2 and says("update 4", "skipped", "finite", 1).search(said[1])


def test_metrics_are_json_without_nan(tiny, out):
    from rsaft_fast.train.logging import RunLog

    with RunLog(out, tensorboard=False) as log:
        log.open("seed: 0\n", 0, [])
        log.metrics({"step": 1, "grad_norm": float("inf"), "reward": float("nan"), "s1": None, "skipped": 1})
    line = (out / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "grad_norm": None,
        "reward": None,
        "s1": None,
        "skipped": 1,
    }
