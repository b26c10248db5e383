"""The README's tables, the terminal's and the plots, from synthetic results."""

from pathlib import Path

import matplotlib.image
import pytest
from builders import benchmark_results as speed
from builders import memory_results as memory

from rsaft_fast.benchmarks import memory_tables, report, speed_tables
from rsaft_fast.benchmarks.results import Results, newest
from rsaft_fast.benchmarks.shapes import CASES
from rsaft_fast.errors import UserError

EXPECTED = """\
## Speed

NVIDIA H100 80GB HBM3: driver 580.1, torch 2.11.0+cu130, triton 3.6.0, CUDA 13.0; commit abc1234, 2026-01-02T03:04:05Z.
In the same run the card copies 3,000 GB/s and reads 3,100 GB/s.
*Of copy* is what a pass reaches of it with the bytes that it must move; peers are shown as time over ours.
How it is measured: `benchmarks/README.md`.

| list, layout: pass | bytes a parameter | ours, ms | of copy | launches | usual loop, ms | launches |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| sdxl-lora32, fp32: global norm | 4 | 0.0650 | 92.2 % (of read) | 5 | 0.1239 | 5,003 |
| sdxl-lora32, fp32: perturb | 16 | 0.2601 | 95.2 % | 5 | 0.4955 | 5,003 |
| sdxl-lora32, fp32: restore + AdamW | 28 | 0.4552 | 95.2 % | 5 | 0.8670 | 5,003 |
| sdxl-lora32, fp32: whole update | 52 | 0.8454 | 95.2 % | 5 | 1.610 | 5,003 |

| whole update, time over ours | sdxl-lora32, fp32 |
| --- | ---: |
| usual-fused | 1.90 |
| foreach | 1.71 |

| image perturbation | ours, ms | of copy | eager torch, time over ours |
| --- | ---: | ---: | ---: |
| 32x3x1024x1024, fp32 | 0.5906 | 90.9 % | 2.00 |
| 4x3x512x512, fp32 | 0.0185 | 90.9 % | 2.00 |"""
(BEGIN, END), (MEMORY_BEGIN, MEMORY_END) = map(report.markers, report.TABLES)


@pytest.fixture
def results():
    return speed.results(cases=(("sdxl-lora32", "fp32"),)).as_dict()


@pytest.fixture(scope="module")
def updates():
    return memory.results().as_dict()


def test_the_section_is_exactly_this(results):
    assert speed_tables.section(results) == EXPECTED


def test_the_readme_gets_its_sections_and_keeps_all_that_is_outside_the_markers(tmp_path, capsys):
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    speed_text, memory_text = f"{BEGIN}\nold\n{END}\n", f"{MEMORY_BEGIN}\nold\n{MEMORY_END}\n"
    folder.mkdir()
    readme.write_text(f"a\n{speed_text}b\n{memory_text}c\n")
    assert report.main([str(folder), "--readme", str(readme)]) == 0
    nothing = f"{MEMORY_BEGIN}\n{memory_tables.section(None)}\n{MEMORY_END}"
    assert readme.read_text() == f"a\n{BEGIN}\n## Speed\n\n{speed_tables.NOTHING}\n{END}\nb\n{nothing}\nc\n"
    path = speed.results(folder, cases=(("sdxl-lora32", "fp32"),)).path
    for source in (folder, path):
        assert report.main([str(source), "--readme", str(readme)]) == 0
        assert readme.read_text() == f"a\n{BEGIN}\n{EXPECTED}\n{END}\nb\n{nothing}\nc\n"
    memory.results(folder)
    capsys.readouterr()
    assert report.main([str(folder), "--readme", str(readme), "--goals"]) == 0
    said = readme.read_text()
    assert said.endswith(f"{MEMORY_END}\nc\n") and "old" not in said and "| sdxl-lora | 10 | 9.00 | 9.45 |" in said
    assert "peak of sdxl-lora" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, lacking", [("text\n", BEGIN), (f"{END}\n{BEGIN}\n", END), (f"{BEGIN}\n{END}\n{MEMORY_BEGIN}\n", MEMORY_END)]
)
def test_a_readme_without_a_marker_is_refused_and_left_alone(tmp_path, capsys, text, lacking):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report.main([str(tmp_path), "--readme", str(readme)]) == 2
    assert lacking in capsys.readouterr().err and readme.read_text() == text


