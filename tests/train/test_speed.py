"""The recipe's section `speed` in whole runs: what it changes, what it must not, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from builders.messages import says
from builders.recipes import config
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from train.test_loop import same_files, without_time

from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.estimate.suggestions import candidates, changed
from rsaft_fast.phases import DENOISER, ENCODING, SAMPLING
from rsaft_fast.recipe.check import check_model
from rsaft_fast.speed import check as speed_check
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.logging import read_metrics
from rsaft_fast.train.loop import train
from rsaft_fast.train.trainer import Trainer

GUIDED = {"steps": 3, "guidance_scale": 3.0}
FULL_BF16 = {"parameters": {"train": "full"}, "backbone__dtype": "bf16"}


def trainer_of(tiny, out, family="sd15", **overrides) -> Trainer:
    settings = config(tiny, out, family, **overrides)
    return Trainer(settings, check_config(settings))


def network_calls(trainer: Trainer) -> Counter:
    """(rows, whether it built a graph) of every network call of one update."""
    calls, forward = Counter(), trainer.backbone.denoiser.forward

    def counting(*args, **kwargs):
        out = forward(*args, **kwargs)
        calls[len(out[0]), out[0].requires_grad] += 1
        return out

    trainer.backbone.denoiser.forward = counting
    trainer.update()
    return calls


def moments(trainer: Trainer) -> list[torch.Tensor]:
    """The gradient of a first update; Adam's step would hide all but its signs."""
    return [state["exp_avg"] for state in trainer.optimizer.state_dict()["state"].values()]


def distance(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    squares = [((a - b).double().square().sum(), b.double().square().sum()) for a, b in zip(ours, truth, strict=True)]
    return float((sum(d for d, _ in squares) / sum(t for _, t in squares)).sqrt())


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "limit"), [(50, 1.13), (28, 1.20)])
def test_graded_only_shares_the_prefix_of_the_two_passes(tiny, out, steps, limit):
    """A graded call runs forward in the rollout, and forward and backward (twice a forward) on the way back: the plain
    method's T + 1 forwards and a backward become one forward, and one more of each, with `graded_only`."""
    cost = {}
    for name, smoothing in {
        "plain": None,
        "exact": {"resample": "full"},
        "graded_only": {"resample": "graded_only"},
    }.items():
        calls = network_calls(trainer_of(tiny, out, sampler={"steps": steps}, smoothing=smoothing))
        passes = 1 if name == "plain" else 2
        rollouts = {"plain": steps, "exact": 2 * steps, "graded_only": steps + 1}[name]
        assert calls == {(2, False): rollouts, (2, True): passes}
        cost[name] = calls[2, False] + 3 * calls[2, True]
    assert cost["graded_only"] / cost["plain"] <= limit and cost["exact"] / cost["plain"] <= 2.05


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_guidance_in_one_call_trains_alike(tiny, out, family):
    wanted = {
        "separate": {(2, False): 12, (2, True): 4},
        "rollout": {(4, False): 6, (2, True): 4},
        "batched": {(4, False): 6, (4, True): 2},
    }
    found = {}
    for cfg, calls in wanted.items():
        trainer = trainer_of(tiny, out, family, sampler=GUIDED, speed={"cfg": cfg})
        assert network_calls(trainer) == calls
        found[cfg] = moments(trainer)
    for cfg in ("rollout", "batched"):
        assert distance(found[cfg], found["separate"]) < 1e-4


def test_true_cfg_of_flux_is_batched_too(tiny, out):
    sampler = {"steps": 2, "guidance_scale": 3.5, "true_cfg_scale": 2.0}
    trainer = trainer_of(tiny, out, "flux", sampler=sampler, speed={"cfg": "batched"})
    assert network_calls(trainer) == {(4, False): 4, (4, True): 2}


def test_gradients_of_both_branches_in_one_backward_can_be_released(tiny, tmp_path):
    options = FULL_BF16 | {"optimizer__stochastic_rounding": True, "optimizer__max_grad_norm": None}
    for release in (False, True):
        run = config(
            tiny,
            tmp_path / str(release),
            "sd3",
            max_steps=1,
            sampler=GUIDED,
            speed={"cfg": "batched"},
            optimizer__release_gradients=release,
            **options,
        )
        train(run)
    same_files(tmp_path / "True/checkpoints/step_1", tmp_path / "False/checkpoints/step_1")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, FULL_BF16, {"family": "sdxl", "parameters": {"train": "full"}}])
def test_channels_last_runs_resume_and_export_as_others_do(tiny, tmp_path, overrides):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = dict(max_steps=2, checkpoint_every=1, keep_checkpoints=None, speed={"channels_last": True}) | overrides
    train(config(tiny, whole, **settings))
    train(config(tiny, broken, **(settings | {"max_steps": 1})))
    train(config(tiny, broken, resume="auto", **settings), log=lambda line: None)
    same_files(whole / "checkpoints/step_2", broken / "checkpoints/step_2")
    assert without_time(read_metrics(whole)) == without_time(read_metrics(broken))
    exported = load_file(next((whole / ("unet" if "parameters" in overrides else "lora")).glob("*.safetensors")))
    assert all(tensor.is_contiguous() for tensor in exported.values())


