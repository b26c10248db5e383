"""A backbone from outside the package trains, is estimated, checkpointed, resumed and sampled by the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from builders.recipes import PROMPTS
from doors.toy_backbone import made_by_a_function
from safetensors.torch import load_file

from rsaft_fast import finetune
from rsaft_fast.backbones import LoRASettings, add_lora, load_backbone, save_lora, traits_of
from rsaft_fast.backbones.lora_files import load_lora
from rsaft_fast.backbones.turns import encode_in_turns
from rsaft_fast.cli import main
from rsaft_fast.errors import UserError
from rsaft_fast.phases import SAMPLING

TOY = "python:doors.toy_backbone:ToyBackbone"


def recipe(folder: Path, out: str, **changes) -> Path:
    """A recipe file of a small run of the toy against the playground's reward."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    raw = {
        "output_dir": str(folder / out),
        "max_steps": 4,
        "checkpoint_every": 2,
        "backbone": {"path": TOY, "device": "cpu"},
        "parameters": {"train": "full"},
        "sampler": {"steps": 3, "guidance_scale": 2.0},
        "method": {"name": "draft", "k": 2},
        "smoothing": {"image": {"radius": 0.3}, "parameters": {"rho": 0.2}},
        "reward": {"path": "playground/fair"},
        "data": {"prompts": str(prompts), "batch_size": 2},
        "optimizer": {"lr": 1e-2},
        "samples": {"every": 4, "count": 2},
        "logging": {"tensorboard": False},
    }
    file = folder / f"{out}.yaml"
    file.write_text(yaml.safe_dump(raw | changes))
    return file


def run(*command: str | Path) -> None:
    assert main([str(part) for part in command]) == 0


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "denoiser" / "model.safetensors")


def test_it_trains_resumes_to_the_same_bits_and_is_sampled(tmp_path):
    run("train", recipe(tmp_path, "whole"))
    run("train", recipe(tmp_path, "halves", max_steps=2))
    run("train", recipe(tmp_path, "halves"), "resume=auto")
    whole, halves = trained(tmp_path / "whole"), trained(tmp_path / "halves")
    fresh = load_backbone(TOY).denoiser.state_dict()
    assert whole.keys() == fresh.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]) and not torch.equal(tensor, fresh[name])
    steps = [json.loads(line)["step"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if step] == sorted(set(steps) - {0})
    assert "ToyBackbone" in (tmp_path / "whole" / "denoiser" / "README.md").read_text()
    run("sample", "--run", tmp_path / "whole", "--prompts", "a red circle", "--output", tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").glob("*_seed_*.png"))) == 1


def test_an_object_trains_in_place_of_what_the_recipe_names(tmp_path):
    mine = made_by_a_function(height=16, width=16, dtype=torch.float32, device=torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in mine.denoiser.requires_grad_(False).state_dict().items()}
    finetune(recipe(tmp_path, "run"), ["max_steps=1", "samples.every=0"], backbone=mine)
    after = trained(tmp_path / "run")
    assert not any(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(torch.equal(tensor, after[name]) for name, tensor in mine.denoiser.state_dict().items())


def test_its_memory_is_estimated(tmp_path, capsys):
    run("estimate", recipe(tmp_path, "run"), "--quick", "--json")
    found = json.loads(capsys.readouterr().out)
    parameters = sum(p.numel() for p in load_backbone(TOY).denoiser.parameters())
    assert 4 * parameters <= found["standing"]["denoiser, trained"] < 4 * parameters + 6 * 512  # CUDA's blocks
    assert SAMPLING in {phase["name"] for phase in found["phases"]}


def test_lora_goes_to_the_layers_that_it_names(tmp_path):
    backbone = load_backbone(TOY, dtype=torch.bfloat16)
    add_lora(backbone, LoRASettings(rank=2, alpha=4))
    with torch.no_grad():
        for parameter in backbone.trainable_parameters.values():
            parameter.fill_(1.0)
    state = load_file(save_lora(backbone, tmp_path, LoRASettings(rank=2, alpha=4)))
    assert {name.partition(".lora_")[0] for name in state} == {"of_text"}
    assert all(bool((t == (2.0 if ".lora_B" in name else 1.0)).all()) for name, t in state.items())
    with pytest.raises(UserError, match="no pipeline"):
        load_lora(backbone, tmp_path)
    backbone.lora_targets = ()
    with pytest.raises(UserError, match="parameters.lora.targets"):
        add_lora(backbone, LoRASettings())


def test_prompts_are_encoded_one_by_one():
    rows = list(encode_in_turns(load_backbone(TOY), ["ab", None]))
    assert [row["text"].shape for row in rows] == [(1, 6), (1, 6)] and not torch.equal(rows[0]["text"], rows[1]["text"])


def test_a_function_that_says_what_it_returns_makes_one_too():
    backbone = load_backbone("python:doors.toy_backbone:made_by_a_function", height=64)
    assert backbone.schedule(2)[0].sigma == 0.9 and backbone.latent_shape == (4, 16, 8)
    assert not backbone.trainable_parameters and not backbone.denoiser.training
    assert traits_of(TOY).denoiser_name == "denoiser"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("python:doors.toy_backbone:unannotated", "annotated"),
        ("python:os:system", "annotated"),
        ("python:doors.toy_backbone:Absent", "Absent"),
        ("python:doors.no_such_file:Toy", "doors.no_such_file"),
        ("python:doors.toy_backbone", "module:callable"),
        ("python:doors.toy_backbone:broken", "OSError.*weights.bin is gone"),
    ],
)
def test_what_is_no_backbone_is_refused_and_not_called(path, said):
    with pytest.raises(UserError, match=f"backbone.path.*{said}"):
        load_backbone(path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("backbone.quantize", "int8", "quantize"),
        ("backbone.checkpoint", "[denoiser]", "checkpoint.*denoiser"),
        ("speed.channels_last", "true", "channels_last"),
        ("sampler.true_cfg_scale", "2", "true_cfg_scale"),
    ],
)
def test_keys_that_it_cannot_have_are_refused(tmp_path, capfd, key, value, said):
    train = {"parameters": {"train": "lora"}} if key == "backbone.quantize" else {}
    assert main(["train", str(recipe(tmp_path, "run", **train)), f"{key}={value}"]) != 0
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.search(said, error), error
