"""What FLUX.2 has that FLUX.1 has not: normalised latents, a shift by the number of steps, fused projections, Qwen3."""

import shutil

import pytest
import torch
from builders.backbones import PROMPTS, SIZE, make_backbone, noise_source, with_random_lora
from builders.damages import change
from builders.messages import says
from builders.pipelines import tiny_flux2_dev, tiny_klein
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps
from numpy import linspace

from rsaft_fast.algorithms.flow_grpo import FlowGRPO
from rsaft_fast.backbones import FLUX2Dev, LoRASettings, add_lora, load_backbone, random_backbone, save_lora
from rsaft_fast.backbones.flux2 import _patchify, _unpatchify
from rsaft_fast.backbones.lora_formats import KOHYA_FILE, save_kohya
from rsaft_fast.errors import UserError
from rsaft_fast.methods import DRaFT
from rsaft_fast.methods import FlowGRPO as Settings
from rsaft_fast.rewards import RewardSpec
from rsaft_fast.rewards.python import FunctionReward
from rsaft_fast.sampling import flow_schedule, rollout

STEPS = 3


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    return tiny_klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    return tiny_klein(tmp_path_factory.mktemp("distilled"), is_distilled=True)


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return tiny_flux2_dev(tmp_path_factory.mktemp("dev"))


def load(folder, **size):
    return load_backbone(folder, **({"height": SIZE, "width": SIZE} | size))


def drawn(backbone, **guidance):
    noise = noise_source(2)
    conditioning = backbone.encode(PROMPTS[:2], **guidance)
    latents, plan = backbone.initial_latents(noise), DRaFT().draw(STEPS, None)
    with torch.no_grad():
        end = rollout(backbone, backbone.schedule(STEPS), plan, latents, conditioning, noise)
        return backbone.decode(end.endpoints[0]).clamp(0, 1)


def theirs(folder, backbone, lora=None, **options):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora[0], weight_name=lora[1])
    images = pipeline(
        prompt=list(PROMPTS[:2]),
        num_inference_steps=STEPS,
        latents=backbone.initial_latents(noise_source(2)),
        max_sequence_length=backbone.text_length,
        height=backbone.height,
        width=backbone.width,
        output_type="pt",
        **options,
    ).images
    assert images.std() > 0.05
    return images


def close(ours, truth):
    assert ours.shape == truth.shape and (ours - truth).abs().max() < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_kleins_pictures_are_its_pipelines_also_where_they_are_not_square(klein, guidance):
    """Its pipeline guides away from the empty prompt."""
    backbone = load(klein, height=24, width=40)
    close(drawn(backbone, guidance_scale=guidance), theirs(klein, backbone, guidance_scale=guidance))


def test_a_distilled_klein_is_not_guided_and_said_to_be_distilled(distilled, klein):
    backbone = load(distilled)
    assert says("warning", "distilled", "is_distilled").search(backbone.training_notes[0])
    assert not load(klein).training_notes and not backbone.notes  # it may be sampled from without a word
    close(drawn(backbone), theirs(distilled, backbone, guidance_scale=4.0))
    with pytest.raises(UserError, match=says("sampler.guidance_scale", 4.0, "distilled", "FLUX.2-klein-base")):
        backbone.encode(PROMPTS, guidance_scale=4.0)
    assert backbone.usual_sampling == (4, 1.0) and load(klein).usual_sampling == (50, 4.0)
    reward = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)), RewardSpec("mean"), differentiable=False)
    assert says(4, "distilled").search(FlowGRPO(backbone, reward, Settings(), 4).notes[0])


def test_devs_pictures_are_its_pipelines(dev):
    backbone = load(dev)
    assert isinstance(backbone, FLUX2Dev) and backbone.embeds_guidance
    for scale in (1.0, 5.0):
        conditioning = backbone.encode(PROMPTS[:2], "ugly", guidance_scale=scale)
        assert conditioning.negative is None and conditioning.guidance_scale == 1.0
        close(drawn(backbone, guidance_scale=scale), theirs(dev, backbone, guidance_scale=scale))
    assert (drawn(backbone, guidance_scale=1.0) - drawn(backbone, guidance_scale=5.0)).abs().max() > 1e-3
    with pytest.raises(UserError, match=says("sampler.true_cfg_scale", 2.0, "sampler.guidance_scale")):
        backbone.encode(PROMPTS, true_cfg_scale=2.0)


