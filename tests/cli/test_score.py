"""`rsaft-fast score` on pictures of several kinds, against the rewards called by hand."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from builders.clip import write_clip
from builders.image_reward import write_image_reward
from builders.messages import says
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.commands.score import read_picture
from rsaft_fast.rewards import load_reward


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


def row_of(folder, printed: str) -> list[str]:
    """The words of the table's line about a folder."""
    (line,) = (words for words in map(str.split, printed.splitlines()) if words[:1] == [str(folder)])
    return line


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
        ("pickscore", load_reward("clip", clip)),
        ("imagereward,clamp=ste", load_reward("imagereward", blip)),
    ):
        expected = [reward.score(read_picture(f), [p]).item() for f, p in zip(files, prompts)]
        assert [float(row[column]) for row in rows] == pytest.approx(expected, abs=1e-4)
        means.append(np.mean(expected))
    # pictures, n, then mean ± standard deviation for each reward.
    line = row_of(folder / "in", capsys.readouterr().out)
    assert line[1] == "3"
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
        (["score", pictures, *good], "--prompts"),
        (["score", pictures, "--prompts", short, *good], "2 prompts"),
        (["score", empty, "--prompts", short, *good], "no picture"),
        (["score", unlisted, *good], "lists no picture"),
        (["score", tmp_path / "absent", "--prompts", short, *good], "no picture or folder"),
        (["score", damaged, damaged, "--prompts", short, *good], "damaged.png'"),
        (["score", pictures, "--prompts", prompts, *good, "--reward", f"clip={clip}"], "same reward twice"),
        (["score", pictures, "--prompts", prompts, "--reward", "clip", "--output", out], "is not NAME=PATH"),
        (["score", pictures, "--prompts", prompts, "--reward", f"clop={clip}", "--output", out], "did you mean clip"),
        (["score", pictures, "--prompts", prompts, "--reward", f"clip={clip},szale=1", "--output", out], "szale"),
        (["score", pictures, "--prompts", prompts, "--reward", "clip=/no/where", "--output", out], "/no/where"),
    ]:
        assert words in attempt(arguments, capsys), arguments
    assert not out.exists()


def table(path):
    rows = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name not in ("picture", "prompt")}


def test_a_calibration_and_then_a_combination_from_a_recipe(clip, blip, folder, capsys):
    rewards = ["--reward", f"pickscore={clip}", "--reward", f"imagereward={blip}"]
    common = [folder / "in", "--prompts", folder / "prompts.txt", "--device", "cpu"]
    first = ["score", *common, *rewards, "--output", folder / "a.csv", "--calibration", folder / "new" / "c.json"]
    assert main([str(argument) for argument in first]) == 0
    assert says(2, "rewards").search(capsys.readouterr().out)
    assert says("c.json", "exists").search(attempt([*first[:-3], folder / "b.csv", *first[-2:]], capsys))
    recipe = folder / "worst.yaml"
    recipe.write_text(
        f"reward:\n  name: combination\n  how: worst\n  calibration: {folder / 'new' / 'c.json'}\n  parts:\n"
        f"    - {{name: pickscore, path: {clip}}}\n    - {{name: imagereward, path: {blip}, label: image}}\n"
    )
    second = ["score", *common, "--reward", recipe, "--output", folder / "b.csv", "--batch-size", 2]
    assert main([str(argument) for argument in second]) == 0
    alone, together = table(folder / "a.csv"), table(folder / "b.csv")
    assert list(together) == ["worst", "worst/pickscore", "worst/image"]
    assert together["worst/pickscore"] == pytest.approx(alone["pickscore"], abs=1e-5)
    assert together["worst/image"] == pytest.approx(alone["imagereward"], abs=1e-5)
    # Every part in units of its own spread over these three pictures.
    standard = [(np.array(c) - np.mean(c)) / np.std(c, ddof=1) for c in alone.values()]
    assert together["worst"] == pytest.approx(np.minimum(*standard), abs=1e-4)
    spec = json.loads((folder / "b.json").read_text())["worst"]
    assert spec["preprocessing"]["how"] == "worst" and len(spec["preprocessing"]["parts"]) == 2


def test_ranks_compare_all_pictures_of_a_prompt_across_batches(clip, folder):
    rng = np.random.default_rng(3)
    for name in ("d.png", "e.png", "f.png"):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / "in" / name)
    (folder / "prompts.txt").write_text("ox\nowl\nox\nox\nowl\nox\n")
    recipe = folder / "rank.yaml"
    recipe.write_text(f"name: combination\nhow: rank\nparts:\n  - {{path: {clip}}}\n")
    arguments = [folder / "in", "--prompts", folder / "prompts.txt", "--reward", recipe, "--batch-size", 2]
    assert main(["score", *map(str, arguments), "--device", "cpu", "--output", str(folder / "r.csv")]) == 0
    found = table(folder / "r.csv")
    scores, rates = found["rank/clip"], found["rank"]
    for group in ([0, 2, 3, 5], [1, 4]):
        order = sorted(group, key=lambda i: scores[i])
        assert [rates[i] for i in order] == pytest.approx(np.linspace(0, 1, len(group)))


def test_a_recipe_without_a_usable_reward_is_one_clear_line(clip, folder, capsys):
    (folder / "a.yaml").write_text("reward: {name: combination, parts: []}\n")
    (folder / "b.yaml").write_text("reward: {path: x, colour: blue}\n")
    for name, words in [("a.yaml", "parts"), ("b.yaml", "colour"), ("c.yaml", "c.yaml'")]:
        arguments = ["score", folder / "in", "--prompts", folder / "prompts.txt", "--reward", folder / name]
        assert words in attempt([*arguments, "--output", folder / "x.csv"], capsys)
