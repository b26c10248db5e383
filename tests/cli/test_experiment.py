"""`rsaft-fast experiment` as far as nothing is trained: lists, reports, pages, what is refused."""

from __future__ import annotations

import pytest
from builders.experiment_runs import finish
from builders.messages import says

from rsaft_fast.cli import main
from rsaft_fast.experiments.report import BEGIN, END, NOTHING
from rsaft_fast.experiments.table import rows_of


def test_the_list_tells_what_is_done_and_what_waits(tmp_path, capsys):
    rows, _ = rows_of("core", {}, [10])
    finish(rows[0], tmp_path, [0.4, 0.5, 0.3], [0, 1, 2])
    assert main(["experiment", "--list", "--output", str(tmp_path), "--seeds", "10"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert any(line.startswith(f"  {rows[0].name}  done") for line in lines)
    assert any("brittle-draft-both-s10  waits for image" in line for line in lines)
    core = next(line for line in lines if line.startswith("core:"))
    assert "(1 of " in core


@pytest.mark.slow
def test_a_report_trains_nothing_and_fills_pages(tmp_path, capsys):
    assert main(["experiment", "--report", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == NOTHING
    rows, _ = rows_of("quick", {}, [10, 11])
    for row in rows:
        finish(row, tmp_path, [0.4, 0.5, 0.3], [0, 1, 2])
    page, readme, alarms = (tmp_path / f"{name}.md" for name in ("page", "readme", "alarms"))
    for path in (page, readme, alarms):
        path.write_text(f"# Mine\n{BEGIN}\n{END}\n")
    pages = ["--page", str(page), "--readme", str(readme), "--alarms", str(alarms)]
    assert main(["experiment", "--report", "--output", str(tmp_path), *pages]) == 0
    first = capsys.readouterr().out
    assert "quick: the brittle proxy" in first and "0.500" in first
    assert (
        "](pictures/quick.png)" in page.read_text()
        and (tmp_path / "pictures/quick.png").is_file()
        and "brittle, both" in readme.read_text()
    )
    assert "| r* never fell |" in alarms.read_text()
    assert main(["experiment", "--report", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == first


def test_what_cannot_end_well_is_refused_before_anything_is_trained(tmp_path, capsys):
    new = ["--output", str(tmp_path / "new")]
    assert main(["experiment", "--set", "core", "--set", "cores", *new]) == 2
    assert says("--set", "cores", "baselines").search(capsys.readouterr().err)
    page = tmp_path / "page.md"
    page.write_text(BEGIN)
    assert main(["experiment", "--quick", "--page", str(page), *new]) == 2
    assert says(str(page), END).search(capsys.readouterr().err)
    assert main(["experiment", "--quick", "--readme", str(tmp_path / "none"), *new]) == 2
    assert says("none", BEGIN).search(capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_counting_is_reported_where_it_is_asked_for(tmp_path, capsys):
    rows, _ = rows_of("quick", {}, [10])
    for row in rows:
        finish(row, tmp_path, [0.4, 0.5, 0.3], [0, 1, 2])
    asked = ["experiment", "--report", "--output", str(tmp_path)]
    assert main([*asked, "--set", "counting"]) == 0
    assert capsys.readouterr().out.strip() == NOTHING
    assert main([*asked, "--set", "counting", "--set", "quick"]) == 0
    assert "quick: the brittle proxy" in capsys.readouterr().out
