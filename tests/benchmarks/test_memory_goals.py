"""Goals, tables and the README's section of whole updates, from figures whose ratios are known."""

import json

import pytest
from builders import memory_results as synthetic

from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks import memory_tables, report
from rsaft_fast.benchmarks.cards import dense_bf16, predicted_ms
from rsaft_fast.benchmarks.memory_goals import as_markdown, goals, text
from rsaft_fast.benchmarks.memory_results import MemoryResults, load, newest
from rsaft_fast.benchmarks.memory_view import MemoryView
from rsaft_fast.errors import UserError

SDXL = runs.run_named("sdxl-lora")


@pytest.fixture
def results():
    return synthetic.results().as_dict()


@pytest.mark.parametrize(
    "what, measured, met",
    [
        ("peak of sdxl-lora", "9.00 GiB", True),
        ("peak of flux-full", "66.60 GiB", True),
        ("peak of sdxl-lora at K = 8", "1.020 x", True),
        ("estimate of sdxl-lora", "+5.0%", True),
        ("estimate of sdxl-lora at K = 8", "+10.0%", False),
        ("RSA-FT over the plain method, sdxl-lora, exact", "2.000 x", True),
        # (51 x 100 + 500) / (50 x 100 + 250) and (29 x 100 + 500) / (28 x 100 + 250)
        ("RSA-FT over the plain method, sdxl-lora, graded_only, T = 50", "1.067 x", True),
        ("RSA-FT over the plain method, sdxl-lora, graded_only, T = 28", "1.115 x", True),
        # 60 / (2 x (50 x 100 + 250))
        ("SAM update, sdxl-lora", "0.57%", True),
        ("peak over plain PyTorch, sdxl-lora", "0.500 x", True),
        # (50 x 100 + 250) / (50 x 150 + 250)
        ("time over plain PyTorch, sdxl-lora, exact", "0.677 x", True),
    ],
)
def test_each_goal(results, what, measured, met):
    (goal,) = [goal for goal in goals(results) if goal.what == what]
    assert (goal.measured, goal.met) == (measured, met)


def test_nothing_measured_is_said_and_counted():
    found = goals(synthetic.results(names=()).as_dict())
    assert found and all(goal.met is None and goal.measured == "not measured" for goal in found)
    said = text(synthetic.results(names=("sdxl-lora",)).as_dict())
    # All of sdxl-lora's but the estimate at K = 8.
    assert "9 of 10 measured goals met; " in said
    assert as_markdown(synthetic.results().as_dict()).startswith("| goal | wanted | measured | met |")


def test_tiny_models_meet_no_limit():
    found = goals(synthetic.results(tiny=True).as_dict())
    assert all(goal.met is None for goal in found if goal.wanted.endswith("GiB"))


def test_a_plain_step_that_runs_out_of_memory_bounds_the_ratio():
    found = synthetic.results(names=("sdxl-lora",))
    found.put(synthetic.row(SDXL, runs.PLAIN, out_of_memory=True, card_bytes=80 * synthetic.GIB))
    (goal,) = [g for g in goals(found.as_dict()) if g.what == "peak over plain PyTorch, sdxl-lora"]
    assert goal.measured == "< 0.113 x, which ran out of memory" and goal.met  # 9 of 80 GiB
    (goal,) = [g for g in goals(found.as_dict()) if g.what == "time over plain PyTorch, sdxl-lora, exact"]
    assert goal.met is None


def test_the_fastest_speed_settings_are_held_against_plain_pytorch():
    found = synthetic.results(names=("sdxl-lora",))
    quick = synthetic.kind(500.0, rollouts=2) | {"call_ms": 50.0}
    found.put(synthetic.row(SDXL, runs.GRAPHS, kinds={"exact": quick}))
    view = MemoryView(found.as_dict())
    assert view.time_over_plain(SDXL, runs.PLAIN) == pytest.approx((500 + 46 * 2 * 50) / (2 * (50 * 150 + 250)))


def test_utilisation_is_flops_over_time(results):
    view = MemoryView(results)
    achieved = view.achieved(SDXL)
    # Two branches of 20 TFLOP in 100 ms; of 45 in 150 ms; 20 TFLOP in 50 ms.
    assert achieved == pytest.approx({"rollout": 400.0, "backward": 600.0, "decoder": 400.0})
    assert view.dense_peak() == 989.5 and view.matmul_peak(SDXL) == 800.0
    said = memory_tables.terminal(results)
    row = next(line for line in said.split("Model FLOP utilisation")[1].splitlines() if line.startswith("  sdxl-lora"))
    assert "40.4 %" in row and "60.6 %" in row and "50.0 %" in row and "75.0 %" in row
    assert "products 60% (attention 20%, elementwise, norms, copies 15%)" in row


