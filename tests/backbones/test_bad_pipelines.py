"""Checkpoints whose parts do not belong together end in one line that names the part."""

import shutil

import pytest
from builders.backbones import FAMILIES, PROMPTS, SIZE
from builders.damages import change
from builders.messages import says
from safetensors.torch import load_file, save_file

from rsaft_fast.backbones import ADAPTERS, adapter_for, load_backbone
from rsaft_fast.errors import UserError


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_backbone(folder, height=SIZE, width=SIZE)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


def test_what_is_no_pipeline_or_an_unknown_one(copy, tmp_path):
    assert says("diffusers", tmp_path / "absent").search(refusal(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in refusal(tmp_path / "empty")
    folder = copy("sdxl")
    change(folder / "model_index.json", _class_name="KandinskyPipeline")
    line = refusal(folder)
    assert "KandinskyPipeline" in line and all(adapter in line for adapter in ADAPTERS)


@pytest.mark.parametrize(
    "family, part, keys, words",
    [
        ("sdxl", "unet", {"cross_attention_dim": 48}, ["could not be loaded", "attn2.to_k.weight", "48"]),
        ("sdxl", "unet", {"transformer_layers_per_block": [1, 1]}, ["unet/config.json", "no place for"]),
        ("flux", "transformer", {"num_layers": 2}, ["transformer/config.json", "lacks 32"]),
        ("flux", "transformer", {"guidance_embeds": False}, ["no place for 4", "guidance_embedder"]),
        ("sd3", "transformer", {"qk_norm": "rms_norm"}, ["transformer/config.json", "lacks", "norm_"]),
        ("sd15", "unet", {"block_out_channels": [8, 32]}, ["could not be loaded", "expected shape"]),
        ("flux", "vae", {"latent_channels": 8}, ["could not be loaded", "decoder.conv_in.weight"]),
        ("flux", "text_encoder", {"hidden_size": 32}, ["could not be loaded"]),
    ],
)
def test_a_config_that_does_not_match_its_weights(copy, family, part, keys, words):
    folder = copy(family)
    change(folder / part / "config.json", **keys)
    line = refusal(folder)
    assert all(word in line for word in [str(folder), *words]), line


def test_a_denoiser_of_another_vae(copy):
    folder, other = copy("sdxl"), copy("sd15")
    shutil.rmtree(folder / "vae")
    change(other / "vae/config.json", latent_channels=3)
    weights = load_file(other / "vae/diffusion_pytorch_model.safetensors")
    for name, (dim, size) in {
        "encoder.conv_out.weight": (0, 6),
        "encoder.conv_out.bias": (0, 6),
        "quant_conv.bias": (0, 6),
        "post_quant_conv.bias": (0, 3),
        "decoder.conv_in.weight": (1, 3),
    }.items():
        weights[name] = weights[name].narrow(dim, 0, size).contiguous()
    for name, size in {"quant_conv.weight": 6, "post_quant_conv.weight": 3}.items():
        weights[name] = weights[name][:size, :size].contiguous()
    save_file(weights, other / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    shutil.copytree(other / "vae", folder / "vae")
    assert says("VAE", 3, "denoiser", 4).search(refusal(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_text_encoder_is_seen_before_anything_is_loaded(copy, family, monkeypatch):
    folder = copy(family)
    monkeypatch.setattr(adapter_for(folder), "from_pretrained", lambda *args, **options: pytest.fail("it was loaded"))
    last = adapter_for(folder).family.text_encoders[-1]
    shutil.rmtree(folder / last)
    assert says("model_index.json", last, "incomplete").search(refusal(folder))
    change(folder / "model_index.json", **{last: [None, None]})
    assert says("model_index.json", last).search(refusal(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_are_left_out_and_missed_clearly(originals, family):
    backbone = load_backbone(originals[family], height=SIZE, width=SIZE, text=False)
    assert not [
        name for name in backbone.pipeline.components if "text_encoder" in name and backbone.pipeline.components[name]
    ]
    with pytest.raises(UserError, match=says("prompts", "text_encoder")):
        backbone.encode(PROMPTS)
    drawn = backbone.random_conditioning(3)
    assert len(drawn) == 3 and drawn.negative is None
