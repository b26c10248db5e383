"""`rsaft-fast radius`: a verdict, a table, a picture and a file; and what is wrong with its arguments."""

from __future__ import annotations

import json

import pytest
from builders.clip import write_clip
from builders.messages import says
from builders.recipes import recipe, write_recipe
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.commands.radius import CURVE, RESULT
from rsaft_fast.commands.reward_options import parse_judges
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.load import load_config
from rsaft_fast.train.loop import train


@pytest.fixture
def path(tiny, out, tmp_path):
    return write_recipe(tmp_path / "recipe.yaml", recipe(tiny, out))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("other"), context=40, seed=7)


@pytest.mark.slow
def test_a_radius_is_looked_for_at_the_start_and_at_a_run_of_the_recipe(path, out, other, tmp_path, capsys):
    words = ["radius", path, "--judges", f"clip={other}", f"same:clip={load_config(path).reward.path}"]
    words += ["--radii", "0,0.5,2", "--pictures", "8"]
    assert main([*map(str, words), "--output", str(tmp_path / "a")]) == 0
    said = capsys.readouterr()
    content = json.loads((tmp_path / "a" / RESULT).read_text())
    assert content["radii"] == [0, 0.5, 2] and content["judges"].keys() == {"clip", "same"}
    assert content["judges"]["same"]["cosine"][0] == pytest.approx(1, abs=1e-5) and content["gradients"] == "parameter"
    assert content["verdict"][1:] in said.out and says("radius", "clip", "same", "mean", "0 (plain)").search(said.out)
    assert says("warning", "'same'").search(said.err) and Image.open(tmp_path / "a" / CURVE).size[1] > 300
    assert not out.exists()

    train(load_config(path, ["optimizer.lr=0.3"]), log=lambda line: None)
    words += ["--checkpoint", out, "--latent", "--space", "latent", "--norm", "rms", "--output", tmp_path / "b"]
    assert main(list(map(str, words))) == 0
    later = json.loads((tmp_path / "b" / RESULT).read_text())
    assert (later["gradients"], later["ball_space"], later["norm"]) == ("latent", "latent", "rms")
    assert later["judges"]["clip"]["cosine"] != content["judges"]["clip"]["cosine"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], says("--judges", "agreement.judges")),
        (["--judges", "aesthetics=x"], says("--judges", "aesthetics", "aesthetic")),
        (["--judges", "ocr="], says("agreement.judges.ocr", "no gradient")),
        (["--judges", "clip=CLIP", "clip=CLIP"], says("--judges", "'clip'", "twice")),
        (["--judges", "clip=CLIP", "--pictures", "4"], says("--pictures", 4, 8)),
        (["--judges", "clip=CLIP", "--checkpoint", "nowhere"], says("--checkpoint", "nowhere")),
        (["--judges", "clip=nowhere", "--radii", "1"], says("nowhere")),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)
def test_wrong_arguments_are_said_in_a_line(path, other, words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["radius", str(path), *(word.replace("CLIP", str(other)) for word in words)]) == 2
    assert line.search(capsys.readouterr().err)


@pytest.mark.parametrize("text", ["-0.3,1", "0", "0.1;3", "1e9"])
def test_radii_out_of_their_limits_are_refused(path, text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["radius", str(path), f"--radii={text}"])
    assert ended.value.code == 2 and says("--radii", text.split(",")[0]).search(capsys.readouterr().err)


def test_judges_are_named_as_people_write_them():
    found = parse_judges(
        [
            "playground/fair",
            "python:my.module:score",
            "b:playground/brittle",
            "hpsv2.1=folder,scale=percent",
            "x:clip=a:b",
        ]
    )
    assert {name: (judge.name, judge.path) for name, judge in found.items()} == {
        "fair": ("clip", "playground/fair"),
        "python": ("python", "my.module:score"),
        "b": ("clip", "playground/brittle"),
        "hpsv2.1": ("hpsv2.1", "folder"),
        "x": ("clip", "a:b"),
    }
    with pytest.raises(UserError, match=says("--judges", "nothing")):
        parse_judges(["nothing"])