@pytest.mark.parametrize(
    "gpu, rate",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("cpu x86_64", None),
    ],
)
def test_cards_by_their_names(gpu, rate):
    assert dense_bf16(gpu) == rate


def test_a_prediction_by_hand():
    counted = {"call": 10**12, "graded": 3 * 10**12, "decode": 10**12, "decode_graded": 10**12, "score_graded": 10**12}
    found = predicted_ms(counted, branches=2, steps=10, tflops=100.0)
    # At 100 TFLOP/s a TFLOP takes 10 ms: calls 20, gradient 60, decoding and scoring 30.
    assert found["plain method"] == pytest.approx(10 * 20 + 90)
    assert found["graded_only"] == pytest.approx(11 * 20 + 180)
    assert found["exact"] == pytest.approx(2 * (10 * 20 + 90))
    assert found["plain PyTorch"] == pytest.approx(2 * (9 * 20 + 80))


def test_tables_show_what_there_is(results):
    said = memory_tables.terminal(results)
    peaks = said.split("max allocated\n")[1].splitlines()
    assert peaks[1].split()[:7] == ["sdxl-lora", "10", "9.00", "9.45", "1.050", "10.00", "1.020"]
    assert "> 80.00" in said and "< 0.11" in said
    assert "Predicted" not in said, "what is measured needs no prediction"
    assert "4.50 (4.50)" in said  # a phase, measured and estimated
    markdown = memory_tables.section(results)
    assert "| sdxl-lora | 10 | 9.00 | 9.45 |" in markdown and "abc1234" in markdown
    assert "left out" not in said and "no figure" not in said


def test_results_are_whole_and_the_newest_gpu_ones_are_found(tmp_path):
    found = synthetic.results(tmp_path, names=("sdxl-lora",))
    assert load(found.path) == found.as_dict()
    synthetic.results(tmp_path, gpu="cpu x86_64", cuda=None, driver=None)
    assert newest(tmp_path)["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert newest(tmp_path / "nothing") is None
    again = MemoryResults(synthetic.MACHINE, tmp_path)
    key = f"key of sdxl-lora {runs.PEAK}"
    assert again.done("sdxl-lora", runs.PEAK, key) and not again.done("sdxl-lora", runs.PEAK, "another recipe")
    again.put(synthetic.row(SDXL, runs.PEAK, missing="out of memory"))
    assert not again.done("sdxl-lora", runs.PEAK, key), "what failed is tried again"


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": "another"})])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    folder = tmp_path / "NVIDIA-H100-80GB-HBM3"
    folder.mkdir()
    (folder / "memory.json").write_text(content)
    with pytest.raises(UserError, match="move it away"):
        MemoryResults(synthetic.MACHINE, tmp_path)
    assert (folder / "memory.json").read_text() == content


def test_the_readme_gets_both_sections_where_it_has_the_markers(tmp_path, capsys):
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    before = f"a\n{report.BEGIN}\n{report.END}\nb\n{report.MEMORY_BEGIN}\nold\n{report.MEMORY_END}\nc\n"
    folder.mkdir()
    readme.write_text(before)
    assert report.main([str(folder), "--readme", str(readme)]) == 0
    assert report.NO_MEMORY in readme.read_text() and report.NOTHING in readme.read_text()
    synthetic.results(folder)
    assert report.main([str(folder), "--readme", str(readme), "--goals"]) == 0
    said = readme.read_text()
    assert said.startswith("a\n") and said.endswith(f"{report.MEMORY_END}\nc\n") and "\nb\n" in said
    assert "old" not in said and "| sdxl-lora | 10 | 9.00 | 9.45 |" in said
    assert "peak of sdxl-lora" in capsys.readouterr().out
    readme.write_text(f"{report.BEGIN}\n{report.END}\n{report.MEMORY_BEGIN}\n")
    assert report.main([str(folder), "--readme", str(readme)]) == 2
    assert report.MEMORY_END in capsys.readouterr().err


def test_one_file_is_shown(tmp_path, capsys):
    path = synthetic.results(tmp_path, names=("sdxl-lora",)).path
    assert report.main([str(path)]) == 0
    assert "Peak memory, torch's max allocated" in capsys.readouterr().out
