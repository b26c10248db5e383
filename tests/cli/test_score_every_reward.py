"""`rsaft-fast score` with every reward there is, in one command, on pictures of different sizes."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from builders.clip import write_clip
from builders.detectors import write_mask2former, write_metadata
from builders.hpsv3 import write_hpsv3
from builders.image_reward import head_state, write_image_reward
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.rewards import REWARDS
from rsaft_fast.rewards.aesthetic import FILE as AESTHETIC

PROMPT = 'a "dog"'


@pytest.fixture
def rewards(tmp_path):
    """`--reward` of each family."""
    pytest.importorskip("rapidocr")
    clip, openai = write_clip(tmp_path / "clip"), tmp_path / "openai"
    write_clip(openai, hidden_act="quick_gelu", text_act="quick_gelu")
    torch.save(head_state(12), tmp_path / AESTHETIC)
    blip, hpsv3 = write_image_reward(tmp_path / "blip"), write_hpsv3(tmp_path / "hpsv3")
    detector = write_mask2former(tmp_path / "detector")
    task = {"tag": "counting", "prompt": PROMPT, "include": [{"class": "dog", "count": 1, "color": "red"}]}
    metadata = write_metadata(tmp_path / "tasks.jsonl", task)
    return {
        **{name: f"{name}={clip}" for name in ("clip", "pickscore", "clipscore", "hpsv2", "hpsv2.1")},
        "imagereward": f"imagereward={blip}",
        "aesthetic": f"aesthetic={tmp_path / AESTHETIC},image_tower={openai}",
        "hpsv3": f"hpsv3={hpsv3},instruction={hpsv3 / 'instruction.txt'}",
        "ocr": "ocr",
        "geneval-hf": f"geneval-hf={detector},metadata={metadata},image_tower={openai}",
        "counting": f"counting={detector},metadata={metadata}",
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this is not the instruction")
def test_every_reward_scores_pictures_of_different_sizes(rewards, tmp_path):
    assert rewards.keys() | {"combination", "remote", "python"} == REWARDS.keys()
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name, size in (("a.png", (40, 60, 3)), ("b.png", (40, 60, 4)), ("c.png", (60, 40))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / "in" / name)
    (tmp_path / "prompt.txt").write_text(PROMPT)
    arguments = ["score", tmp_path / "in", "--prompts", tmp_path / "prompt.txt", "--device", "cpu"]
    arguments += [word for text in rewards.values() for word in ("--reward", text)]
    assert main([str(a) for a in (*arguments, "--output", tmp_path / "scores.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "scores.csv").open(encoding="utf-8", newline="")))
    assert len(rows) == 3 and len(rows[0]) == 2 + len(rewards)
    assert all(math.isfinite(float(value)) for row in rows for value in list(row.values())[2:])
    specs = json.loads((tmp_path / "scores.json").read_text())
    assert [spec["name"] for spec in specs.values()] == list(rewards)
    assert all(len(spec["sha256"]) == 64 for spec in specs.values())
