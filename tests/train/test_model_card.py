"""What lies beside exported weights: the LoRA in other programs' format, and a card that can be published."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from builders.recipes import config
from safetensors import safe_open

from rsaft_fast.backbones import FLUX, SD15, QwenImage
from rsaft_fast.backbones.lora_formats import KOHYA_FILE
from rsaft_fast.rewards import RewardSpec
from rsaft_fast.sampling.protocol import LORA_FILE
from rsaft_fast.train.loop import train
from rsaft_fast.train.model_card import CARD, _front_matter, _loading, model_card, public_name

FULL = {"parameters": {"train": "full"}}


def exported(tiny, out, family="sd15", **changes):
    outcome = train(config(tiny, out, family, max_steps=1, **changes))
    return outcome.export, (outcome.export / CARD).read_text(encoding="utf-8")


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    "family, changes",
    [("sd15", {}), ("sdxl", {}), ("sd3", {}), ("sd15", FULL), ("klein", {}), ("zimage", {}), ("qwen", {})]
    + [pytest.param("krea", {}, marks=pytest.mark.slow)],
)
def test_the_card_says_what_made_the_weights_and_its_code_loads_them(tiny, out, family, changes, tmp_path, monkeypatch):
    folder, card = exported(tiny, out, family, **changes)
    base, lora = getattr(tiny, family), not changes
    names = {file.name for file in folder.iterdir()}
    assert ({LORA_FILE, KOHYA_FILE, CARD} == names) if lora else (CARD in names and KOHYA_FILE not in names)
    head = front_matter(card)
    # A local folder is no id of the hub's.
    assert "base_model" not in head and "base_model_relation" not in head and head["library_name"] == "diffusers"
    assert ("lora" in head["tags"]) == lora and "license" not in head and "# license:" in card
    facts = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", card, re.MULTILINE))
    assert facts["updates"].startswith("1 of ") and facts["resolution"] == "32x32" and facts["seed"] == "0"
    assert facts["base model"] == base.name and facts["method"] and facts["reward"] and facts["prompts"]
    # Nothing of where this was made.
    home = str(Path.home())
    for private in (str(tmp_path), str(base.parent), str(out.parent), *([home] if len(home) > 1 else [])):
        assert private not in card
    assert ("ComfyUI/models/loras/" in card and "models/Lora/" in card and KOHYA_FILE in card) == lora
    # Its first block of code, in a folder that holds base model and weights under the names that it gives.
    place = tmp_path / "elsewhere"
    shutil.copytree(base, place / base.name)
    shutil.copytree(folder, place / folder.name)
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == (2 if lora else 1)
    inside = {}
    for block in blocks:
        exec(compile(block, "card", "exec"), inside)
    assert inside["image"].size == (32, 32) and (place / "image.png").is_file()
    assert (place / "merged" / "model_index.json").is_file() == lora


def test_checkpoints_keep_the_one_format(tiny, out):
    folder, _ = exported(tiny, out)
    found = sorted(file.name for file in (out / "checkpoints").glob("*/lora/*"))
    assert found == [LORA_FILE]
    with safe_open(folder / KOHYA_FILE, "pt") as opened:
        assert opened.metadata()["ss_sd_model_name"] == tiny.sd15.name


@pytest.mark.parametrize(
    "path, shown",
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("/home/alice/secret-project/sd15", "sd15"),
        ("/home/alice/secret-project/sd15/", "sd15"),
        (str(Path.home() / "models" / "sdxl"), "sdxl"),
        (str(Path.home()), "a local folder"),
        ("../sdxl", "sdxl"),
        ("/root/.cache/huggingface/hub/models--owner--FLUX.1-dev/snapshots/0ef5", "owner/FLUX.1-dev"),
        ("http://10.1.2.3:8765/hpsv3", "a server"),
        ("playground", "playground"),
        ("playground/fair", "playground/fair"),
        ("drawbench=/home/alice/drawbench.csv", "drawbench.csv"),
        ("hpdv2-anime", "hpdv2-anime"),
    ],
)
def test_no_path_is_published(path, shown):
    assert public_name(path) == shown


def test_a_folder_named_like_a_hub_id_is_that_folder(tmp_path, monkeypatch):
    (tmp_path / "alice" / "private").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("alice/private") == "private"
    monkeypatch.chdir(tmp_path / "alice" / "private")
    assert public_name(".") == "private" and public_name("..") == "alice"


@pytest.mark.parametrize("base, named", [("owner/name", True), ("playground/fair", False), ("sd15", False)])
def test_only_a_hub_id_is_a_base_model(base, named):
    head = front_matter(_front_matter(base, lora=True) + "\n")
    assert head.get("base_model") == (base if named else None) and ("base_model_relation" in head) == named


def facts_of(config):
    backbone = SimpleNamespace(width=8, height=8, denoiser_name="unet")
    card = model_card(config, backbone, 1, RewardSpec("toy"), "unet", kohya=False)
    return dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", card, re.MULTILINE)), card


def test_the_card_names_every_setting_that_is_not_the_usual_one(tiny, tmp_path):
    """What the recipe says and the defaults do not; of places their last names alone."""
    gardo = {"gate": {"share": 0.2, "signals": {"s1": 0.5}}, "diversity": {"features": "/home/alice/dino"}}
    method = {"name": "flow_grpo", "kl_weight": 0.01, "window": {}, "gardo": gardo | {"reference": None}}
    weights = {"rho": 0.1, "direction": "friendly", "groups": [{"match": "attn", "rho": 0.5}]}
    smoothing = {"image": None, "parameters": weights}
    facts, card = facts_of(config(tiny, tmp_path / "run", method=method, smoothing=smoothing, data__group_size=2))
    assert facts["method"] == (
        "flow\\_grpo, window (as usual), kl\\_weight 0.01, gardo (gate (share 0.2, signals (s1 0.5)), reference null, "
        "diversity (features dino))"
    )
    assert facts["smoothing"] == "weights (rho 0.1, groups \\[(match attn, rho 0.5)\\], direction friendly)"
    assert "alice" not in card and "Sharpness-Aware" in card and "agreement" not in facts
    agreement = {"judges": {"other": {"name": "pickscore", "path": "/home/alice/pick"}}, "control": "stop"}
    smoothing = {"image": {"radius": 0.3, "steps": 2}, "parameters": None, "resample": "graded_only"}
    keys = {"agreement": agreement, "regularize": {"kl_to_base": 0.25}, "smoothing": smoothing}
    facts, card = facts_of(config(tiny, tmp_path / "run", **keys))
    assert facts["smoothing"] == "pictures (rho 0.3, l2 in pixel01, steps 2), resample graded\\_only"
    assert facts["agreement"] == "judges (other pickscore of pick), control stop" and "alice" not in card
    assert facts["regularize"] == "kl\\_to\\_base 0.25"
    none = {"image": None, "parameters": None}
    facts, card = facts_of(config(tiny, tmp_path / "run", smoothing=none, method={"name": "draft"}))
    assert (facts["smoothing"], facts["method"]) == ("none", "draft") and "Sharpness-Aware" not in card


def test_the_code_samples_as_the_training_did(tiny, tmp_path):
    unet = SimpleNamespace(family=SD15.family, height=8, width=8)
    flux = SimpleNamespace(family=FLUX.family, height=8, width=8)

    def call(backbone, **sampler):
        return _loading(config(tiny, tmp_path / "run", sampler=sampler), backbone, "a/b", "lora", lora=True)

    code = call(unet, steps=2, eta=0.5, guidance_scale=3, negative_prompt='it\'s "ugly"')
    assert "eta=0.5," in code and f"negative_prompt={'it' + chr(39) + 's ' + chr(34) + 'ugly' + chr(34)!r}," in code
    assert not re.search("eta=|negative|true_cfg", call(unet, steps=2))
    qwen = SimpleNamespace(family=QwenImage.family, height=8, width=8)
    code = call(qwen, steps=2, guidance_scale=4)
    assert "true_cfg_scale=4," in code and "negative_prompt=' '," in code and "guidance_scale" not in code
    code = call(qwen, steps=2)
    assert "true_cfg_scale=1," in code and "negative" not in code
    code = call(flux, steps=2, true_cfg_scale=2)
    assert "true_cfg_scale=2," in code and "negative_prompt=''," in code
