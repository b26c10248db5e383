"""The accounting of the estimate at real size on the meta device, against published figures and exact ones."""

from __future__ import annotations

import time

import pytest
import torch
from builders.recipes import config, environment

from rsaft_fast import phases
from rsaft_fast.backbones import LoRASettings, add_lora, krea2, qwen_image, random_backbone
from rsaft_fast.backbones.published import published_pipeline
from rsaft_fast.backbones.turns import encode_in_turns
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import GIB, estimate
from rsaft_fast.estimate.live import LiveBytes, shapes_alone
from rsaft_fast.estimate.reward_skeleton import skeleton_reward
from rsaft_fast.estimate.skeleton import skeleton_backbone
from rsaft_fast.memory import checkpoint_denoiser, networks
from rsaft_fast.recipe.load import load_config
from rsaft_fast.rewards import REWARDS, RewardSettings


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def kept_by_the_denoiser(spec: str, size: int, train: str, checkpointed: bool, through: bool = False) -> float:
    """GiB that a forward pass leaves alive for the backward pass; bf16, batch 1, no guidance.

    through: also for the gradient at the latent, which all calls but the first of K need.
    """
    backbone = random_backbone(spec, height=size, width=size, dtype=torch.bfloat16, device="meta")
    if train == "full":
        backbone.train_all_parameters()
    else:
        with torch.device("meta"):
            add_lora(backbone, LoRASettings(rank=16))
        backbone.denoiser.to(torch.bfloat16)  # the published figures have adapters in the base's dtype; ours are fp32
    checkpoint_denoiser(backbone.denoiser, checkpointed)
    conditioning, step = backbone.random_conditioning(1), backbone.schedule(2)[0]
    live = LiveBytes("meta")
    live.see([*backbone.denoiser.parameters(), *backbone.denoiser.buffers(), *conditioning.positive.values()])
    with shapes_alone(), live:
        x = torch.empty(1, *backbone.latent_shape, device="meta", requires_grad=through)
        before = live.alive
        prediction = backbone.predict(x, step, conditioning.positive)
        return (live.alive - before - prediction.numel() * 4) / GIB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "checkpointed", "counted"),
    [("full", False, 42.0), ("full", True, 1.57), ("lora", False, 25.5), ("lora", True, 1.52)],
)
def test_activations_of_qwen_image_agree_with_an_independent_count(train, checkpointed, counted, monkeypatch):
    """By hooks on saved tensors at 1024x1024, with 256 tokens of text; ours counts LoRA of half the rank."""
    monkeypatch.setattr(qwen_image, "MOST_TEXT", 256)
    assert kept_by_the_denoiser("qwen-image", 1024, train, checkpointed) == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "checkpointed", "counted"),
    [("full", False, 51.2), ("full", True, 2.78), ("lora", False, 30.9), ("lora", True, 2.20)],
)
def test_activations_of_krea_2_agree_with_an_independent_count(train, checkpointed, counted, monkeypatch):
    """As Qwen-Image's; the count was made with diffusers' checkpointing, which leaves the blocks over the text out."""
    monkeypatch.setattr(krea2, "MOST_TEXT", 256)
    monkeypatch.setattr(networks, "_LEFT_OUT", ())
    assert kept_by_the_denoiser("krea-2", 1024, train, checkpointed) == pytest.approx(counted, rel=0.02)
    monkeypatch.undo()
    monkeypatch.setattr(krea2, "MOST_TEXT", 256)
    ours = kept_by_the_denoiser("krea-2", 1024, train, checkpointed)
    assert ours < 0.7 * counted if checkpointed else ours == pytest.approx(counted, rel=0.02)


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
        ("klein-4b", 1024, "lora", False, 15.9),
        ("klein-4b", 1024, "full", True, 0.74),
        ("klein-9b", 1024, "full", True, 1.24),
        ("klein-9b", 1024, "lora", True, 1.16),
        ("flux2-dev", 1024, "lora", True, 3.01),
        ("z-image", 1024, "full", False, 44.6),
        ("z-image", 1024, "lora", True, 1.03),
    ],
)
def test_activations_agree_with_published_figures(spec, size, train, checkpointed, published):
    assert kept_by_the_denoiser(spec, size, train, checkpointed) == pytest.approx(published, rel=0.07)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("spec", ["klein-9b", "z-image"])
def test_many_graded_calls_keep_what_one_does(spec, checkpointed):
    """One call's graph is alive at a time; what the others keep beyond the first is for the latent's gradient."""
    first, others = (kept_by_the_denoiser(spec, 1024, "lora", checkpointed, through) for through in (False, True))
    assert first <= others <= 1.01 * first


@pytest.mark.parametrize("spec", ["sd15", "klein-4b"])
def test_the_decoder_agrees_with_published_figures(spec):
    backbone = random_backbone(spec, height=1024, width=1024, dtype=torch.bfloat16, device="meta")
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
        ("Qwen/Qwen-Image", 20.430),
        ("krea/Krea-2-Raw", 12.820),
        ("black-forest-labs/FLUX.2-klein-base-4B", 3.876),
        ("black-forest-labs/FLUX.2-klein-9B", 9.079),
        ("black-forest-labs/FLUX.2-dev", 32.223),
        ("Tongyi-MAI/Z-Image", 6.155),
        ("Tongyi-MAI/Z-Image-Turbo", 6.155),
    ],
)
def test_published_architectures_have_the_published_sizes(hub_id, billions):
    backbone, notes = skeleton_backbone(hub_id, height=None, width=None, dtype=torch.bfloat16)
    # Half a unit in the last place that is published.
    assert sum(p.numel() for p in backbone.denoiser.parameters()) / 1e9 == pytest.approx(billions, abs=0.5 * 10**-2)
    assert hub_id in notes[0]
    encoders = {name: part for name, part in backbone.pipeline.components.items() if name.startswith("text_encoder")}
    assert set(backbone.family.text_encoders) <= {name for name, part in encoders.items() if part is not None}
    sizes = {round(sum(p.numel() for p in part.parameters()) / 1e6) for part in encoders.values()}
    # CLIP-L without and with projection, bigG, T5-XXL; Qwen3-4B and 8B, Mistral Small 24B, Qwen2.5-VL-7B; Qwen3-VL-4B.
    assert sizes <= {123, 124, 695, 4762} | {4022, 8191, 24011, 8292, 4438}


