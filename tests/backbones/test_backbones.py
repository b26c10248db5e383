"""The adapters give the pictures of plain diffusers, before and after training."""

import pytest
import torch
from builders.backbones import BUILDERS, FAMILIES, PROMPTS, SIZE, cfg, noise_source
from builders.messages import says
from builders.pipelines import tiny_sd3
from diffusers import AutoencoderKLQwenImage, DDIMScheduler, DiffusionPipeline

from rsaft_fast.backbones import LoRASettings, add_lora, load_backbone, save_lora
from rsaft_fast.errors import UserError
from rsaft_fast.methods import DRaFT
from rsaft_fast.sampling import rollout

STEPS, GUIDANCE, NEGATIVE = 4, 3.5, "blurry"


def load(folder, **options):
    return load_backbone(folder, **({"height": SIZE, "width": SIZE} | options))


def our_images(backbone, prompts=PROMPTS[:2], negative=NEGATIVE, **guidance):
    noise = noise_source(len(prompts))
    conditioning = backbone.encode(prompts, negative, **({"guidance_scale": GUIDANCE} | guidance))
    plan = DRaFT().draw(STEPS, None)
    with torch.no_grad():
        end = rollout(backbone, backbone.schedule(STEPS), plan, backbone.initial_latents(noise), conditioning, noise)
        return backbone.decode(end.endpoints[0]).clamp(0, 1)


def _klein(pipeline, options):
    """It takes the embedding of what guidance steers away from, not the words."""
    length = {"max_sequence_length": pipeline.tokenizer.model_max_length}
    negative, _ = pipeline.encode_prompt(options["negative_prompt"], **length)
    return length | {"negative_prompt": None, "negative_prompt_embeds": negative}


OWN_OPTIONS = {
    "FluxPipeline": lambda pipeline, options: {"max_sequence_length": pipeline.tokenizer_2.model_max_length},
    "Flux2KleinPipeline": _klein,
    "QwenImagePipeline": lambda pipeline, options: {
        "guidance_scale": None,
        "true_cfg_scale": options["guidance_scale"],
    },
    # Its scale is added to the prediction with the prompt, ours to that without.
    "ZImagePipeline": lambda pipeline, options: {
        "max_sequence_length": pipeline.tokenizer.model_max_length,
        "guidance_scale": options["guidance_scale"] - 1,
    },
    "Krea2Pipeline": lambda pipeline, options: {"guidance_scale": options["guidance_scale"] - 1},
}


def diffusers_images(pipeline, latents, prompts=PROMPTS[:2], **options):
    if hasattr(pipeline, "unet"):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(negative_prompt=[NEGATIVE] * len(prompts), guidance_scale=GUIDANCE) | options
    options |= OWN_OPTIONS.get(type(pipeline).__name__, lambda pipeline, options: {})(pipeline, options)
    options = {name: value for name, value in options.items() if value is not None}
    return pipeline(
        prompt=list(prompts),
        num_inference_steps=STEPS,
        latents=latents,
        height=SIZE,
        width=SIZE,
        output_type="pt",
        **options,
    ).images


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return BUILDERS[request.param](tmp_path_factory.mktemp(request.param))


def test_images_are_those_of_diffusers(folder):
    backbone = load(folder)
    theirs = diffusers_images(DiffusionPipeline.from_pretrained(folder), backbone.initial_latents(noise_source(2)))
    assert (our_images(backbone) - theirs).abs().max() < 1e-4
    assert theirs.std() > 0.05


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_saved_lora_gives_the_same_images_in_plain_diffusers(folder, tmp_path, alpha):
    backbone = load(folder)
    untrained = our_images(backbone)
    settings = LoRASettings(rank=4, alpha=alpha)
    add_lora(backbone, settings)
    assert torch.equal(our_images(backbone), untrained), "B starts at zero"
    with torch.no_grad():
        for name, p in backbone.trainable_parameters.items():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    ours = our_images(backbone)
    assert (ours - untrained).abs().max() > 1e-2
    file = save_lora(backbone, tmp_path / "lora", settings)
    assert file.is_file()
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "lora")
    theirs = diffusers_images(pipeline, backbone.initial_latents(noise_source(2)))
    assert (ours - theirs).abs().max() < 1e-4