def test_devs_prompts_are_read_by_the_tokenizer_in_its_processor(dev, tmp_path):
    """The published index names the processor, which needs torchvision."""
    folder = shutil.copytree(dev, tmp_path / "dev")
    change(folder / "model_index.json", tokenizer=["transformers", "PixtralProcessor"])
    ours, expected = load(folder), load(dev)
    assert ours.cut_prompts(PROMPTS) == [] and len(ours.cut_prompts(["x" * 100])) == 1
    assert torch.equal(*(b.embed_text(["one"])["encoder_hidden_states"] for b in (ours, expected)))
    change(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
    with pytest.raises(UserError, match=says("CLIPTokenizer", "tokenizer", "PixtralProcessor")):
        load(folder)


def test_text_is_three_hidden_layers_of_qwen3_in_its_template(klein):
    """Written from the layers' numbers: hidden layers 9, 18 and 27 side by side, padding to the full length."""
    backbone = load(klein)
    tokenizer, encoder = backbone.pipeline.tokenizer, backbone.pipeline.text_encoder
    said = f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    tokens = tokenizer(said, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = encoder.model(tokens, output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[layer] for layer in (9, 18, 27)], dim=-1)
    found = backbone.embed_text([PROMPTS[0]])["encoder_hidden_states"]
    assert found.shape == (1, backbone.text_length, backbone.denoiser.config.joint_attention_dim)
    assert torch.allclose(found[:, : tokens.shape[1]], expected, atol=1e-5)


def test_prompts_over_the_limit_are_named_where_they_are_cut(klein):
    backbone = load(klein)
    limit = backbone.text_length
    around = len(backbone.tokenizer_of("text_encoder")([""])["input_ids"][0])
    fits, cut = "x" * (limit - around), "x" * (limit - around + 1)
    assert backbone.cut_prompts([fits]) == []
    (note,) = backbone.cut_prompts([fits, cut])
    assert says("text_encoder", limit, "1 of 2", limit + 1).search(note)


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096, 6144])
def test_the_schedule_depends_on_size_and_steps_as_the_pipelines_does(num_tokens):
    config = dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    firsts = set()
    for num_steps in (1, 4, 28, 50):
        truth = FlowMatchEulerDiscreteScheduler(**config)
        unshifted = linspace(1.0, 1 / num_steps, num_steps)
        mu = compute_empirical_mu(num_tokens, num_steps)
        retrieve_timesteps(truth, num_steps, "cpu", sigmas=unshifted, mu=mu)
        steps = flow_schedule(FlowMatchEulerDiscreteScheduler(**config), num_steps, mu, unshifted)
        assert [s.t for s in steps] == truth.timesteps.tolist()
        firsts.add(mu)
    assert len(firsts) == (1 if num_tokens > 4300 else 4)


def test_the_backbones_schedule_is_the_one_its_pipeline_ran(klein):
    backbone = load(klein)
    pipeline = DiffusionPipeline.from_pretrained(klein)
    pipeline.set_progress_bar_config(disable=True)
    schedules = []
    for steps in (3, 7):
        options = dict(num_inference_steps=steps, max_sequence_length=8, guidance_scale=1.0, output_type="latent")
        pipeline(prompt="one", height=SIZE, width=SIZE, **options)
        schedules.append(pipeline.scheduler.timesteps.tolist())
        assert [s.t for s in backbone.schedule(steps)] == schedules[-1]


def test_latents_are_those_of_the_pipeline(klein):
    backbone = load(klein, height=24, width=40)
    x = torch.randn(2, 4, 12, 20)
    patches = _patchify(x)
    assert torch.equal(patches, Flux2KleinPipeline._patchify_latents(x)) and torch.equal(_unpatchify(patches), x)
    assert patches.shape[1:] == backbone.latent_shape == (16, 6, 10)
    ids = Flux2KleinPipeline._prepare_latent_ids(patches)[0]
    assert torch.equal(backbone._image_ids, ids.float())
    assert torch.equal(backbone._text_ids(5), Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, 5, 1))[0].float())
    assert torch.allclose(backbone.from_vae(backbone.to_vae(patches)), patches, atol=1e-5)


