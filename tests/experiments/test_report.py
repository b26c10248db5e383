"""Tables, pages and pictures: every number on them is a run's."""

from __future__ import annotations

import pytest
from builders.experiment_runs import run
from builders.messages import says
from PIL import Image

from rsaft_fast.errors import UserError
from rsaft_fast.experiments.report import (
    BEGIN,
    END,
    NOTHING,
    as_page,
    as_readme,
    as_text,
    draw,
    shown,
    verdicts,
    write_page,
)
from rsaft_fast.experiments.statistics import Interval


def kind(variant, truths, set_name="core", scaled=()):
    seeds = {
        seed: run(
            [t + 0.001 * seed for t in truths],
            [0, 1, 2],
            judge=[1, 2, 1],
            s1=[5, 4 + seed, 3 - seed],
            seed=seed,
            variant=variant,
            set_name=set_name,
            scaled=scaled,
        )
        for seed in (0, 1, 2)
    }
    for one in seeds.values():
        for point in one.points:
            point.pictures.update({name: [0.0, 1.0, 2.0] for name in point.means})
    return {("brittle", "draft", variant): seeds}


SETS = {
    "core": kind("both", [0.4, 0.5, 0.6]) | kind("plain", [0.4, 0.45, 0.3]),
    "baselines": kind("lora", [0.4, 0.42, 0.41], "baselines", [(0.5, 0.47, 1.0)]),
}


def rows_of(text: str, label: str) -> list[list[str]]:
    return [line.split("  ") for line in text.split("\n") if line.startswith(f"{label}  ")]


def test_a_table_has_means_intervals_and_paired_differences():
    text = as_text(SETS)
    both = [cell.strip() for cell in rows_of(text, "both")[0] if cell.strip()]
    # Seeds differ by 0.001: deviation 0.001, half-width 4.303 * 0.001 / sqrt 3 = 0.0025.
    assert both[:7] == ["both", "3", "0.601 ±0.002", "20", "0.601 ±0.002", "2.00 ±0.00", "+0.150 ±0.000*"]
    assert both[7:9] == ["+0.300 ±0.000*", "+0.300 ±0.000*"]
    plain = [cell.strip() for cell in rows_of(text, "plain")[0] if cell.strip()]
    assert plain[6:9] == ["-", "-", "-"]
    # Plain comes first, whatever the order of the files.
    assert text.index("\nplain ") < text.index("\nboth ")
    assert text == as_text(SETS)


def test_words_say_what_intervals_say():
    (line,) = verdicts(SETS)
    assert line == (
        "core, brittle: r* is 0.400 before any update; at equal proxy both higher than plain; "
        "at the end both higher than plain."
    )
    worse = {"quick": kind("plain", [0.4, 0.45, 0.5]) | kind("image", [0.4, 0.4, 0.4]) | kind("both", [0.4, 0.4, 0.6])}
    alone = {seed: one for seed, one in worse["quick"]["brittle", "draft", "both"].items() if seed == 1}
    worse["quick"]["brittle", "draft", "both"] = alone  # one seed tells nothing
    (line,) = verdicts(worse)
    assert "at the end image lower than plain, both not told apart from plain." in line


def test_baselines_stand_beside_the_core_with_early_stops_and_ways_back():
    text = as_text(SETS)
    table = text[text.index("baselines:") :]
    stopped = next(line for line in table.split("\n") if line.startswith("plain, stopped by fair"))
    assert "0.451" in stopped and "+0.150" in stopped  # r* 0.45 at the judge's best, 0.15 above plain's end
    back = next(line for line in table.split("\n") if line.startswith("lora, scaled back"))
    assert "0.470" in back
    assert {"lora", "both"} <= {line.split("  ")[0] for line in table.split("\n")}


def test_nothing_is_said_of_nothing(tmp_path):
    assert as_text({}) == as_page({}, tmp_path, {}) == as_readme({}) == NOTHING


def test_an_interval_of_one_seed_is_not_shown_and_a_star_is_a_sign():
    assert shown(None) == "-" and shown(Interval(0.5, float("inf"), 1)) == "0.500"
    assert shown(Interval(-0.5, 0.1, 3), sign=True) == "-0.500 ±0.100*"
    assert shown(Interval(0.05, 0.1, 3), sign=True) == "+0.050 ±0.100"


def test_a_page_keeps_what_stands_around_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nearlier\n{END}\nafter\n")
    for _ in range(2):
        write_page(page, as_readme(SETS))
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| proxy") and text.endswith(f"\n{END}\nafter\n") and "earlier" not in text
    assert "| brittle, both | 3 | 0.601 ±0.002 |" in text
    page.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(UserError, match=says(str(page), BEGIN, END)):
        write_page(page, "new")
    with pytest.raises(UserError, match=says("none.md")):
        write_page(tmp_path / "none.md", "new")
    assert "![core" in as_page(SETS, tmp_path, {"core": "core.png"})


def test_curves_are_drawn(tmp_path):
    drawn = draw(SETS, tmp_path)
    assert list(drawn) == ["core"]
    image = Image.open(drawn["core"])
    assert image.width > 1000 and image.height > 300 and len(image.convert("RGB").getcolors(2**20)) > 20