def test_a_published_reward_has_the_published_size():
    reward, _ = skeleton_reward(RewardSettings(path="yuvalkirstain/PickScore_v1"))
    assert sum(p.numel() for p in reward.model.parameters()) == 986_109_441
    assert published_pipeline("somebody/a-cat") is None


@pytest.mark.parametrize(
    ("name", "path", "millions"),
    [("imagereward", "THUDM/ImageReward", 446.2), ("aesthetic", "some/head", 304.3 + 0.8 - 0.2)],
)
def test_other_published_rewards_have_their_sizes(name, path, millions):
    """BLIP-L's checkpoint is 1.79 GB in fp32; CLIP ViT-L/14's image tower has 304.3 M, its head 0.9 M."""
    reward, notes = skeleton_reward(RewardSettings(name=name, path=path))
    assert sum(p.numel() for p in reward.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)
    assert "not on this machine" in notes[0] or "on this machine" in notes[0]


def test_hpsv3_has_the_published_size():
    """8,291,375,616 parameters of Qwen2-VL-7B, less the head over its 152,064 tokens and the 406 that HPSv3's
    vocabulary is shorter by, and the score's head."""
    reward, notes = skeleton_reward(RewardSettings(name="hpsv3"))
    head = (3584 + 1) * 1024 + (1024 + 1) * 16 + (16 + 1) * 2
    assert sum(p.numel() for p in reward.parameters()) == 8_291_375_616 - (152_064 + 406) * 3584 + head
    assert ["MizzenAI/HPSv3" in notes[0], "700" in notes[1]] == [True, True]


PATHS = {"aesthetic": "some/head", "clip": "a/vit-h-14", "clipscore": "openai/clip-vit-large-patch14"}


@pytest.mark.parametrize("name", sorted(REWARDS.keys() - {"python", "combination"}))
def test_every_reward_with_gradient_is_estimated_without_its_files(name):
    keys = {"path": PATHS.get(name, "x")} if REWARDS[name].model_fields["path"].is_required() else {}
    settings = RewardSettings(name=name, **keys)
    if settings.differentiable:
        reward, _ = skeleton_reward(settings)
        assert {p.device.type for p in reward.parameters()} == {"meta"}
    elif name in ("ocr", "remote"):  # neither is computed on the device
        reward, _ = skeleton_reward(settings)
        assert not [*reward.parameters()]
    else:
        with pytest.raises(UserError, match=f"reward.name {name} is not estimated; clip"):
            skeleton_reward(settings)


@pytest.mark.parametrize(
    ("hub_id", "largest"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 123.1),
        ("stabilityai/stable-diffusion-xl-base-1.0", 694.7),
        ("stabilityai/stable-diffusion-3.5-medium", 4762.3),
        ("black-forest-labs/FLUX.1-dev", 4762.3),
    ],
)
def test_one_text_encoder_at_a_time(hub_id, largest):
    """SD3.5's three together have 5.58 billion parameters: 10.4 GiB in bf16."""
    backbone, _ = skeleton_backbone(hub_id, height=None, width=None, dtype=torch.bfloat16)
    encoders = [getattr(backbone.pipeline, name) for name in backbone.text_encoder_names()]
    live = LiveBytes("meta")
    live.exclude(t for encoder in encoders for t in (*encoder.parameters(), *encoder.buffers()))
    with shapes_alone(), live:
        list(encode_in_turns(backbone, ["a prompt", None]))
    assert live.peak == pytest.approx(2e6 * largest, abs=0.1 * GIB)
    assert list(live.peaks) == [phases.ENCODING] and live.alive == 0


def test_the_reward_drops_its_text_tower_when_it_has_seen_the_prompts():
    reward, _ = skeleton_reward(RewardSettings(path="yuvalkirstain/PickScore_v1"))
    text, image = 352.98e6 + 1.05e6, 632.08e6  # CLIP-H's, with the text's projection
    live = LiveBytes("meta")
    live.see(reward.parameters())
    with shapes_alone(), live, phases.phase(phases.KEEPING):
        reward.keep_prompts(["a prompt"])
    assert live.peaks[phases.KEEPING].total == pytest.approx(4 * (text + image), rel=0.01)
    assert live.alive == pytest.approx(4 * image, rel=0.001)


def shipped(name: str, **changes):
    return load_config(name, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


@pytest.mark.slow
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


@pytest.mark.slow
def test_checkpointing_never_raises_a_peak_and_k_hardly():
    small = dict(data__batch_size=1, data__accumulate=1, backbone__height=256, backbone__width=256)
    small |= dict(sampler__steps=8, sampler__guidance_scale=1, samples__every=0)
    checked = small | dict(backbone__checkpoint="[denoiser,decoder]")
    one, eight = (estimate(shipped("sd15-lora-24gb.yaml", **checked, method__k=k)) for k in (1, 8))
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