def test_adapters_reach_the_fused_projections_and_every_reader_finds_them(klein, tmp_path):
    backbone = load(klein)
    untrained = drawn(backbone)
    settings = LoRASettings(rank=2, alpha=5.0)
    add_lora(backbone, settings)
    names = {name.partition(".lora_")[0] for name in backbone.trainable_parameters}
    assert {
        f"single_transformer_blocks.{i}.attn.{layer}" for i in range(2) for layer in ("to_qkv_mlp_proj", "to_out")
    } < names
    assert "transformer_blocks.0.attn.to_out.0" in names and len(names) == 8 + 2 * 2
    with torch.no_grad():
        for i, parameter in enumerate(backbone.trainable_parameters.values()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    ours = drawn(backbone)
    assert (ours - untrained).abs().max() > 1e-2
    save_lora(backbone, tmp_path, settings)
    save_kohya(backbone, tmp_path, settings, "base")
    for file in ("pytorch_lora_weights.safetensors", KOHYA_FILE):
        close(ours, theirs(klein, backbone, lora=(tmp_path, file), guidance_scale=1.0))


@pytest.mark.parametrize("layer", ["to_qkv_mlp_proj", "linear_in"])
def test_a_gradient_reaches_every_adapter(klein, layer):
    backbone = with_random_lora(load(klein))
    if layer == "linear_in":
        backbone = load(klein)
        add_lora(backbone, LoRASettings(rank=2, targets=("linear_in", "linear_out")))
        for parameter in backbone.trainable_parameters.values():
            torch.nn.init.normal_(parameter, std=0.3)
    x = backbone.initial_latents(noise_source(2))
    out = backbone.predict(x, backbone.schedule(3)[1], backbone.encode(PROMPTS[:2]).positive)
    out.square().sum().backward()
    assert any(layer in name for name in backbone.trainable_parameters)
    # Of the text's part of the last double block nothing is lost: the single blocks read it.
    assert all(p.grad is not None and p.grad.any() for p in backbone.trainable_parameters.values())


def test_what_does_not_belong_together_is_refused(klein, tmp_path):
    folder = shutil.copytree(klein, tmp_path / "klein")
    change(folder / "model_index.json", text_encoder=["transformers", "Qwen2ForCausalLM"])
    with pytest.raises(UserError, match=says("Qwen2ForCausalLM", "text_encoder", "Qwen3ForCausalLM")):
        load(folder)
    folder = shutil.copytree(klein, tmp_path / "axes")
    change(folder / "transformer/config.json", axes_dims_rope=[2, 2, 2])
    with pytest.raises(UserError, match=says("axes_dims_rope", "attention_head_dim", 8)):
        load(folder)
    folder = shutil.copytree(klein, tmp_path / "width")
    change(folder / "text_encoder/config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=says("text_encoder", "lm_head.weight")):
        load(folder)
    folder = shutil.copytree(klein, tmp_path / "template")
    (folder / "tokenizer/chat_template.jinja").unlink()
    with pytest.raises(UserError, match=says("text encoders", "chat_template")):
        load(folder).encode(PROMPTS[:1])


def test_the_published_sizes_are_taken_by_their_hub_ids():
    backbone = random_backbone("klein-9b", device="meta", dtype=torch.bfloat16)
    targets = set(backbone.lora_targets)
    linear = [n for n, m in backbone.denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
    reached = [n for n in linear if any(n == t or n.endswith(f".{t}") for t in targets)]
    assert len(reached) == 8 * 8 + 24 * 2


def test_half_precision_keeps_latents_whole(klein):
    backbone = make_backbone("klein", klein.parent / "bf16", dtype=torch.bfloat16)
    x = backbone.initial_latents(noise_source(1))
    f = backbone.predict(x, backbone.schedule(2)[0], backbone.encode(["one"]).positive)
    assert x.dtype == f.dtype == torch.float32 and f.shape == x.shape and torch.isfinite(f).all()
