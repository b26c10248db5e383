"""Tables, pages and pictures: every number on them is a run's."""

from __future__ import annotations

import dataclasses

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
    assert "at the end image lower than plain." in line and "both" not in line


def test_baselines_stand_beside_the_core_with_early_stops_and_ways_back():
    text = as_text(SETS)
    table = text[text.index("baselines:") :]
    stopped = next(line for line in table.split("\n") if line.startswith("plain, stopped by fair"))
    assert "0.451" in stopped and "+0.150" in stopped  # r* 0.45 at the judge's best, 0.15 above plain's end
    back = next(line for line in table.split("\n") if line.startswith("lora, scaled back"))
    assert "0.470" in back
    assert {"lora", "both"} <= {line.split("  ")[0] for line in table.split("\n")}


def test_a_baseline_stands_beside_its_own_proxys_core_and_controls_beside_their_own_plain_runs():
    of = lambda proxy, kinds: {(proxy, *key[1:]): seeds for key, seeds in kinds.items()}  # noqa: E731
    sets = {
        "core": SETS["core"] | of("fair", kind("plain", [0.4, 0.3, 0.2])),
        "baselines": SETS["baselines"] | of("fair", kind("small-lr", [0.4, 0.5, 0.4], "baselines")),
        "controls": kind("plain", [0.4, 0.4, 0.4], "controls") | kind("stop", [0.4, 0.5, 0.5], "controls"),
    }
    text = as_text(sets)

    def line(title, label):
        lines = text[text.index(title) :].split("\n\n")[0].split("\n")
        return next((one for one in lines if one.startswith(f"{label}  ")), "")

    # Best 0.5 where plain of the same proxy has 0.4, end 0.4 where it has 0.2.
    assert "+0.100 ±0.000*" in line("baselines: the fair proxy", "small-lr")
    assert "+0.200 ±0.000*" in line("baselines: the fair proxy", "small-lr")
    assert not line("baselines: the fair proxy", "lora") and not line("baselines: the brittle proxy", "small-lr")
    assert line("controls: the brittle proxy", "stop").count("+0.100 ±0.000*") >= 2


def test_variants_stand_beside_the_cores_same_seeds_and_evaluations():
    core = kind("plain", [0.4, 0.6, 0.5]) | kind("both", [0.4, 0.7, 0.6])
    (key, seeds), *_ = kind("momentum", [0.4, 0.9, 0.6], "variants").items()
    ends = {seed: dataclasses.replace(one, points=one.points[::2]) for seed, one in seeds.items() if seed != 2}
    text = as_text({"core": core, "variants": {key: ends}})
    lines = {line.split("  ")[0]: line for line in text[text.index("variants:") :].split("\n\n")[0].split("\n")}
    plain, momentum = (
        [cell.strip() for cell in lines[name].split("  ") if cell.strip()] for name in ("plain", "momentum")
    )
    # Best of what both looked at, of seeds 0 and 1: plain's 0.5, not the 0.6 that only the core saw.
    assert plain[1] == momentum[1] == "2" and plain[2].startswith("0.500 ") and "both" in lines
    assert momentum[6] == "+0.100 ±0.000*"


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


def counted(method, variant, truths, proxies, seeds=(0, 1, 2)):
    """Runs of the counting task: exact counts of few rise and of more fall by a tenth at each evaluation."""
    runs = {}
    for seed in seeds:
        one = run(truths, [p + 0.1 * seed for p in proxies], seed=seed, variant=variant, set_name="counting")
        for index, point in enumerate(one.points):
            of_parts = {
                "r*, few": 0.7,
                "r*, more": 0.6,
                "exact, few": 0.8 + index / 10,
                "exact, more": 0.5 - index / 10,
            }
            sharp = {f"S1@{radius}": float(radius) for radius in ("0.1", "0.3", "1")}
            point.means.update(of_parts | sharp | {"diversity": 0.25})
        runs[seed] = dataclasses.replace(one, method=method)
    return {("loose-counter", method, variant): runs}


COUNTED = {
    "counting": counted("grpo", "gardo", [0.7, 0.69, 0.68], [0.7, 0.8, 0.9])
    | counted("grpo", "plain", [0.7, 0.68, 0.5], [0.7, 0.9, 1.1])
    | counted("nft", "plain", [0.7, 0.6, 0.4], [0.7, 1.0, 1.3])
    | counted("nft", "sam", [0.7, 0.6, 0.5], [0.7, 0.9, 1.2], seeds=[0])
}


def test_counting_stands_beside_the_base_and_its_own_plain_runs():
    text = as_text(COUNTED)
    cells = lambda label: [cell.strip() for cell in rows_of(text, label)[0] if cell.strip()]  # noqa: E731
    assert cells("base") == [
        "base",
        "-",
        "0.700",
        "0.700",
        "-",
        "-",
        "0.700",
        "0.600",
        "0.800",
        "0.500",
        "0.250",
        "0.300",
    ]
    # Proxies of seeds differ by 0.1: half-width 4.303 * 0.1 / sqrt 3 = 0.248.
    gardo = ["grpo gardo", "3", "1.000 ±0.248", "0.680 ±0.000", "+0.180 ±0.000*", "+0.000 ±0.000"]
    assert cells("grpo gardo")[:6] == gardo
    assert cells("grpo plain")[4:6] == ["-", "-"] and cells("grpo gardo")[8:10] == ["1.000 ±0.000", "0.300 ±0.000"]
    assert cells("nft sam")[1] == "1" and cells("nft sam")[4] == "+0.100"  # to nft's plain run, not to grpo's
    grpo, nft = verdicts(COUNTED)
    assert "grpo" in grpo and "0.500" in grpo and "at the end gardo higher than plain" in grpo
    assert "nft" in nft and "sam" not in nft  # one seed tells nothing


def test_counting_is_drawn_and_stands_on_a_page(tmp_path):
    drawn = draw(COUNTED, tmp_path)
    assert list(drawn) == ["counting"] and Image.open(drawn["counting"]).width > 1000
    page = as_page(COUNTED, tmp_path, {"counting": "counting.png"})
    assert "](counting.png)" in page and "| base |" in page and "few" in page
