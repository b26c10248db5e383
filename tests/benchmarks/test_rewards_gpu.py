"""`rewards_gpu.py` at tiny size on the CPU: every row, and that its models have the published size."""

from __future__ import annotations

import json

import pytest
import torch

from rsaft_fast.benchmarks import results, rewards_gpu
from rsaft_fast.errors import UserError

CPU = torch.device("cpu")


def test_every_row_is_measured_and_written(tmp_path, capsys):
    arguments = ["--results", str(tmp_path), "--device", "cpu", "--tiny", "--repeats", "3"]
    assert rewards_gpu.main(arguments) == 0
    found = json.loads(next(tmp_path.glob(f"*/{rewards_gpu.NAME}")).read_text())
    rows = found["rows"]
    keys = {(r["reward"], r["dtype"], r["checkpoint"], r["batch"]) for r in rows}
    assert len(keys) == len(rows) == 2 * 3 * 3 and found["gpu"].startswith("cpu") and "note" in found
    assert found["bandwidth"]["copy_gbps"] > 0
    with pytest.raises(UserError):  # not to be taken for the optimizer suite's
        results.load(next(tmp_path.glob(f"*/{rewards_gpu.NAME}")))
    for row in rows:
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["standing"] < row["peak"], row
    peak = {(r["reward"], r["dtype"], r["checkpoint"], r["batch"]): r["peak"] - r["standing"] for r in rows}
    for name in ("clip-h", "blip-l"):
        assert peak[name, "bfloat16", True, 32] > 8 * peak[name, "bfloat16", True, 1]
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1


@pytest.mark.parametrize("name, parameters", [("clip-h", 986.1e6), ("blip-l", 446.67e6)])
def test_models_have_the_published_size(name, parameters):
    built = rewards_gpu.BUILDERS[name](rewards_gpu.Sizes(), torch.device("meta"), "bfloat16", True)
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(parameters, rel=0.003)


def test_a_row_that_does_not_fit_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr(rewards_gpu, "_peak", full)
    file = rewards_gpu.measure(tmp_path, CPU, tiny=True)
    rows = json.loads(file.read_text())["rows"]
    assert {row["missing"] for row in rows} == {"out of memory"}
    assert rewards_gpu.describe(rows[0]) == "clip-h x1 bfloat16 checkpointed: out of memory"


def test_wrong_input_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, words in [
        (["--device", "nonsense"], "must be auto, cpu"),
        (["--device", "cpu", "--tiny", "--results", str(tmp_path / "file")], "cannot be written to"),
    ]:
        assert rewards_gpu.main(arguments) == 2
        line = capsys.readouterr().err.strip()
        assert words in line and "\n" not in line


@pytest.mark.gpu
def test_one_row_on_the_gpu():
    device = torch.device("cuda")
    reward = rewards_gpu.BUILDERS["clip-h"](rewards_gpu.Sizes(), device, "bfloat16", True)
    reward.keep_prompts([rewards_gpu.PROMPT])
    row = rewards_gpu._measure(reward, 1, 1024, device, 3)
    # 1.26 GB of bf16 weights, and 0.7 GiB a batch of 32 at most beside the pictures.
    assert row["peak"] - row["standing"] < 2**30 < row["standing"]
