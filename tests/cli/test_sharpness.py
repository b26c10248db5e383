"""`rsaft-fast sharpness` on pictures of two sizes, against the function called by hand."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from builders.clip import write_clip
from builders.messages import says
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.commands.sharpness import rank_correlation
from rsaft_fast.data.pictures import read_picture
from rsaft_fast.rewards import load_reward
from rsaft_fast.smoothing.sharpness import searched_sharpness


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return [write_clip(tmp_path_factory.mktemp("clip"), context=40, seed=seed) for seed in (0, 1)]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    listing = []
    for index in range(5):
        size = (20, 24, 3) if index < 3 else (18, 18, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / "in" / f"{index}.png")
        listing.append({"file": f"{index}.png", "prompt": f"prompt {index}", "seed": 0})
    (tmp_path / "in" / "pictures.json").write_text(json.dumps(listing))
    return tmp_path


def run(folder, clips, *more) -> int:
    words = ["sharpness", folder / "in", "--reward", f"clip={clips[0]}", "--device", "cpu", "--batch-size", "2"]
    return main([str(word) for word in (*words, "--output", folder / "s.csv", *more)])


def test_a_table_a_summary_and_a_picture(clips, folder, capsys):
    options = ["--radius", "1", "0.3", "--steps", "4", "--restarts", "1", "--with-reward", f"clip={clips[1]}"]
    assert run(folder, clips, *options) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((folder / "s.csv").open(encoding="utf-8", newline="")))
    assert [row["prompt"] for row in rows] == [f"prompt {index}" for index in range(5)]
    reward, other = (load_reward("clip", clip) for clip in clips)
    summary = json.loads((folder / "s.json").read_text())
    for place, radius in enumerate((0.3, 1.0)):
        one_step, search = [], []
        for index, row in enumerate(rows):
            image = read_picture(folder / "in" / f"{index}.png")
            found = searched_sharpness(
                reward, image, [row["prompt"]], radius, steps=4, restarts=1, first=index, batch_size=1
            )
            assert float(row["clip"]) == pytest.approx(found.scores.item(), abs=1e-5)
            assert float(row["with/clip"]) == pytest.approx(other.score(image, [row["prompt"]]).item(), abs=1e-5)
            one_step.append(float(row[f"clip/s1@{radius:g}"]))
            search.append(float(row[f"clip/s1_search@{radius:g}"]))
            assert one_step[-1] == pytest.approx(found.one_step.item(), abs=1e-4)
            assert search[-1] == pytest.approx(found.search.item(), abs=1e-4) and search[-1] >= one_step[-1]
        entry = summary["rewards"]["clip"]["radii"][place]
        assert entry["radius"] == radius
        assert entry["search"]["mean"] == pytest.approx(np.mean(search))
        assert entry["search"]["quantiles"]["0.5"] == pytest.approx(np.median(search))
        assert entry["gap"]["mean"] == pytest.approx(np.mean(search) - np.mean(one_step), abs=1e-9)
        spread = np.std([float(row["clip"]) for row in rows], ddof=1)
        assert entry["search_over_spread"] == pytest.approx(np.mean(search) / spread)
        assert f"{np.mean(search):.4g}" in printed
        correlation = summary["rank_correlations"][place]["search"]
        assert correlation == pytest.approx(rank_correlation(search, [float(row["with/clip"]) for row in rows]))
        assert f"{correlation:+.3f}" in printed
    with Image.open(folder / "s.png") as drawn:
        assert len(set(drawn.convert("RGB").resize((64, 32)).getdata())) > 20
    assert not (folder / "s.csv.partial").exists()
    assert run(folder, clips) == 2 and "s.csv exists" in capsys.readouterr().err


def test_what_is_measured_is_kept_when_it_stops(clips, folder, capsys, monkeypatch):
    from rsaft_fast.commands import sharpness as command

    measure, calls = command.searched_sharpness, []

    def stops(*arguments, **options):
        calls.append(arguments[3])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(command, "searched_sharpness", stops)
    options = ["--radius", "0.3", "1", "--steps", "2"]
    assert run(folder, clips, *options) == 130
    assert "s.csv.partial" in capsys.readouterr().err
    calls.clear()
    monkeypatch.setattr(command, "searched_sharpness", lambda *a, **o: calls.append(a[3]) or measure(*a, **o))
    assert run(folder, clips, *options) == 0
    # Five pictures in twos, the second pair of two sizes: four calls a radius.
    assert calls == [1.0] * 4
    broken = (folder / "s.csv").read_bytes()
    for name in ("s.csv", "s.json", "s.png"):
        (folder / name).unlink()
    assert run(folder, clips, *options) == 0 and (folder / "s.csv").read_bytes() == broken


def test_wrong_input_is_one_clear_line(clips, folder, capsys):
    (folder / "rank.yaml").write_text(f"name: combination\nhow: rank\nparts:\n  - {{path: {clips[0]}}}\n")
    for more, words in [
        (["--radius", "0"], says("--radius", 0, "positive")),
        (["--radius", "nan"], says("--radius", "nan", "positive")),
        (["--space", "latent"], says("latent", "--pipeline")),
        (["--pipeline", "playground"], says("pixel01", "--pipeline", "playground")),
        (["--reward", folder / "rank.yaml"], says("combination", "gradient")),
    ]:
        assert run(folder, clips, *more) == 2, more
        assert words.search(capsys.readouterr().err), more
    assert not (folder / "s.csv").exists()


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 9], [0, 5, 6, 7]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 9], [7, 6, 5, 0]) == pytest.approx(-1)
    # Ties share a rank: ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    assert rank_correlation([1, 2, 2, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
