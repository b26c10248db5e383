"""`rsaft-fast score` on pictures of several kinds, against the rewards called by hand."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from builders.clip import write_clip
from builders.image_reward import write_image_reward
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.commands.score import read_picture
from rsaft_fast.rewards import ClipReward, load_image_reward


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return write_image_reward(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def folder(tmp_path):
    """Three pictures of different sizes and kinds, and their prompts."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name, shape in (("a.png", (20, 30, 3)), ("b.png", (40, 25)), ("c.PNG", (18, 18, 4))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.md").write_text("no picture")
    (tmp_path / "prompts.txt").write_text("a red ox\nblue\na big owl\n")
    return tmp_path


def attempt(arguments, capsys) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and captured.out == "", captured
    return lines[0]


def test_a_table_and_a_csv(clip, blip, folder, capsys):
    out = folder / "new" / "scores.csv"
    rewards = ["--reward", f"pickscore={clip}", "--reward", f"imagereward={blip},clamp=ste"]
    arguments = [folder / "in", "--prompts", folder / "prompts.txt", *rewards, "--output", out, "--batch-size", 2]
    assert main(["score", *map(str, arguments), "--device", "cpu"]) == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8", newline="")))
    prompts = ["a red ox", "blue", "a big owl"]
    assert [row["prompt"] for row in rows] == prompts
    files = [folder / "in" / name for name in ("a.png", "b.png", "c.PNG")]
    assert [row["picture"] for row in rows] == [str(file) for file in files]
    means = []
    for column, reward in (
        ("pickscore", ClipReward.from_pretrained(clip)),
        ("imagereward,clamp=ste", load_image_reward(blip)),
    ):
        expected = [reward.score(read_picture(f), [p]).item() for f, p in zip(files, prompts)]
        assert [float(row[column]) for row in rows] == pytest.approx(expected, abs=1e-4)
        means.append(np.mean(expected))
    # pictures, n, then mean ± standard deviation for each reward.
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[:2] == [str(folder / "in"), "3"]
    assert [float(line[2]), float(line[5])] == pytest.approx(means, abs=2e-4)
    specs = json.loads(out.with_suffix(".json").read_text())
    assert len(specs["pickscore"]["sha256"]) == 64
    assert specs["imagereward,clamp=ste"]["preprocessing"]["clamp"] == "ste"


def test_a_listing_gives_the_prompts(clip, folder, capsys):
    listing = [{"file": "c.PNG", "prompt": "x", "seed": 0}, {"file": "a.png", "prompt": "y", "seed": 1}]
    (folder / "in" / "pictures.json").write_text(json.dumps(listing))
    out = folder / "scores.csv"
    assert main(["score", str(folder / "in"), "--reward", f"clip={clip}", "--output", str(out)]) == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8", newline="")))
    assert [(row["picture"][-5:], row["prompt"]) for row in rows] == [("c.PNG", "x"), ("a.png", "y")]
    assert "2  " in capsys.readouterr().out
    assert "exists; give a new file" in attempt(
        ["score", folder / "in", "--reward", f"clip={clip}", "--output", out], capsys
    )


def test_greyscale_is_repeated_and_transparency_lies_on_white(tmp_path):
    Image.fromarray(np.full((4, 5), 51, np.uint8)).save(tmp_path / "grey.png")
    assert torch.equal(read_picture(tmp_path / "grey.png"), torch.full((1, 3, 4, 5), 0.2))
    clear = np.zeros((4, 5, 4), np.uint8)
    clear[0, 0] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    picture = read_picture(tmp_path / "clear.png")
    assert picture[0, :, 0, 0].tolist() == [1, 0, 0] and (picture[0, :, 1:] == 1).all()


def test_wrong_input_is_one_clear_line(clip, folder, tmp_path, capsys):
    pictures, prompts, out = folder / "in", folder / "prompts.txt", folder / "scores.csv"
    short = tmp_path / "short.txt"
    short.write_text("one\ntwo\n")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((pictures / "a.png").read_bytes()[:200])
    empty = tmp_path / "empty"
    empty.mkdir()
    unlisted = tmp_path / "unlisted"
    unlisted.mkdir()
    (unlisted / "pictures.json").write_text("[]")
    good = ["--reward", f"clip={clip}", "--output", out]
    for arguments, words in [
        (["score", pictures, *good], "has no prompt: give --prompts"),
        (["score", pictures, "--prompts", short, *good], "2 prompts for 3 pictures"),
        (["score", empty, "--prompts", short, *good], "holds no picture"),
        (["score", unlisted, *good], "lists no picture"),
        (["score", tmp_path / "absent", "--prompts", short, *good], "no picture or folder"),
        (["score", damaged, damaged, "--prompts", short, *good], "damaged.png' cannot be read"),
        (["score", pictures, "--prompts", prompts, *good, "--reward", f"clip={clip}"], "same reward twice"),
        (["score", pictures, "--prompts", prompts, "--reward", "clip", "--output", out], "is not NAME=PATH"),
        (["score", pictures, "--prompts", prompts, "--reward", f"clop={clip}", "--output", out], "did you mean 'clip'"),
        (["score", pictures, "--prompts", prompts, "--reward", f"clip={clip},szale=1", "--output", out], "szale"),
        (["score", pictures, "--prompts", prompts, "--reward", "clip=/no/where", "--output", out], "/no/where"),
    ]:
        assert words in attempt(arguments, capsys), arguments
    assert not out.exists()
