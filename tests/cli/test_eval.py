"""`rsaft-fast eval`: equal to `score`, the same after a stop, with every choice written down."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from builders.clip import write_clip
from builders.dino import write_dino
from builders.messages import says
from builders.ranks import command
from builders.recipes import PROMPTS, config, run_cli, start_cli
from transformers import Dinov2Model

from rsaft_fast.cli import main
from rsaft_fast.commands import eval_models
from rsaft_fast.data.pictures import read_picture
from rsaft_fast.evaluation.distances import frechet_distance, spread
from rsaft_fast.recipe.load import load_config
from rsaft_fast.rewards.features import load_features
from rsaft_fast.train.logging import CONFIG
from rsaft_fast.train.loop import train

CALM = {"image": None, "parameters": None}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """A plain run and a smoothed one, each with both its checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    changes = dict(checkpoint_every=1, keep_checkpoints=None, optimizer__lr=0.1, sampler={"steps": 2})
    train(config(tiny, folder / "plain", smoothing=CALM, **changes))
    train(config(tiny, folder / "smoothed", **changes))
    return folder / "plain", folder / "smoothed"


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    return write_clip(folder, seed=5, context=40)


def evaluate(output: Path, *arguments) -> int:
    return main(["eval", *map(str, arguments), "--batch-size", "3", "--output", str(output)])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def figures(output: Path) -> dict:
    """Everything that was found, without where it lies."""
    found = json.loads((output / "evaluation.json").read_text())
    return {key: found[key] for key in ("complete", "missing", "rows", "equal_reward")}


