"""Whatever is wrong with a stranger's folder ends in one line that names the place, and nothing hangs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from builders.backbones import BUILDERS
from builders.damages import PARTICULAR, systematic

from rsaft_fast.backbones import load_backbone
from rsaft_fast.errors import UserError


def refusal(originals, family, damage, place) -> str:
    folder = shutil.copytree(originals[family], place / family)
    damage(folder)
    size = {"height": 32, "width": 32} if family == "flux" else {}
    with pytest.raises(UserError) as caught:
        load_backbone(folder, **size).schedule(3)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500 + len(str(folder)), line
    assert str(folder) in line or ".json" in line, line
    return line


@pytest.mark.parametrize("family, name, damage", [*systematic(every=False), *PARTICULAR])
def test_a_damaged_folder_is_one_line(originals, tmp_path, family, name, damage):
    refusal(originals, family, damage, tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("family, name, damage", [*systematic(every=True)])
def test_every_file_of_every_family(originals, tmp_path, family, name, damage):
    refusal(originals, family, damage, tmp_path)


VALUES = (None, True, 0, -1, 1, 2, 10**9, 2**31, 1e38, 0.5, "", "wide", [], [0], [4, "x"], {}, {"a": 1})


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(2000))
def test_any_value_of_any_key_loads_or_is_one_line(originals, tmp_path, seed):
    draw = random.Random(seed)
    family = draw.choice(sorted(BUILDERS))
    folder = shutil.copytree(originals[family], tmp_path / family)
    file = draw.choice(sorted(path for path in folder.rglob("*.json") if path.name != "tokenizer.json"))
    content = json.loads(file.read_text())
    key = draw.choice(sorted(content))
    content[key] = draw.choice(VALUES)
    file.write_text(json.dumps(content))
    try:
        backbone = load_backbone(folder, height=32, width=32)
        step = backbone.schedule(3)[0]
        x = torch.zeros(1, *backbone.latent_shape)
        backbone.decode(backbone.predict(x, step, backbone.encode(["a red circle"]).positive))
    except UserError as error:
        assert "\n" not in str(error), (Path(file).name, key, content[key])