def test_lora_trains_adapters_in_fp32_over_a_bf16_base(folder):
    backbone = load(folder, dtype=torch.bfloat16)
    add_lora(backbone, LoRASettings(rank=2))
    assert {p.dtype for p in backbone.trainable_parameters.values()} == {torch.float32}
    assert all("lora_" in name for name in backbone.trainable_parameters)
    x = backbone.initial_latents(noise_source(1))
    assert x.dtype == torch.float32
    f = backbone.predict(x, backbone.schedule(4)[1], backbone.encode(["one"]).positive)
    assert f.dtype == torch.float32 and torch.isfinite(f).all()


def test_lora_is_the_same_for_the_same_seed_and_leaves_global_randomness_alone(folder):
    states = []
    for seed in (0, 0, 1):
        backbone = load(folder)
        torch.manual_seed(11)
        add_lora(backbone, LoRASettings(rank=2), seed)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(11)))
        states.append(torch.cat([p.detach().flatten() for p in backbone.trainable_parameters.values()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_decode_inverts_encode_scaling_and_differentiates(folder):
    backbone = load(folder, dtype=torch.float64)
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    latents = backbone.encode_images(images)
    assert latents.shape == (1, *backbone.latent_shape) and latents.dtype == torch.float64
    vae, found = backbone.pipeline.vae, backbone.decode(latents)
    if isinstance(vae, AutoencoderKLQwenImage):  # of videos, and clamped
        frames = vae.decode(vae.encode(2 * images.unsqueeze(2) - 1).latent_dist.mean).sample
        direct, found = frames.squeeze(2) / 2 + 0.5, found.clamp(0, 1)
        # Its upsampling rounds to fp32; the strips do not, and finite differences want all digits.
        backbone.recompute(["decoder-strips"])
    else:
        direct = vae.decode(vae.encode(2 * images - 1).latent_dist.mean).sample / 2 + 0.5
    assert torch.allclose(found, direct, atol=1e-10)
    assert torch.autograd.gradcheck(
        lambda x: backbone.decode(x).mean(dim=(1, 2)), latents.requires_grad_(), fast_mode=True
    )


def test_negative_prompts_and_batches_do_not_mix(folder):
    backbone = load(folder)
    together = backbone.encode(PROMPTS, "blurry", **cfg(backbone, 2.0))
    alone = backbone.encode(PROMPTS[1:2], ["blurry"], **cfg(backbone, 2.0))
    for branch in ("positive", "negative"):
        one = getattr(together.select([1]), branch)
        for name, tensor in getattr(alone, branch).items():
            assert torch.allclose(tensor, one[name], atol=1e-6)
    assert together.negative is not None and backbone.encode(PROMPTS).negative is None
    with pytest.raises(UserError, match=says("negative", 1, 4)):
        backbone.encode(PROMPTS, ["blurry"], **cfg(backbone, 2.0))


def test_resolution_must_divide(folder):
    divisor = load(folder).size_divisor
    with pytest.raises(UserError, match=says("height", 32 + divisor // 2, divisor, 32, 32 + divisor)):
        load(folder, height=32 + divisor // 2)
    wide = load(folder, height=16, width=24)
    assert our_images(wide).shape == (2, 3, 16, 24)


def test_sd3_position_table_limits_the_size(tmp_path):
    with pytest.raises(UserError, match=says("128x128", 64)):
        load_backbone(tiny_sd3(tmp_path / "sd3"), height=128, width=128)


def test_dropout_in_the_trained_network_is_refused(folder):
    backbone = load(folder)
    next(m for m in backbone.denoiser.modules() if isinstance(m, torch.nn.Dropout)).p = 0.1
    with pytest.raises(UserError, match=says("dropout", 0.1, "set dropout to 0")):
        backbone.train_all_parameters()


def test_unknown_lora_targets_are_refused(folder):
    with pytest.raises(UserError, match=says("no_such_layer", "parameters.lora.targets")):
        add_lora(load(folder), LoRASettings(targets=("no_such_layer",)))