@pytest.fixture(scope="module")
def whole(tiny, runs, judge, tmp_path_factory) -> Path:
    """Both runs with all their checkpoints, evaluated in one go."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate(output, *arguments_of(tiny, runs, judge)) == 0
    return output


def arguments_of(tiny, runs, judge) -> list:
    given = ["--prompts", tiny.prompts, "--pictures", 2, "--checkpoint", "all"]
    return [*runs, *given, "--rewards", f"held:clip={judge}"]


@pytest.mark.slow
def test_scores_are_those_of_score_and_sharpness_on_the_same_pictures(tiny, whole, judge, tmp_path):
    rows = table(whole / "scores.csv")
    model = next(row["model"] for row in rows if row["updates"] == "2")
    own = [row for row in rows if row["model"] == model and row["updates"] == "2"]
    folder = (whole / own[0]["picture"]).parent
    options = ["--batch-size", "3", "--output"]
    rewards = ["--reward", f"clip={tiny.clip}"]
    assert main(["score", str(folder), *rewards, *options, str(tmp_path / "trained.csv")]) == 0
    assert main(["score", str(folder), "--reward", f"clip={judge}", *options, str(tmp_path / "held.csv")]) == 0
    assert main(["sharpness", str(folder), *rewards, "--radius", "0.3", *options, str(tmp_path / "s1.csv")]) == 0
    assert [row["clip"] for row in own] == [row["clip"] for row in table(tmp_path / "trained.csv")]
    assert [row["held"] for row in own] == [row["clip"] for row in table(tmp_path / "held.csv")]
    assert [row["S1 clip@0.3"] for row in own] == [row["clip/s1@0.3"] for row in table(tmp_path / "s1.csv")]
    assert len(own) == 2 * len(PROMPTS) and {row["seed"] for row in own} == {"0", "1"}


def test_the_table_is_the_papers_and_every_choice_is_written_down(tiny, runs, whole, judge):
    found = json.loads((whole / "evaluation.json").read_text())
    assert found["complete"] and not found["missing"]
    labels = [row["label"] for row in found["rows"]]
    assert labels[0] == "base" and "+ DRaFT-1" in labels and "+ DRaFT-1 + RSA-FT" in labels and len(labels) == 5
    base, *others = found["rows"]
    assert base["scores"]["clip"]["trained"] and not base["scores"]["held"]["trained"]
    assert all("less_first" in row["scores"]["held"] for row in others) and "less_first" not in base["scores"]["held"]
    values = [float(row["held"]) for row in table(whole / "scores.csv") if row["model"] == "base"]
    assert base["scores"]["held"]["value"] == pytest.approx(sum(values) / len(values))
    about = found["protocol"]
    assert about["seeds"] == [0, 1] and about["count"] == len(PROMPTS) and about["batch_size"] == 3
    for model in about["models"]:
        assert model["sampler"]["steps"] == 2 and (model["width"], model["height"]) == (32, 32)
        assert model["pipeline_weights"].startswith("sha256 ") and model["software"]["torch"] == torch.__version__
    trained = {model["trained_weights"] for model in about["models"]}
    assert len(trained) == 5 and "" in trained
    assert found["specs"]["held"]["sha256"] and found["specs"]["features"]["name"] == "thumbnail"
    page = (whole / "evaluation.md").read_text()
    assert "| base |" in page and "clip*" in page and "PARTIAL" not in page and "Along the runs" in page
    # What one evaluation drew, another one that has fewer prompts draws as well.
    assert found["rows"][1]["step"] == 1


def test_a_picture_depends_on_its_prompt_and_seed_alone(tiny, runs, whole, judge, tmp_path):
    (tmp_path / "two.txt").write_text(f"{PROMPTS[2]}\n{PROMPTS[0]}\n")
    output = tmp_path / "out"
    assert (
        evaluate(output, runs[0], "--prompts", tmp_path / "two.txt", "--rewards", f"clip={tiny.clip}", "--s1", 0) == 0
    )
    mine = {row["prompt"]: output / row["picture"] for row in table(output / "scores.csv") if row["updates"]}
    theirs = [row for row in table(whole / "scores.csv") if row["updates"] == "2" and row["model"] == "+ DRaFT-1"]
    for row in theirs:
        if row["seed"] == "0" and row["prompt"] in mine:
            assert (whole / row["picture"]).read_bytes() == mine.pop(row["prompt"]).read_bytes()
    assert not mine


@pytest.mark.slow
def test_stopped_anywhere_it_goes_on_to_the_same_figures(tiny, runs, whole, judge, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    arguments = arguments_of(tiny, runs, judge)
    total = 5 * 2 * len(PROMPTS)
    left = random.randrange(1, total)
    save = eval_models.save_png

    def interrupted(image, path):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return save(image, path)

    monkeypatch.setattr(eval_models, "save_png", interrupted)
    drawn = left
    assert evaluate(output, *arguments) == 128 + signal.SIGINT
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert says("interrupted", total, output, "same command").search(said) and not (output / "evaluation.json").exists()
    assert len(list(output.glob("pictures/*/*.png"))) == drawn
    monkeypatch.setattr(eval_models, "save_png", save)

    # The next stop is within the second reward.
    from rsaft_fast.commands import eval as command

    honest, calls = command.score_pictures, []

    def broken(reward, *rest):
        calls.append(reward)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return honest(reward, *rest)

    monkeypatch.setattr(command, "score_pictures", broken)
    assert evaluate(output, *arguments) == 128 + signal.SIGINT
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert says("interrupted", "partial", "same command").search(said)
    partial = json.loads((output / "evaluation.json").read_text())
    assert not partial["complete"] and partial["missing"] == ["held", "distances"]
    assert "clip" in partial["rows"][0]["scores"] and "PARTIAL" in (output / "evaluation.md").read_text()
    monkeypatch.setattr(command, "score_pictures", honest)
    assert evaluate(output, *arguments) == 0
    assert figures(output) == figures(whole)
    assert (output / "scores.csv").read_bytes() == (whole / "scores.csv").read_bytes()


@pytest.mark.slow  # two processes that load everything
def test_killed_it_goes_on_to_the_same_figures(tiny, runs, whole, judge, tmp_path):
    output = tmp_path / "out"
    command = ["eval", *arguments_of(tiny, runs, judge), "--batch-size", "3", "--output", output]
    process = start_cli(command, cwd=tmp_path)
    while len(list(output.glob("pictures/*/*.png"))) < 7:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = run_cli(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures(output) == figures(whole)


@pytest.mark.slow  # six runs
def test_a_run_of_each_method(tiny, tmp_path):
    methods = {"refl": "ReFL", "draft": "DRaFT-1", "draft_lv": "DRaFT-LV", "alignprop": "AlignProp"}
    methods |= {"drtune": "DRTune", "flow_grpo": "Flow-GRPO"}
    for name in methods:
        more = {"data__group_size": 2} if name == "flow_grpo" else {}
        train(config(tiny, tmp_path / name, method={"name": name}, max_steps=1, smoothing=CALM, **more))
    output = tmp_path / "out"
    assert evaluate(output, *(tmp_path / name for name in methods), "--prompts", tiny.prompts, "--s1", 0) == 0
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["base", *(f"+ {label}" for label in methods.values())]
    assert all("less_first" in row["scores"]["clip"] for row in rows[1:])


def test_distances_are_those_of_the_named_network(tiny, runs, whole, judge, tmp_path):
    """The same folder, with another reward or none and other features: nothing is drawn again."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    before = {path: path.stat().st_mtime_ns for path in output.glob("pictures/*/*.png")}
    dino = write_dino(tmp_path / "dino")
    assert evaluate(output, *arguments_of(tiny, runs, judge), "--features", dino) == 0
    assert {path: path.stat().st_mtime_ns for path in output.glob("pictures/*/*.png")} == before
    found = json.loads((output / "evaluation.json").read_text())
    features = {}
    network = load_features(dino, checkpoint=False)
    assert isinstance(network.model, Dinov2Model)
    for row, model in zip(found["rows"], found["protocol"]["models"]):
        files = sorted((output / model["pictures"]).glob("*.png"), key=lambda file: file.name.split("_")[::-1])
        with torch.no_grad():
            features[row["label"]] = network.raw(torch.cat([read_picture(file) for file in files])).double()
    for row in found["rows"][1:]:
        own = features[row["label"]]
        assert row["distances"]["FID"]["value"] == pytest.approx(frechet_distance(features["base"], own), rel=1e-4)
        expected = 100 * spread(torch.nn.functional.normalize(own), range(len(own))).value
        assert row["distances"]["diversity x100"]["value"] == pytest.approx(expected, rel=1e-4)
    assert found["specs"]["features"]["name"] == "dinov2"


