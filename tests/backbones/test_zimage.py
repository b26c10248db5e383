"""What Z-Image has that the others have not: lists of tensors, texts of their own lengths, time and sign reversed."""

import shutil

import pytest
import torch
from builders.backbones import PROMPTS, SIZE, make_backbone, noise_source
from builders.damages import change
from builders.messages import says
from builders.pipelines import tiny_zimage
from diffusers import DiffusionPipeline
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3ForCausalLM

from rsaft_fast.backbones import LoRASettings, add_lora, load_backbone, save_lora
from rsaft_fast.backbones.lora_formats import KOHYA_FILE, save_kohya
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.errors import UserError
from rsaft_fast.memory import denoiser_blocks
from rsaft_fast.methods import DRaFT
from rsaft_fast.recipe.config import SamplerSettings
from rsaft_fast.sampling import rollout
from rsaft_fast.sampling.branches import LENGTHS

STEPS = 3
TEXTS = ["one", PROMPTS[2], "x" * 60]
"""In their template 28, 62 and 87 tokens, of which the transformer makes 32, 64 and 96."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_zimage(tmp_path_factory.mktemp("zimage"))


def load(folder, **size):
    return load_backbone(folder, **({"height": SIZE, "width": SIZE} | size))


def drawn(backbone, conditioning):
    noise = noise_source(len(conditioning))
    latents, plan = backbone.initial_latents(noise), DRaFT().draw(STEPS, None)
    with torch.no_grad():
        end = rollout(backbone, backbone.schedule(STEPS), plan, latents, conditioning, noise)
        return backbone.decode(end.endpoints[0]).clamp(0, 1)


def theirs(folder, backbone, lora=None, texts=TEXTS, **options):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora[0], weight_name=lora[1])
    images = pipeline(
        prompt=list(texts),
        num_inference_steps=STEPS,
        latents=backbone.initial_latents(noise_source(len(texts))),
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


@pytest.mark.parametrize("w", [1.0, 5.0])
def test_pictures_of_texts_of_unequal_lengths_are_the_pipelines(folder, w):
    """24x40 pixels are 60 tokens, padded to 64: x_pad_token takes part."""
    backbone = load(folder, height=24, width=40)
    conditioning = backbone.encode(TEXTS, "ugly", guidance_scale=w)
    lengths = conditioning.positive[LENGTHS].tolist()
    assert len({-(-length // 32) for length in lengths}) == 3 and conditioning.positive["cap_feats"].shape[1] == max(
        lengths
    )
    negative = {"negative_prompt": ["ugly"] * len(TEXTS)}
    close(drawn(backbone, conditioning), theirs(folder, backbone, guidance_scale=w - 1, **negative))


def test_guidance_that_the_pipeline_would_not_make_is_refused(folder):
    with pytest.raises(UserError, match=says("sampler.guidance_scale", 0.5, -0.5, "set it to 1")):
        load(folder).encode(TEXTS, guidance_scale=0.5)


@pytest.mark.parametrize("cfg", ["separate", "rollout", "batched"])
def test_a_text_gives_the_same_alone_and_beside_longer_ones(folder, cfg):
    backbone = load(folder)
    backbone.cfg_batching = cfg
    together = backbone.encode(TEXTS, "ugly", guidance_scale=4.0)
    pictures = drawn(backbone, together)
    encoded = EncodedPrompts.encode(backbone, TEXTS, SamplerSettings(negative_prompt="ugly", guidance_scale=4.0))
    assert all(torch.equal(encoded(TEXTS).positive[name], together.positive[name]) for name in together.positive)
    noise, schedule = noise_source(3), backbone.schedule(STEPS)
    latents = backbone.initial_latents(noise)
    with torch.no_grad():
        whole = backbone.predict(latents, schedule[1], together.positive)
        for i in range(3):
            alone = together.select([i])
            assert alone.positive["cap_feats"].shape[1] == alone.positive[LENGTHS].item()
            assert torch.allclose(
                backbone.predict(latents[i : i + 1], schedule[1], alone.positive), whole[i : i + 1], atol=1e-5
            )
    close(drawn(backbone, encoded(TEXTS)), pictures)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-2


def test_time_runs_from_one_and_the_prediction_is_minus_the_velocity(folder):
    """Written from the transformer itself: it is told 1 - sigma, and noise - x0 is minus what it says."""
    backbone = load(folder)
    step, x = backbone.schedule(4)[1], backbone.initial_latents(noise_source(1))
    branch = backbone.encode(["one"]).positive
    with torch.no_grad():
        out = backbone.denoiser([x[0].unsqueeze(1)], torch.tensor([1 - step.t / 1000]), [branch["cap_feats"][0]])
        assert torch.allclose(backbone.predict(x, step, branch), -out.sample[0].squeeze(1)[None], atol=1e-6)
    assert step.sigma == pytest.approx(step.t / 1000, rel=1e-6)


def test_text_is_the_last_layer_but_one_of_qwen3_of_the_prompts_own_tokens(folder):
    backbone = load(folder)
    said = f"<|im_start|>user\n{TEXTS[1]}<|im_end|>\n<|im_start|>assistant\n"
    tokens = backbone.pipeline.tokenizer(said, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = backbone.pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    found = backbone.embed_text([TEXTS[1]])
    assert found[LENGTHS].tolist() == [tokens.shape[1]] and torch.allclose(found["cap_feats"], expected, atol=1e-5)


def test_prompts_over_the_limit_are_named_where_they_are_cut(folder):
    backbone = load(folder)
    limit, around = backbone.text_length, len(backbone.tokenizer_of("text_encoder")([""])["input_ids"][0])
    fits, cut = "x" * (limit - around), "x" * (limit - around + 1)
    assert backbone.cut_prompts([fits]) == [] and backbone.embed_text([fits])[LENGTHS].tolist() == [limit]
    (note,) = backbone.cut_prompts([fits, cut])
    assert says("text_encoder", limit, "1 of 2", limit + 1).search(note)
    assert backbone.embed_text([cut])[LENGTHS].tolist() == [limit]


def test_the_schedule_is_the_pipelines_with_a_shift_that_is_fixed_or_of_the_size(folder, tmp_path):
    dynamic = shutil.copytree(folder, tmp_path / "dynamic")
    change(dynamic / "scheduler/scheduler_config.json", use_dynamic_shifting=True)
    for one in (folder, dynamic):
        backbone = load(one)
        pipeline = DiffusionPipeline.from_pretrained(one)
        pipeline.set_progress_bar_config(disable=True)
        pipeline("one", num_inference_steps=5, height=SIZE, width=SIZE, output_type="latent", max_sequence_length=40)
        ours = [step.t for step in backbone.schedule(5)]
        assert ours == pytest.approx(pipeline.scheduler.timesteps.tolist(), rel=1e-6)


def test_turbo_is_said_to_be_distilled(tmp_path, folder):
    backbone = load(tiny_zimage(tmp_path / "turbo", shift=3.0))
    assert says("warning", "distilled", "shift", 3).search(backbone.training_notes[0])
    assert not load(folder).training_notes
    assert backbone.usual_sampling == (8, 1.0) and load(folder).usual_sampling == (50, 6.0)


def test_the_position_tables_limit_size_and_text(folder, tmp_path):
    assert load_backbone(folder).height == 128
    with pytest.raises(UserError, match=says("64x256", "128x128")):
        load(folder, height=64, width=256)
    short = shutil.copytree(folder, tmp_path / "short")
    change(short / "transformer/config.json", axes_lens=[70, 32, 32])
    assert load(short).text_length == 64 and load(folder).text_length == 88
    for keys, words in (({"axes_dims": [4, 4]}, ("axes_dims", "three")), ({"axes_dims": [4, 4, 8]}, ("axes_dims", 12))):
        change(short / "transformer/config.json", **keys)
        with pytest.raises(UserError, match=says(*words)):
            load(short)


def test_a_text_encoder_may_be_stored_with_a_head_over_its_tokens(folder, tmp_path):
    """As Qwen3-4B itself is: the weights of a `Qwen3ForCausalLM`, under an index that says `Qwen3Model`."""
    expected = load(folder)
    config = expected.pipeline.text_encoder.config
    whole = Qwen3ForCausalLM(config)
    whole.model.load_state_dict(expected.pipeline.text_encoder.state_dict())
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(other / "text_encoder")
    whole.save_pretrained(other / "text_encoder")
    for kind in ("Qwen3Model", "Qwen3ForCausalLM"):
        change(other / "model_index.json", text_encoder=["transformers", kind])
        found = load(other).embed_text(TEXTS)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.embed_text(TEXTS).items())


def test_what_is_no_z_image_is_refused(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    change(other / "model_index.json", text_encoder=["transformers", "Qwen2Model"])
    with pytest.raises(UserError, match=says("Qwen2Model", "text_encoder", "Qwen3Model")):
        load(other)


def test_blocks_are_those_that_are_checkpointed_in_the_order_of_their_calls(folder):
    backbone, called = make_backbone("zimage", folder.parent / "again"), []

    def record(block, *args):
        called.append(block)
        return checkpoint(block.__call__, *args, use_reentrant=False)

    backbone.denoiser.enable_gradient_checkpointing(record)
    x = backbone.initial_latents(noise_source(2))
    backbone.predict(x, backbone.schedule(3)[1], backbone.encode(TEXTS[:2]).positive).sum().backward()
    blocks = list(denoiser_blocks(backbone.denoiser))
    assert called == blocks and len(blocks) == 4
    assert all(p.grad is not None for p in backbone.trainable_parameters.values())


def test_both_lora_files_give_our_pictures_in_plain_diffusers(folder, tmp_path):
    backbone = load(folder)
    conditioning = backbone.encode(TEXTS[:2])
    untrained = drawn(backbone, conditioning)
    settings = LoRASettings(rank=2, alpha=5.0, targets=("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"))
    add_lora(backbone, settings)
    with torch.no_grad():
        for i, parameter in enumerate(backbone.trainable_parameters.values()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    ours = drawn(backbone, conditioning)
    assert (ours - untrained).abs().max() > 1e-2
    save_lora(backbone, tmp_path, settings)
    save_kohya(backbone, tmp_path, settings, "base")
    for file in ("pytorch_lora_weights.safetensors", KOHYA_FILE):
        close(ours, theirs(folder, backbone, lora=(tmp_path, file), texts=TEXTS[:2], guidance_scale=0.0))