@pytest.mark.parametrize("train_what", ["lora", "full"])
def test_channels_last_changes_the_layout_and_not_the_gradient(tiny, out, train_what):
    found = {}
    for on in (False, True):
        trainer = trainer_of(tiny, out, parameters={"train": train_what}, speed={"channels_last": on})
        for model in (trainer.backbone.denoiser, trainer.backbone.pipeline.vae.decoder):
            convolutions = [
                m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size[0] > 1
            ]
            layouts = {w.is_contiguous(memory_format=torch.channels_last) for w in convolutions if w.shape[1] > 1}
            assert layouts == {on}
        trainer.update()
        found[on] = moments(trainer)
    assert distance([m.contiguous() for m in found[True]], [m.contiguous() for m in found[False]]) < 1e-4


def process_settings() -> dict:
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "sdp": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "recompile_limit": torch._dynamo.config.recompile_limit,
        "rng": torch.get_rng_state().tolist(),
    }


def test_a_run_changes_no_setting_of_the_process(tiny, out):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before, attention = process_settings(), _AttentionBackendRegistry.get_active_backend()
    speed = {"cfg": "batched", "channels_last": True, "attention": "flash"}
    train(config(tiny, out, max_steps=1, sampler=GUIDED, samples={"every": 1, "count": 1}, speed=speed))
    assert process_settings() == before and _AttentionBackendRegistry.get_active_backend() == attention