@pytest.mark.slow
def test_full_training_and_the_best_checkpoint(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    full = dict(parameters={"train": "full"}, checkpoint_every=1, keep_checkpoints=None, optimizer__lr=1e-3)
    outcome = train(config(tiny, run, smoothing=CALM, **full))
    prompts = ["--prompts", str(tiny.prompts)]
    assert main(["sample", "--run", str(run), "--checkpoint", "best", *prompts, "--output", str(tmp_path / "a")]) == 2
    assert says("best", run / "best", "STEP").search(capsys.readouterr().err)
    # What is exported of a checkpoint is what the run exports at its end.
    shutil.copytree(outcome.export, run / "best" / outcome.export.name)
    (run / "best" / "evaluation.json").write_text('{"step": 2, "score": "held_out/a", "value": 1.0}')
    draw = ["sample", "--run", str(run), "--prompts", *PROMPTS[:2], "--output"]
    assert main([*draw, str(tmp_path / "best"), "--checkpoint", "best"]) == 0
    assert main([*draw, str(tmp_path / "first"), "--checkpoint", "1"]) == 0
    assert main([*draw, str(tmp_path / "last")]) == 0
    best, first, last = (
        [path.read_bytes() for path in sorted((tmp_path / name).glob("0*.png"))] for name in ("best", "first", "last")
    )
    assert best == last != first
    output = tmp_path / "eval"
    assert evaluate(output, run, *prompts, "--checkpoint", "best", "--s1", 0) == 0
    found = json.loads((output / "evaluation.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["base", "+ DRaFT-1"]
    assert found["protocol"]["models"][1]["checkpoint"] == "best" and found["rows"][1]["step"] == 2


def test_the_best_checkpoint_of_a_lora(tiny, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    shutil.copytree(run / "lora", run / "best" / "lora")
    draw = ["sample", "--run", str(run), "--prompts", *PROMPTS[:2], "--output"]
    assert main([*draw, str(tmp_path / "best"), "--checkpoint", "best"]) == 0
    assert main([*draw, str(tmp_path / "last")]) == 0
    for path in (tmp_path / "best").glob("0*.png"):
        one, other = read_picture(path), read_picture(tmp_path / "last" / path.name)
        assert (one - other).abs().max() <= 2 / 255  # alpha / rank is multiplied into B


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["RUN", "--protocol", "drawbnch"], ["drawbnch", "drawbench"]),
        (["RUN", "--protocol", "geneval=x", "--count", "3"], ["--count", "geneval=x"]),
        (["RUN"], ["--prompts", "--protocol"]),
        (["MODEL", "--prompts", "FILE"], ["--rewards"]),
        (["MODEL", "--prompts", "FILE", "--checkpoint", "best", "--rewards", "clip=x"], ["--checkpoint best"]),
        (["RUN", "--prompts", "FILE", "--checkpoint", "7"], ["7", "step_1, step_2"]),
        (["RUN", "--prompts", "FILE", "--checkpoint", "newest"], ["newest", "last", "best", "all"]),
        (["RUN", "--prompts", "FILE", "--s1", "-1"], ["--s1 -1"]),
        (["RUN", "--prompts", "FILE", "--rewards", "prompt:clip=x"], ["prompt", "LABEL"]),
        (["nowhere", "--prompts", "FILE", "--rewards", "clip=x"], ["nowhere"]),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_is_drawn(tiny, runs, tmp_path, capsys, arguments, words):
    names = {"RUN": str(runs[0]), "MODEL": str(tiny.sd15), "FILE": str(tiny.prompts)}
    try:
        code = evaluate(tmp_path / "out", *(names.get(argument, argument) for argument in arguments))
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rsaft-fast: error:") and all(word in error for word in words), error
    assert not list(tmp_path.glob("out/pictures/*/*.png"))


@pytest.mark.slow
def test_several_processes_find_what_one_finds(tiny, runs, judge, tmp_path):
    """Each draws and scores its batches; the files are those of one, and so are the scores of `score`."""
    options = ["--prompts", tiny.prompts, "--rewards", f"other:clip={judge}", "--s1", "0.3", "--batch-size", "3"]
    assert main(["eval", *map(str, (*runs, *options)), "--output", str(tmp_path / "one")]) == 0
    ranks = command(3, tmp_path / "logs", "eval", *runs, *options, "--output", tmp_path / "many")
    assert ranks.wait() == [0] * 3, "\n".join(map(ranks.said, range(3)))
    assert "table in" in ranks.said(0) and ranks.said(1) == ranks.said(2) == ""
    assert figures(tmp_path / "one") == figures(tmp_path / "many")
    pictures = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert pictures and all(
        (tmp_path / "one" / path).read_bytes() == (tmp_path / "many" / path).read_bytes() for path in pictures
    )
    folder = str((tmp_path / "one" / pictures[0]).parent)
    score = ["score", folder, "--reward", f"clip={judge}", "--batch-size", "1", "--output"]
    assert main([*score, str(tmp_path / "one.csv")]) == 0
    ranks = command(2, tmp_path / "more logs", *score, tmp_path / "two.csv")
    assert ranks.wait() == [0] * 2, "\n".join(map(ranks.said, range(2)))
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes() and ranks.said(1) == ""
    wrong = command(2, tmp_path / "last logs", *score, tmp_path / "one.csv")
    assert wrong.wait() == [2, 2] and "exists" in wrong.said(0) and wrong.said(1) == ""


def test_pictures_of_something_else_are_not_taken(tiny, runs, whole, judge, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    assert evaluate(output, *arguments_of(tiny, runs, judge), "--steps", 3) == 2
    assert says("sampler", "--output", output / "pictures" / "base").search(capsys.readouterr().err)
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    changed = load_config(other / CONFIG).model_dump(mode="json")
    changed["backbone"]["height"] = 64
    (other / CONFIG).write_text(json.dumps(changed))
    assert evaluate(tmp_path / "o", runs[0], other, "--prompts", tiny.prompts) == 2
    assert says("32x64", "32x32", "--height").search(capsys.readouterr().err)
