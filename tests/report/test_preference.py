"""A blinded comparison: pairs of what belongs together, names nowhere to be seen, answers counted rightly."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from statistics import NormalDist

import pytest
from builders.messages import says
from builders.run_folders import PROMPTS, write_run
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.errors import UserError
from rsaft_fast.report.blinded import Pair, blinded_page, find_pairs, opened
from rsaft_fast.report.preference import Answer, preference, read_answers, wilson


@pytest.mark.parametrize(("wins", "count"), [(0, 1), (1, 1), (0, 17), (17, 17), (3, 11), (60, 97), (499, 1000)])
def test_the_interval_holds_the_shares_that_a_score_test_does_not_refute(wins, count):
    level = random.choice((0.9, 0.95, 0.99))
    z = NormalDist().inv_cdf((1 + level) / 2)
    for end in wilson(wins, count, level):
        distance = abs(wins / count - end)
        # At its ends the test is at its limit; 0 and 1 are ends where no share beyond is possible.
        assert distance == pytest.approx(z * math.sqrt(end * (1 - end) / count), abs=1e-7)
    assert wilson(0, 0) == (0, 1)


def write_answers(path: Path, rows: list[tuple]) -> Path:
    lines = ["pair,prompt,left,right,choice,preferred,seconds"]
    lines += [f'{n},"a ""b"", c",{left},{right},{choice},x,1.5' for n, (left, right, choice) in enumerate(rows)]
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return path


def test_answers_are_read_back_and_counted(tmp_path, capsys):
    rows = (
        [("old", "new", "right")] * 9 + [("new", "old", "left")] * 8 + [("old", "new", "left"), ("new", "old", "tie")]
    )
    path = write_answers(tmp_path / "a.csv", rows)
    answers = read_answers(path)
    assert answers[0] == Answer(0, 'a "b", c', "old", "new", "right", 1.5) and answers[-1].preferred == "tie"
    found = preference(answers)
    assert (found.first, found.second, found.wins, found.losses, found.ties) == ("new", "old", 1, 17, 1)
    assert (found.low, found.high) == wilson(1, 18)
    assert main(["ab", "--read", str(path), str(path)]) == 0
    assert says("new is preferred", "2 of 36", "2 ties").search(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("pair,prompt\n1,x\n", ("columns", "choice")),
        ("pair,prompt,left,right,choice,preferred,seconds\n1,p,a,b,up,a,1\n", ("line 2", "'up'", "left, right, tie")),
        ("pair,prompt,left,right,choice,preferred,seconds\none,p,a,b,left,a,1\n", ("line 2", "one")),
    ],
)
def test_what_the_page_did_not_export_is_refused(tmp_path, content, words):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=says("a.csv", *words)):
        read_answers(tmp_path / "a.csv")


def test_answers_of_two_comparisons_are_no_comparison():
    with pytest.raises(UserError, match=says("a, b, c", "two sets")):
        preference([Answer(0, "", "a", "b", "left", 1), Answer(1, "", "a", "c", "left", 1)])
    with pytest.raises(UserError, match="none"):
        preference([])


def folder_of(path: Path, entries: list[tuple[str, int, int]]) -> Path:
    """Pictures of one colour each, listed with prompt and seed."""
    path.mkdir()
    listing = []
    for index, (prompt, seed, red) in enumerate(entries):
        Image.new("RGB", (70, 50), (red, 0, 0)).save(path / f"{index}.png")
        listing.append({"file": f"{index}.png", "prompt": prompt, "seed": seed})
    (path / "pictures.json").write_text(json.dumps(listing))
    return path


def test_pictures_are_paired_by_prompt_and_seed(tmp_path):
    first = folder_of(tmp_path / "a", [("p", 0, 10), ("p", 1, 11), ("q", 0, 12), ("only here", 0, 13)])
    second = folder_of(tmp_path / "b", [("q", 0, 112), ("p", 1, 111), ("p", 0, 110)])
    said = []
    pairs = find_pairs(str(first), str(second), log=said.append)
    seen = {(p.prompt, opened(p.first).getpixel((0, 0))[0], opened(p.second).getpixel((0, 0))[0]) for p in pairs}
    assert seen == {("p", 10, 110), ("p", 11, 111), ("q", 12, 112)} and "prompt and seed" in said[-1]
    run = write_run(tmp_path / "run", [1.0], grids=[0, 1])
    with pytest.raises(UserError, match=says("run", "two runs", "rsaft-fast sample")):
        find_pairs(str(run), str(second))


def test_runs_are_compared_by_their_newest_grids(tmp_path):
    runs = [write_run(tmp_path / name, [1.0], grids=[0, 2, 10], seed=n) for n, name in enumerate("ab")]
    pairs = find_pairs(*map(str, runs))
    assert [pair.prompt for pair in pairs] == list(PROMPTS)
    assert all(pair.first.size == (32, 32) and pair.first.tobytes() != pair.second.tobytes() for pair in pairs)


def test_nothing_that_is_seen_says_whose_a_picture_is():
    pairs = [
        Pair(f"prompt {n}", Image.new("RGB", (9, 9), (n, 0, 0)), Image.new("RGB", (9, 9), (0, n, 0))) for n in range(64)
    ]
    names = ("secretly-plain", "secretly-smooth")
    page = blinded_page(pairs, names, seed=5)
    assert "secretly" not in page and page == blinded_page(pairs, names, seed=5) != blinded_page(pairs, names, seed=6)
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["pairs"]
    assert sorted(one["pair"] for one in shown) == list(range(64)) != [one["pair"] for one in shown]
    assert 16 <= sum(one["swapped"] for one in shown) <= 48
    with pytest.raises(UserError, match=says("secretly-plain", "different")):
        blinded_page(pairs, (names[0], names[0]))
