"""A LoRA attaches whole or is refused; nothing is drawn as if there were none."""

from __future__ import annotations

import pytest
import torch
from builders.backbones import BUILDERS, FAMILIES, SIZE, make_backbone
from builders.messages import says
from safetensors.torch import load_file, save_file

from rsaft_fast.backbones import LoRASettings, load_backbone, save_lora
from rsaft_fast.backbones.lora_files import find_lora, has_text_part, load_lora
from rsaft_fast.errors import UserError

TEXT_LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each family: its folder, and a LoRA of it."""
    root = tmp_path_factory.mktemp("loras")
    return {
        family: (
            root / family,
            save_lora(make_backbone(family, root / family), root / f"{family}-lora", LoRASettings(rank=2)),
        )
        for family in BUILDERS
    }


def load(made, family):
    return load_backbone(made[family][0], height=SIZE, width=SIZE)


@pytest.mark.parametrize("of", FAMILIES)
@pytest.mark.parametrize("into", FAMILIES)
def test_only_the_familys_own_attaches(made, into, of):
    backbone = load(made, into)
    if into == of:
        assert load_lora(backbone, made[of][1]) == load_lora(load(made, into), made[of][1].parent) == []
        return
    with pytest.raises(UserError) as caught:
        load_lora(backbone, made[of][1])
    assert str(made[of][1]) in str(caught.value) and "\n" not in str(caught.value)


def lacking(state):
    name = next(name for name in state if "lora_B" in name)
    return {other: tensor for other, tensor in state.items() if other != name}


def beside(name):
    pair = {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
    return lambda state: state | pair


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: {}, ["no tensors"]),
        (lambda state: {name: tensor * float("nan") for name, tensor in state.items()}, ["not finite"]),
        (lacking, ["lacks 1 ", "lora_B"]),
        (beside("unet.nowhere.to_q"), ["2 of the 66", "unet.nowhere"]),
        (beside("text_encoder_9.layers.0"), ["2 of the 66", "text_encoder_9"]),
        (beside("transformer.blocks.0"), ["2 of the 66", "transformer.blocks"]),
        (lambda state: state | {"unet.mid_block.dora_scale": torch.ones(3)}, ["DoRA"]),
        (lambda state: {"weight": torch.ones(3)}, ["could not be loaded"]),
    ],
)
def test_a_part_without_its_place_is_an_error(made, tmp_path, change, words):
    state = load_file(made["sd15"][1])
    assert len(state) == 64
    save_file(change(state), tmp_path / "changed.safetensors")
    with pytest.raises(UserError) as caught:
        load_lora(load(made, "sd15"), tmp_path / "changed.safetensors")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>404</html>"])
def test_a_damaged_file_is_an_error(made, tmp_path, content):
    (tmp_path / "lora.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=says(tmp_path / "lora.safetensors")):
        load_lora(load(made, "sd15"), tmp_path)


def test_kohyas_names_and_alpha_attach_as_diffusers_reads_them(made, tmp_path):
    """alpha 1 of rank 2 halves the update."""
    state, kohya = load_file(made["sd15"][1]), {}
    for name, tensor in state.items():
        layer, _, which = name.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        layer = f"lora_unet_{layer.replace('.', '_')}"
        kohya[f"{layer}.{'lora_down' if which == 'lora_A' else 'lora_up'}.weight"] = tensor
        kohya[f"{layer}.alpha"] = torch.tensor(1.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file({n: t * (0.5 if "lora_B" in n else 1) for n, t in state.items()}, tmp_path / "half.safetensors")
    outputs = []
    for name in ("kohya", "half"):
        backbone = load(made, "sd15")
        assert load_lora(backbone, tmp_path / f"{name}.safetensors") == []
        x = torch.ones(1, *backbone.latent_shape)
        outputs.append(backbone.predict(x, backbone.schedule(2)[0], backbone.random_conditioning(1).positive))
    assert torch.allclose(*outputs, atol=1e-6)


def test_one_that_does_nothing_is_said(made, tmp_path):
    state = {n: t * ("lora_A" in n) for n, t in load_file(made["sd15"][1]).items()}
    save_file(state, tmp_path / "zero.safetensors")
    (line,) = load_lora(load(made, "sd15"), tmp_path / "zero.safetensors")
    assert "zero" in line and "untrained" in line


def test_the_text_encoders_part_is_seen_and_attached(made, tmp_path):
    file = tmp_path / "text.safetensors"
    save_file(beside(TEXT_LAYER)(load_file(made["sd15"][1])), file)
    assert has_text_part(file) and not has_text_part(made["sd15"][1])
    backbone = load(made, "sd15")
    before = backbone.embed(["one"])["encoder_hidden_states"]
    load_lora(backbone, file)
    assert not torch.equal(before, backbone.embed(["one"])["encoder_hidden_states"])


def test_which_file_a_folder_means(tmp_path):
    with pytest.raises(UserError, match=says(tmp_path, "pytorch_lora_weights.safetensors")):
        find_lora(tmp_path)
    (tmp_path / "b.safetensors").touch()
    assert find_lora(tmp_path).name == "b.safetensors"
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(UserError, match=says(tmp_path, 2, "a.safetensors, b.safetensors")):
        find_lora(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert find_lora(tmp_path).name == "pytorch_lora_weights.safetensors"