class Readings(TorchFunctionMode):
    """Counts what reads a tensor's value into Python: each waits for the device."""

    NAMES = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_readings_of_an_update(tiny, out, accumulate):
    """One for the figures, one for the optimizer's, one for the gradients' change; and one for each scoring, which must
    be known to be finite before it is followed: at theta, under the first delta, and at theta + eps."""
    trainer = trainer_of(tiny, out, data__accumulate=accumulate, data__batch_size=1)
    trainer.update()
    with Readings() as readings:
        trainer.update()
    assert readings.count == 3 + 3 * accumulate


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            {"speed": {"cuda_graph": True}},
            says("speed.cuda_graph", "cpu", "CUDA devices"),
        ),
        ({"speed": {"attention": "cudnn"}}, says("speed.attention", "cudnn", "cpu in float32", "speed.attention=auto")),
        ({"speed": {"attention": "xformers"}}, says("xformers", "install", "speed.attention=auto")),
        ({"speed": {"attention": "flash3"}}, says("flash3", "flash_attn_interface", "hopper", "speed.attention=auto")),
        (
            {"speed": {"channels_last": True}, "family": "sd3"},
            says("speed.channels_last", "SD3", "UNets"),
        ),
        ({"speed": {"channels_last": True}, "family": "flux"}, says("speed.channels_last", "FLUX", "UNets")),
        (
            {"speed": {"compile": "all"}, "backbone__quantize": "int8"},
            says("speed.compile all", "backbone.quantize int8"),
        ),
        (
            {"speed": {"compile": "rollout"}, "backbone__offload_blocks": 1, "backbone__checkpoint": ["denoiser"]},
            says("speed.compile rollout", "backbone.offload_blocks 1"),
        ),
        (
            {"speed": {"cuda_graph": True}, "backbone__offload_blocks": 1, "backbone__checkpoint": ["denoiser"]},
            says("speed.cuda_graph", "backbone.offload_blocks 1"),
        ),
        (
            {"speed": {"compile": "all", "attention": "xformers"}},
            says("speed.compile all", "speed.attention xformers", "cudnn"),
        ),
        (
            {**FULL_BF16, "optimizer__release_gradients": True, "sampler": GUIDED},
            says("optimizer.release_gradients", "backward", 2, 1, "speed.cfg=batched"),
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_loads(tiny, out, overrides, line):
    with pytest.raises(UserError, match=line):
        check_config(config(tiny, out, **overrides))
    assert not out.exists()


def test_compiling_without_a_compiler_is_refused(tiny, out, monkeypatch):
    settings = config(tiny, out, speed={"compile": "rollout"})
    check_config(settings)
    monkeypatch.setattr(speed_check.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=says("speed.compile", "rollout", "cpu (g++ or clang++)", "speed.compile=none")):
        check_config(settings)


@pytest.mark.parametrize(
    ("precision", "overrides", "warned"),
    [
        ("high", {}, True),
        ("medium", {"smoothing": {"image": None}}, True),  # the sharpness is left
        ("highest", {}, False),
        ("high", {"smoothing": {"image": {"radius": 0.01, "norm": "rms"}}, "sharpness": None}, False),
        ("high", {"smoothing": {"image": None}, "sharpness": None}, False),
    ],
)
def test_low_precision_products_that_drown_a_radius_are_warned_of(tiny, out, precision, overrides, warned):
    torch.set_float32_matmul_precision(precision)
    try:
        notes = check_config(config(tiny, out, **overrides)).notes
    finally:
        torch.set_float32_matmul_precision("highest")
    assert any("torch.get_float32_matmul_precision()" in note for note in notes) == warned


@pytest.mark.slow
def test_the_estimate_sees_what_batching_costs(tiny, out):
    """Both branches' activations in graded calls; without checkpointing, and where the denoiser is what counts."""
    own = {
        cfg: estimate(config(tiny, out, sampler=GUIDED, speed={"cfg": cfg})).phase(DENOISER).own
        for cfg in ("separate", "rollout", "batched")
    }
    assert own["separate"] == own["rollout"] and 1.5 < own["batched"] / own["rollout"] < 2.1


def test_the_estimate_keeps_a_captured_calls_memory(tiny, out):
    plain, captured = (estimate(config(tiny, out, speed={"cuda_graph": on})) for on in (False, True))
    held = captured.standing["captured network call"]
    assert held == plain.phase(SAMPLING).own > 0
    for phase in plain.phases:
        after = captured.phase(phase.name).total
        assert after == phase.total + (0 if phase.name in (ENCODING, SAMPLING) else held), phase.name


def test_a_recipe_for_another_machine_can_be_estimated_here(tiny, out):
    for attention in ("cudnn", "xformers", "flash3"):
        found = estimate(config(tiny, out, "sd3", speed={"attention": attention, "cuda_graph": True}))
        assert found.peak > 0


def test_what_speed_costs_in_memory_is_among_the_suggestions(tiny, out):
    settings = config(tiny, out, sampler=GUIDED, speed={"cfg": "batched", "cuda_graph": True})
    keys = list(candidates(settings))
    assert {"speed.cfg": "rollout"} in keys and {"speed.cuda_graph": False} in keys
    assert changed(settings, {"speed.cfg": "rollout"}).speed.cfg == "rollout"
    assert not [k for k in candidates(config(tiny, out)) if any(name.startswith("speed.") for name in k)]


def test_sampling_takes_over_what_holds_on_every_machine(tiny, out):
    speed = config(
        tiny, out, speed={"cfg": "batched", "compile": "all", "cuda_graph": True, "channels_last": True}
    ).speed
    portable = speed.portable()
    assert (portable.cfg, portable.channels_last) == ("batched", True)
    assert (portable.compile, portable.attention, portable.cuda_graph) == ("none", "auto", False)


@pytest.mark.parametrize(
    ("kernel", "keys", "words"),
    [
        ("flash", {}, ("data.batch_size 2", 1)),
        ("flash3", {"data__batch_size": 1, "sampler__guidance_scale": 3.0}, ("speed.cfg rollout", "separate")),
        ("xformers", {"data__batch_size": 1, "speed__cuda_graph": True}, ("speed.cuda_graph",)),
    ],
)
def test_a_kernel_without_masks_is_refused_where_prompts_have_lengths_of_their_own(tiny, out, kernel, keys, words):
    settings = config(tiny, out, "qwen", **({"speed__attention": kernel} | keys))
    with pytest.raises(UserError, match=says("speed.attention", kernel, "mask", "efficient", *words)):
        check_model(settings, None)
    alone = keys | {"data__batch_size": 1, "speed__cfg": "separate", "speed__cuda_graph": False}
    for family, fitting in (("qwen", alone), ("flux", {})):
        check_model(config(tiny, out, family, speed__attention=kernel, **fitting), None)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "qwen"])
@pytest.mark.parametrize(
    "speed", [{"cuda_graph": True}, {"compile": "all"}, {"compile": "rollout", "cuda_graph": True}]
)
def test_updates_on_the_gpu_are_the_plain_ones(tiny, out, family, speed):
    """Two updates, so that the second samples with weights that have changed since the capture."""
    sampler = {"steps": 3, "guidance_scale": 3.0}
    common = dict(sampler=sampler, backbone__device="cuda", backbone__dtype="bf16", samples={"every": 1, "count": 3})
    records = {}
    for name, settings in {"plain": {}, "fast": speed}.items():
        trainer = trainer_of(tiny, out, family, speed=settings, **common)
        records[name] = [trainer.update(), trainer.update()]
        trainer.sample()  # another batch size
    for fast, plain in zip(records["fast"], records["plain"], strict=True):
        assert fast["reward"] == pytest.approx(plain["reward"], rel=0.05, abs=0.05)
        assert fast["projection"] == pytest.approx(1, abs=1e-3) and fast["skipped"] == 0
