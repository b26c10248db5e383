"""`rewards_gpu.py` at tiny size on the CPU: every row, and that its models have the published size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rsaft_fast.benchmarks import results, rewards_gpu


def test_every_row_is_measured_and_written(tmp_path, capsys):
    arguments = ["--results", str(tmp_path), "--device", "cpu", "--tiny", "--repeats", "3"]
    assert rewards_gpu.main(arguments) == 0
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
    built = rewards_gpu.BUILDERS[name]({}, torch.device("meta"), "bf16", True)
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(parameters, rel=0.003)


def test_a_row_that_does_not_fit_says_so():
    def full(*_):
        raise torch.OutOfMemoryError("out of memory\nand more")

    row = rewards_gpu.measured(SimpleNamespace(score=full), 1, 8, torch.device("cpu"), 3)
    assert row == {"missing": "out of memory"}
    what = {"reward": "clip-h", "dtype": "bf16", "checkpoint": True, "batch": 1}
    assert rewards_gpu.describe(what | row) == "clip-h x1 bf16 checkpointed: out of memory"


def test_wrong_input_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, words in [
        (["--device", "nonsense"], "nonsense"),
        (["--device", "cpu", "--tiny", "--results", str(tmp_path / "file")], str(tmp_path / "file")),
    ]:
        assert rewards_gpu.main(arguments) == 2
        line = capsys.readouterr().err.strip()
        assert words in line and "\n" not in line


@pytest.mark.gpu
def test_one_row_on_the_gpu():
    device = torch.device("cuda")
    reward = rewards_gpu.BUILDERS["clip-h"]({}, device, "bf16", True)
    reward.keep_prompts([rewards_gpu.PROMPT])
    row = rewards_gpu.measured(reward, 1, 1024, device, 3)
    # 1.26 GB of bf16 weights, and 0.7 GiB a batch of 32 at most beside the pictures.
    assert row["peak"] - row["standing"] < 2**30 < row["standing"]