def test_the_terminal_shows_every_row_and_who_is_missing():
    found = speed.results()
    found.note(left_out=["flux1-full 8bit"])
    said = speed_tables.terminal(found.as_dict())
    assert "sdxl-full, fp32: 2,567,463,684 parameters in 1,680 tensors" in said
    assert "whole update, floor 52 bytes a parameter" in said
    assert "optimi (sdxl-full fp32): not installed (pip install torch-optimi)" in said
    assert "left out, the budget being spent:\n  flux1-full 8bit" in said
    usual = next(line for line in said.splitlines() if line.strip().startswith("usual-fused"))
    assert usual.split()[-7:] == ["48.4", "%", "1.90", "5,000", "3", "9.56", "28.69"]


def test_whole_updates_are_shown(updates):
    said = memory_tables.terminal(updates)
    peaks = said.split("max allocated\n")[1].splitlines()
    assert peaks[1].split()[:7] == ["sdxl-lora", "10", "9.00", "9.45", "1.050", "10.00", "1.020"]
    assert "> 80.00" in said and "< 0.11" in said
    assert "4.50 (4.50)" in said  # a phase, measured and estimated
    assert "left out" not in said and "no figure" not in said
    # Two branches of 20 TFLOP in 100 ms; 2 x 45 in 150 ms; of 989.5 TFLOP/s and of 800.
    row = next(line for line in said.split("FLOP utilisation")[1].splitlines() if line.startswith("  sdxl-lora"))
    assert row.split()[1:6] == ["400", "40.4", "%", "50.0", "%"] and row.split()[-6:] == "600 60.6 % 75.0 % -".split()
    assert "products 60%, attention 20%, elementwise, norms, copies 15%, idle 5%" in row
    markdown = memory_tables.section(updates)
    assert "| sdxl-lora | 10 | 9.00 | 9.45 |" in markdown and "abc1234" in markdown


def test_plots_are_drawn(tmp_path, results):
    path = report.draw(results, tmp_path / "plots")
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 400 and picture[..., :3].std() > 0.05, "something is drawn"
    with pytest.raises(UserError):
        report.draw(results | {"rows": []}, tmp_path)


def test_a_run_of_everything_draws_the_headline():
    cases = [(case, dtype) for case in CASES[1:] for dtype in ("fp32", "bf16")]
    figure = report.bars(speed.results(cases=cases).as_dict())
    drawn = {axis.get_title(loc="left") for axis in figure.axes if axis.get_visible()}
    assert {"sdxl-full, fp32", "sdxl-lora32, fp32", "4x3x512x512, fp32"} <= drawn
    assert "sd15-full, fp32" not in drawn and len(drawn) <= 12


def test_one_file_is_shown(tmp_path, capsys):
    path = speed.results(tmp_path).path
    assert report.main([str(path), "--goals", "--plots", str(tmp_path / "plots")]) == 0
    said = capsys.readouterr().out
    assert "18 of 22 measured goals met" in said and "bars.png" in said
    assert report.main([str(memory.results(tmp_path, names=("sdxl-lora",)).path)]) == 0
    assert "Peak memory, torch's max allocated" in capsys.readouterr().out
    assert report.main([str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err
    rewards = Results("rewards", speed.HEAD, tmp_path, "rewards.json").path
    assert report.main([str(rewards)]) == 2 and "'rewards'" in capsys.readouterr().err, "it has no table"


def test_the_readme_says_what_the_newest_results_say():
    top = Path(__file__).parents[2]
    readme = (top / "README.md").read_text(encoding="utf-8")
    found = newest(top / "benchmarks/results", "speed")
    assert f"{BEGIN}\n{speed_tables.section(found)}\n{END}" in readme
