"""A LoRA in kohya's format has the names that other programs look for, and the same numbers."""

from __future__ import annotations

import json

import pytest
import torch
from builders.backbones import BUILDERS, FAMILIES, PROMPTS, SIZE, make_backbone
from diffusers import DiffusionPipeline
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors import safe_open
from safetensors.torch import load_file

from rsaft_fast.backbones import LoRASettings, add_lora, load_backbone, random_backbone, save_lora
from rsaft_fast.backbones.lora_formats import KOHYA_FILE, kohya_places, kohya_state, save_kohya

RANK, ALPHA = 2, 3.0


def adapted(spec, targets=None):
    """Adapters of a full-size architecture as peft would name them, drawn at a small rank."""
    backbone = random_backbone(spec, device="meta")
    targets = targets or backbone.lora_targets
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, module in backbone.denoiser.named_modules():
        if isinstance(module, torch.nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets):
            rows, columns = module.weight.shape
            state[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
            state[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    return backbone, state


def layers(tensors):
    return {name.partition(".")[0] for name in tensors}


def ldm_attentions(channel_mult, blocks, depths, middle):
    """The transformers of the original UNet, in the order in which its constructor makes them (openaimodel.py of
    generative-models): name and number of blocks. Each resolution's resnets are followed by a resampling."""
    found, number = [], 1
    for level in range(len(channel_mult)):
        for _ in range(blocks):
            found.append((f"input_blocks_{number}_1", depths[level]))
            number += 1
        number += level < len(channel_mult) - 1
    found.append(("middle_block_1", middle))
    number = 0
    for level in reversed(range(len(channel_mult))):
        for _ in range(blocks + 1):
            found.append((f"output_blocks_{number}_1", depths[level]))
            number += 1
    return [(name, depth) for name, depth in found if depth]


def diffusers_attentions():
    """Those of Stable Diffusion 1 by diffusers' names, as sd-scripts keeps them."""
    down = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    up = [f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)]
    return [(name, 1) for name in (*down, "mid_block_attentions_0", *up)]


@pytest.mark.parametrize(
    "spec, attentions, count",
    [
        ("sd15", diffusers_attentions(), 128),
        ("sdxl", ldm_attentions((1, 2, 4), 2, (0, 2, 10), 10), 560),
    ],
)
def test_unets_have_all_the_names_of_sd_scripts(spec, attentions, count):
    backbone, state = adapted(spec)
    tensors = kohya_state(state, ALPHA, kohya_places(backbone))
    expected = {
        f"lora_unet_{name}_transformer_blocks_{block}_{attention}_{part}"
        for name, depth in attentions
        for block in range(depth)
        for attention in ("attn1", "attn2")
        for part in ("to_q", "to_k", "to_v", "to_out_0")
    }
    assert layers(tensors) == expected and len(expected) == count
    assert {name.partition(".")[2] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}


@pytest.mark.parametrize(
    "spec, count",
    [("sd35-medium", 24 * 3 + 23), ("flux1", 19 * 4 + 38), ("klein-9b", 8 * 4 + 24 * 2), ("z-image", 34 * 2)]
    + [("qwen-image", 60 * 8), ("krea-2", 32 * 5)],
)
def test_transformers_have_the_names_of_their_own_code(spec, count):
    backbone, state = adapted(spec)
    tensors = kohya_state(state, ALPHA, kohya_places(backbone))
    config = backbone.denoiser.config
    if spec == "flux1":
        expected = {f"double_blocks_{i}_{side}_attn_{part}" for i in range(19) for side in ("img", "txt")
                    for part in ("qkv", "proj")} | {f"single_blocks_{i}_linear1" for i in range(38)}  # fmt: skip
    elif spec == "klein-9b":
        expected = {f"double_blocks_{i}_{side}_attn_{part}" for i in range(8) for side in ("img", "txt")
                    for part in ("qkv", "proj")} | {f"single_blocks_{i}_linear{n}" for i in range(24)
                    for n in (1, 2)}  # fmt: skip
    elif spec == "qwen-image":
        # As musubi-tuner has them, whose code of the model has diffusers' names.
        parts = ("to_q", "to_k", "to_v", "to_out_0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        expected = {f"transformer_blocks_{i}_attn_{part}" for i in range(60) for part in parts}
    elif spec == "krea-2":
        lists = {"blocks": 28, "txtfusion_layerwise_blocks": 2, "txtfusion_refiner_blocks": 2}
        expected = {f"{name}_{i}_attn_{part}" for name, count in lists.items() for i in range(count)
                    for part in ("wq", "wk", "wv", "wo", "gate")}  # fmt: skip
    elif spec == "z-image":
        # As ComfyUI's own table has them (comfy/utils.py, z_image_to_diffusers): query, key and value are one layer.
        lists = {"layers": 30, "noise_refiner": 2, "context_refiner": 2}
        expected = {f"{name}_{i}_attention_{part}" for name, count in lists.items() for i in range(count)
                    for part in ("qkv", "out")}  # fmt: skip
    else:
        expected = {f"joint_blocks_{i}_{side}_block_attn_{part}" for i in range(24) for side in ("x", "context")
                    for part in ("qkv", "proj")} - {"joint_blocks_23_context_block_attn_proj"}  # fmt: skip
    assert layers(tensors) == {f"lora_unet_{name}" for name in expected} and len(expected) == count
    place = kohya_places(backbone)
    width = config.dim if spec == "z-image" else config.num_attention_heads * config.attention_head_dim
    for layer, (down, up) in pairs(state).items():
        key = "lora_unet_" + place(layer).name.replace(".", "_")
        first = place(layer).block * width
        rows = tensors[f"{key}.lora_up.weight"].double() @ (tensors[f"{key}.lora_down.weight"].double() @ probe(down))
        rows *= tensors[f"{key}.alpha"].item() / len(tensors[f"{key}.lora_down.weight"])
        truth = ALPHA / RANK * up.double() @ (down.double() @ probe(down))
        assert torch.allclose(rows[first : first + len(up)], truth), layer


def pairs(state):
    """A and B of each layer of a peft state."""
    names = [name for name in state if ".lora_A." in name]
    return {n.partition(".lora_A")[0]: (state[n], state[n.replace("lora_A", "lora_B")]) for n in names}


def probe(down):
    """An input: the product of a full-size A and B themselves would be gigabytes."""
    return torch.linspace(-1, 1, down.shape[1], dtype=torch.float64)


def delta(tensors, key):
    down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
    return tensors[f"{key}.alpha"].item() / len(down) * up @ down


@pytest.mark.parametrize("spec", ["sdxl", "flux1", "klein-9b", "z-image", "qwen-image"])
def test_diffusers_finds_every_layer_of_a_full_sized_file(spec):
    backbone, state = adapted(spec)
    tensors = kohya_state(state, ALPHA, kohya_places(backbone))
    if spec == "flux1":
        found = theirs._convert_kohya_flux_lora_to_diffusers(dict(tensors))
        found = pairs({name.removeprefix("transformer."): tensor for name, tensor in found.items()})
        # The MLP's input shares a layer with query, key and value there; its part of the update is zero.
        for name in [name for name in found if name.endswith(".proj_mlp")]:
            assert not found.pop(name)[1].any()
    elif spec in ("klein-9b", "z-image", "qwen-image"):
        convert = {
            "klein-9b": theirs._convert_kohya_flux2_lora_to_diffusers,
            "qwen-image": theirs._convert_non_diffusers_qwen_lora_to_diffusers,
            "z-image": theirs._convert_non_diffusers_z_image_lora_to_diffusers,
        }[spec]
        found = pairs({name.removeprefix("transformer."): tensor for name, tensor in convert(dict(tensors)).items()})
    else:
        mapped = theirs._maybe_map_sgm_blocks_to_diffusers(dict(tensors), backbone.denoiser.config)
        converted, alphas = theirs._convert_non_diffusers_lora_to_diffusers(mapped)
        assert set(alphas.values()) == {ALPHA}
        found = {}
        for name in (name for name in converted if ".down." in name):
            layer = name.removeprefix("unet.").replace(".processor", "").partition("_lora.down")[0]
            layer += ".0" * layer.endswith("to_out")
            found[layer] = converted[name], ALPHA / RANK * converted[name.replace(".down.", ".up.")]
    assert set(found) == set(pairs(state))
    for layer, (down, up) in pairs(state).items():
        theirs_down, theirs_up = (tensor.double() for tensor in found[layer])
        truth = ALPHA / RANK * up.double() @ (down.double() @ probe(down))
        assert torch.allclose(theirs_up @ (theirs_down @ probe(down)), truth, rtol=1e-5, atol=1e-4), layer


def test_other_layers_of_the_xl_unet_are_those_of_the_published_checkpoint():
    backbone, _ = adapted("sdxl", ("nothing",))
    place = kohya_places(backbone)
    # Pairs of the public conversion table of sd-scripts (library/sdxl_model_util.py, make_unet_conversion_map).
    for ours, original in {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "down_blocks.0.resnets.1.time_emb_proj": "input_blocks.2.0.emb_layers.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "mid_block.resnets.0.conv1": "middle_block.0.in_layers.2",
        "mid_block.attentions.0.norm": "middle_block.1.norm",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
        "up_blocks.1.attentions.0.transformer_blocks.1.ff.net.2": "output_blocks.3.1.transformer_blocks.1.ff.net.2",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
        "conv_out": "out.2",
    }.items():
        assert place(ours).name == original


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_values_are_the_trained_ones(family, alpha, tmp_path):
    backbone = load_backbone(BUILDERS[family](tmp_path / "base"), height=SIZE, width=SIZE)
    settings = LoRASettings(rank=RANK, alpha=alpha)
    add_lora(backbone, settings)
    with torch.no_grad():
        for index, parameter in enumerate(backbone.trainable_parameters.values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    plain = load_file(save_lora(backbone, tmp_path, settings))
    file = save_kohya(backbone, tmp_path, settings, "an/id")
    assert file == tmp_path / KOHYA_FILE
    tensors, place = load_file(file), kohya_places(backbone)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    seen = set()
    for name, down in plain.items():
        layer, a, _ = name.removeprefix(f"{backbone.denoiser_name}.").partition(".lora_A.weight")
        if not a:
            continue
        up = plain[name.replace("lora_A", "lora_B")].double()
        where = place(layer)
        first = sum(where.blocks[: where.block]) if where.blocks else 0
        found = delta(tensors, "lora_unet_" + where.name.replace(".", "_"))[first : first + len(up)]
        # diffusers' file holds B with alpha / rank folded in, rounded to fp32.
        assert torch.allclose(found, up @ down.double(), rtol=1e-6, atol=2e-6)
        seen.add(where.name)
    assert {f"lora_unet_{name.replace('.', '_')}" for name in seen} == layers(tensors)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["ss_network_dim"] == "2" and float(header["ss_network_alpha"]) == (alpha or RANK)
    assert header["ss_sd_model_name"] == "an/id" and "/lora" in header["modelspec.architecture"]
    # By these AUTOMATIC1111 sorts a file under a base model (extensions-builtin/Lora/network.py).
    assert header["ss_base_model_version"].startswith("sdxl_") == (family == "sdxl") and header["ss_v2"] == "False"
    assert str(tmp_path) not in json.dumps(header)
    written = file.read_bytes()
    # Eleven texts come in order by chance once in forty million times.
    again = [save_kohya(backbone, tmp_path, settings, "an/id").read_bytes() for _ in range(2)]
    assert again == [written, written]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_draws_the_same_pictures_from_either_file(family, tmp_path):
    backbone = make_backbone(family, tmp_path / "base")
    settings = LoRASettings(rank=2, alpha=5.0)
    save_lora(backbone, tmp_path / "lora", settings)
    save_kohya(backbone, tmp_path / "lora", settings, "base")
    pictures = {}
    for name in ("none", "pytorch_lora_weights.safetensors", KOHYA_FILE, "folder"):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "base")
        pipeline.set_progress_bar_config(disable=True)
        if name != "none":
            weights = {} if name == "folder" else {"weight_name": name}
            pipeline.load_lora_weights(tmp_path / "lora", **weights)
        options = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "output_type": "pt"}
        pictures[name] = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images
    none, plain, kohya, folder = pictures.values()
    assert (plain - none).abs().max() > 1e-2
    assert (kohya - plain).abs().max() < 1e-5 and torch.equal(folder, plain)


def test_a_layer_without_a_name_leaves_the_file_out(tmp_path):
    backbone = load_backbone(BUILDERS["flux"](tmp_path / "base"), height=SIZE, width=SIZE)
    settings = LoRASettings(rank=2, targets=("to_q", "x_embedder"))
    add_lora(backbone, settings)
    assert save_kohya(backbone, tmp_path, settings, "base") is None
    assert not (tmp_path / KOHYA_FILE).exists()
