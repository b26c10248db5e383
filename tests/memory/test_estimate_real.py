"""The accounting of the estimate at real size on the meta device, against published figures and exact ones."""

from __future__ import annotations

import time

import pytest
import torch
from builders.recipes import config, environment

from rsaft_fast.backbones import LoRASettings, add_lora, random_backbone
from rsaft_fast.memory import checkpoint_denoiser, phases
from rsaft_fast.memory.estimate import GIB, estimate
from rsaft_fast.memory.live import LiveBytes, shapes_alone
from rsaft_fast.memory.published import published_pipeline
from rsaft_fast.memory.reward_skeleton import skeleton_reward
from rsaft_fast.memory.skeleton import skeleton_backbone
from rsaft_fast.rewards import RewardSettings
from rsaft_fast.train.recipe import load_config


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def kept_by_the_denoiser(spec: str, size: int, train: str, checkpointed: bool) -> float:
    """GiB that a forward pass leaves alive for the backward pass; bf16, batch 1, no guidance."""
    backbone = random_backbone(spec, height=size, width=size, dtype=torch.bfloat16, device="meta")
    if train == "full":
        backbone.train_all_parameters()
    else:
        with torch.device("meta"):
            add_lora(backbone, LoRASettings(rank=16))
        backbone.denoiser.to(torch.bfloat16)  # the published figures have adapters in the base's dtype; ours are fp32
    checkpoint_denoiser(backbone.denoiser, checkpointed)
    conditioning, step = backbone.random_conditioning(1), backbone.schedule(1)[0]
    live = LiveBytes("meta")
    live.see([*backbone.denoiser.parameters(), *backbone.denoiser.buffers(), *conditioning.positive.values()])
    with shapes_alone(), live:
        x = torch.empty(1, *backbone.latent_shape, device="meta")
        before = live.alive
        prediction = backbone.predict(x, step, conditioning.positive)
        return (live.alive - before - prediction.numel() * 4) / GIB


@pytest.mark.parametrize(
    ("spec", "size", "train", "checkpointed", "published"),
    [
        ("sd15", 512, "lora", False, 0.79),
        ("sd15", 512, "lora", True, 0.14),
        ("sd15", 512, "full", False, 0.92),
        ("sdxl", 1024, "lora", False, 5.61),
        ("sdxl", 1024, "lora", True, 0.45),
        ("sd35-medium", 1024, "full", False, 11.18),
        ("sd35-medium", 1024, "lora", True, 0.33),
        ("flux1", 1024, "lora", True, 1.55),
    ],
)
def test_activations_agree_with_published_figures(spec, size, train, checkpointed, published):
    assert kept_by_the_denoiser(spec, size, train, checkpointed) == pytest.approx(published, rel=0.07)


def test_the_decoder_agrees_with_published_figures():
    backbone = random_backbone("sd15", height=1024, width=1024, dtype=torch.bfloat16, device="meta")
    live = LiveBytes("meta")
    live.see(backbone.pipeline.vae.parameters())
    with shapes_alone(), live:
        latents = torch.empty(1, *backbone.latent_shape, device="meta", requires_grad=True)
        before = live.alive
        images = backbone.decode(latents)
        assert (live.alive - before) / GIB == pytest.approx(11.1, rel=0.01)
        del images


@pytest.mark.parametrize(
    ("hub_id", "billions"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 0.860),
        ("stabilityai/stable-diffusion-xl-base-1.0", 2.567),
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2.03),
        ("stabilityai/stable-diffusion-3.5-medium", 2.243),
        ("stabilityai/stable-diffusion-3.5-large", 8.057),
        ("black-forest-labs/FLUX.1-dev", 11.901),
    ],
)
def test_published_architectures_have_the_published_sizes(hub_id, billions):
    backbone, notes = skeleton_backbone(hub_id, height=None, width=None, dtype=torch.bfloat16)
    # Half a unit in the last place that is published.
    assert sum(p.numel() for p in backbone.denoiser.parameters()) / 1e9 == pytest.approx(billions, abs=0.5 * 10**-2)
    assert hub_id in notes[0]
    encoders = {name: part for name, part in backbone.pipeline.components.items() if name.startswith("text_encoder")}
    assert set(backbone.text_encoders) <= {name for name, part in encoders.items() if part is not None}
    sizes = {round(sum(p.numel() for p in part.parameters()) / 1e6) for part in encoders.values()}
    assert sizes <= {123, 124, 695, 4762}  # CLIP-L without and with projection, bigG, T5-XXL


def test_a_published_reward_has_the_published_size():
    reward, _ = skeleton_reward(RewardSettings(path="yuvalkirstain/PickScore_v1"))
    assert sum(p.numel() for p in reward.model.parameters()) == 986_109_441
    assert published_pipeline("somebody/a-cat") is None


def shipped(name: str, **changes):
    return load_config(name, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


def test_a_shipped_recipe_is_estimated_in_seconds_and_adds_up():
    started = time.process_time()
    found = estimate(shipped("sd15-lora-24gb.yaml"))
    assert time.process_time() - started < 20  # 3 s alone
    blocks = 1e-3 * GIB  # small tensors take whole blocks
    assert found.standing["denoiser"] == pytest.approx(2 * 859_520_964, abs=blocks)
    assert found.standing["adapters"] == pytest.approx(4 * 6_377_472, abs=blocks)
    assert found.standing["moments (32 bits)"] == pytest.approx(8 * 6_377_472, abs=blocks)
    assert found.standing["VAE"] == pytest.approx(2 * 83_653_863, abs=blocks)
    assert found.peak == max(phase.total for phase in found.phases) == found.largest.total
    for phase in found.phases:
        assert phase.beside >= 0 and phase.own > 0
        assert phase.total <= found.peak


def test_checkpointing_never_raises_a_peak_and_k_hardly():
    small = dict(data__batch_size=1, data__accumulate=1, backbone__height=256, backbone__width=256)
    small |= dict(sampler__steps=8, sampler__guidance_scale=1, samples__every=0)
    one, eight = (estimate(shipped("sd15-lora-24gb.yaml", **small, method__k=k)) for k in (1, 8))
    plain = estimate(shipped("sd15-lora-24gb.yaml", **small, backbone__checkpoint="[]"))
    for name in (phases.DENOISER, phases.DECODER):
        assert one.phase(name).total <= eight.phase(name).total <= 1.05 * one.phase(name).total
        # Eight calls checkpointed take less than one that is not.
        assert eight.phase(name).total < plain.phase(name).total
    for name in (phases.SAMPLING, phases.SCORING):
        assert one.phase(name).total == pytest.approx(plain.phase(name).total, rel=0.01)
    assert one.peak <= eight.peak <= 1.05 * one.peak


def test_more_calls_than_two_cost_their_latents_alone(tiny, out):
    two, eight = (estimate(config(tiny, out, sampler={"steps": 8}, method={"name": "draft", "k": k})) for k in (2, 8))
    latents = 4 * 2 * 4 * 16 * 16  # fp32, batch 2
    assert eight.peak - two.peak == 6 * latents
