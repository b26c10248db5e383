"""The README's table, the terminal's and the plots, from synthetic results."""

from pathlib import Path

import matplotlib.image
import pytest
from builders import benchmark_results as synthetic

from rsaft_fast.benchmarks import plots, report, tables
from rsaft_fast.benchmarks.results import newest
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


@pytest.fixture
def results():
    return synthetic.results(cases=(("sdxl-lora32", "fp32"),)).as_dict()


def test_the_section_is_exactly_this(results):
    assert report.section(results) == EXPECTED


def test_the_readme_keeps_all_that_is_outside_the_markers(tmp_path):
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    folder.mkdir()
    assert report.main([str(folder), "--readme", str(readme)]) == 0
    assert readme.read_text() == f"before\n{report.BEGIN}\n## Speed\n\n{report.NOTHING}\n{report.END}\nafter\n"
    path = synthetic.results(folder, cases=(("sdxl-lora32", "fp32"),)).path
    for source in (folder, path):
        assert report.main([str(source), "--readme", str(readme)]) == 0
        assert readme.read_text() == f"before\n{report.BEGIN}\n{EXPECTED}\n{report.END}\nafter\n"


def test_a_readme_without_markers_is_refused_and_left_alone(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("text\n")
    assert report.main([str(tmp_path), "--readme", str(readme)]) == 2
    assert "needs one line <!-- speed: begin -->" in capsys.readouterr().err
    assert readme.read_text() == "text\n"


def test_the_readme_shows_a_cpu_beside_the_gpu(tmp_path):
    """Between markers of its own, from the newest run without a GPU, and only where the README asks for it."""
    found = synthetic.results(tmp_path, cases=(), gpu="cpu X, 2 threads", driver=None, cuda=None)
    for provider, slowness in (("ours-cpu", 2.0), ("usual-fused", 3.0), ("foreach", 2.5)):
        synthetic.add_pass(found, "update", "plain-100m", "fp32", provider, slowness)
    speed, cpu = f"{report.BEGIN}\n{report.END}\n", f"{report.CPU_BEGIN}\n{report.CPU_END}\n"
    readme = tmp_path / "README.md"
    for text, shown in ((speed, False), (speed + cpu, True)):
        readme.write_text(text)
        assert report.main([str(tmp_path), "--readme", str(readme)]) == 0
        assert ("| usual-fused | 1.50 |" in readme.read_text()) == ("cpu X, 2 threads" in readme.read_text()) == shown


def test_late_peers_are_held_against_ours_beside_them():
    found = synthetic.results(cases=(("sdxl-full", "8bit"),))
    synthetic.add_pass(found, "update", "sdxl-full", "8bit", "torchao", 3.0, ours_ms_p50=10.0)
    view = tables.View(found.as_dict())
    row = view.get("update", "sdxl-full", "8bit", "torchao")
    assert view.times_ours(row) == pytest.approx(row["ms_p50"] / 10.0)


def test_the_terminal_shows_every_row_and_who_is_missing():
    found = synthetic.results()
    found.note(left_out=["flux1-full 8bit"])
    said = tables.terminal(found.as_dict())
    assert "sdxl-full, fp32: 2,567,463,684 parameters in 1,680 tensors" in said
    assert "whole update, floor 52 bytes a parameter" in said
    assert "optimi (sdxl-full fp32): not installed (pip install torch-optimi)" in said
    assert "left out, the budget being spent:\n  flux1-full 8bit" in said
    usual = next(line for line in said.splitlines() if line.strip().startswith("usual-fused"))
    assert usual.split()[-9:] == ["48.4", "%", "1.90", "5,000", "3", "10.27", "GB", "30.81", "GB"]


def test_plots_are_drawn(tmp_path, results):
    paths = plots.draw(results, tmp_path / "plots")
    assert [path.name for path in paths] == ["bars.png", "roofline.png"]
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert min(picture.shape[:2]) > 400 and picture[..., :3].std() > 0.05, "something is drawn"
    with pytest.raises(UserError, match="nothing to draw"):
        plots.draw(results | {"rows": []}, tmp_path)


def test_goals_from_the_command_line(tmp_path, capsys):
    path = synthetic.results(tmp_path).path
    assert report.main([str(path), "--goals", "--plots", str(tmp_path / "plots")]) == 0
    assert "18 of 22 measured goals met" in capsys.readouterr().out
    assert report.main([str(tmp_path / "absent.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_readme_says_what_the_newest_results_say():
    top = Path(__file__).parents[2]
    readme = (top / "README.md").read_text(encoding="utf-8")
    assert f"{report.BEGIN}\n{report.section(newest(top / 'benchmarks/results'))}\n{report.END}" in readme


def test_a_run_of_everything_draws_the_headline():
    cases = [(case, dtype) for case in CASES[1:] for dtype in ("fp32", "bf16")]
    figure = plots.bars(synthetic.results(cases=cases).as_dict())
    drawn = {axis.get_title(loc="left") for axis in figure.axes if axis.get_visible()}
    assert {"sdxl-full, fp32", "sdxl-lora32, fp32", "4x3x512x512, fp32"} <= drawn
    assert "sd15-full, fp32" not in drawn and len(drawn) <= 12
