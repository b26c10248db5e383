"""`rewards_gpu.py` on the CPU: every row of tiny models, and that its own have the published size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rsaft_fast.benchmarks import results, rewards_gpu
from rsaft_fast.benchmarks.random_models import random_reward
from rsaft_fast.rewards import RewardSettings, clip, image_reward

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def tiny(monkeypatch):
    """Published models, but small, and small pictures."""
    config = dict(clip.published_clip("hpsv2.1"))
    config["text_config"] = config["text_config"] | TINY
    config["vision_config"] = config["vision_config"] | TINY | {"image_size": 28}
    monkeypatch.setattr(clip, "published_clip", lambda hub_id: config)
    vision, text = image_reward.PUBLISHED_VISION | TINY | {"image_size": 32}, image_reward.PUBLISHED_TEXT | TINY
    monkeypatch.setattr(image_reward, "PUBLISHED_VISION", vision)
    monkeypatch.setattr(image_reward, "PUBLISHED_TEXT", text)
    monkeypatch.setattr(rewards_gpu, "SIDE", 40)


def test_every_row_is_measured_and_written(tmp_path, capsys, tiny):
    assert rewards_gpu.main(["--results", str(tmp_path), "--device", "cpu", "--repeats", "3"]) == 0
    found = results.load(next(tmp_path.glob(f"*/{rewards_gpu.NAME}")), "rewards")
    rows = {(r["reward"], r["dtype"], r["checkpoint"], r["batch"]): r for r in found["rows"]}
    assert len(rows) == len(found["rows"]) == 2 * 3 * 3 and found["gpu"].startswith("cpu") and "note" in found
    assert found["copy_gbps"] > 0
    for row in rows.values():
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["standing"] < row["peak"], row
    own = {place: row["peak"] - row["standing"] for place, row in rows.items()}
    for name in ("clip-h", "blip-l"):
        assert own[name, "bf16", True, 32] > 8 * own[name, "bf16", True, 1]
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1


@pytest.mark.parametrize("name, parameters", [("clip-h", 986.1e6), ("blip-l", 446.67e6)])
def test_models_have_the_published_size(name, parameters):
    built = random_reward(RewardSettings(name=rewards_gpu.REWARDS[name]), torch.device("meta"))
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(parameters, rel=0.003)


def test_a_row_that_does_not_fit_says_so():
    def full(*_):
        raise torch.OutOfMemoryError("out of memory\nand more")

    row = rewards_gpu.measured(SimpleNamespace(score=full), 1, torch.device("cpu"), 3)
    assert row == {"missing": "out of memory"}


def test_wrong_input_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, words in [
        (["--device", "nonsense"], "nonsense"),
        (["--device", "cpu", "--results", str(tmp_path / "file")], str(tmp_path / "file")),
    ]:
        assert rewards_gpu.main(arguments) == 2
        line = capsys.readouterr().err.strip()
        assert words in line and "\n" not in line


@pytest.mark.gpu
def test_one_row_on_the_gpu():
    device = torch.device("cuda")
    settings = RewardSettings(name="hpsv2.1", dtype="bf16", checkpoint=True)
    reward = random_reward(settings, device)
    reward.keep_prompts([rewards_gpu.PROMPT])
    row = rewards_gpu.measured(reward, 1, device, 3)
    # 1.26 GB of bf16 weights, and 0.7 GiB a batch of 32 at most beside the pictures.
    assert row["peak"] - row["standing"] < 2**30 < row["standing"]
