"""Monitors of a run: what an evaluation measures, what a resumed run goes on with, the best model, and early stops."""

from __future__ import annotations

import json
import math
import shutil
import signal

import pytest
import torch
from builders.clip import write_clip
from builders.dino import write_dino
from builders.messages import says
from builders.recipes import config
from safetensors.torch import load_file

from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.evaluation.monitors import Monitors, lora_norm
from rsaft_fast.recipe.check import check_keys
from rsaft_fast.rewards import load_reward
from rsaft_fast.rewards.features import load_features
from rsaft_fast.sampling.noise import NoiseSource
from rsaft_fast.sampling.pictures import SAMPLE_STEP
from rsaft_fast.sampling.rollout import guided_prediction
from rsaft_fast.smoothing.sharpness import sharpness
from rsaft_fast.train.best import BestModel
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.logging import read_evaluations, read_metrics
from rsaft_fast.train.loop import train
from rsaft_fast.train.trainer import Trainer

NAMES = {"reward", "held_out/other", "s1", "diversity", "prediction_norm"}
STATISTICS = {f"image/{name}" for name in ("dark", "saturated", "contrast", "edges", "entropy", "grid")}


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> str:
    """A second reward, of other weights."""
    return str(write_clip(tmp_path_factory.mktemp("other"), context=40, seed=7))


def watched(other: str, **keys) -> dict:
    return {"rewards": {"other": {"path": other}}, "every": 2, "count": 4, **keys}


def lines_of(folder) -> list[str]:
    return (folder / "evaluations.jsonl").read_text().splitlines()


def test_an_evaluation_measures_what_it_says(tiny, out, other):
    """Every value against the parts of the package that measure one thing, on pictures drawn call by call."""
    settings = config(tiny, out, "sd3", evaluation=watched(other, count=3), sharpness={"radius": 0.5})
    trainer = Trainer(settings, check_config(settings))
    trainer.update()
    grid, drawn = trainer.draw(False, True)
    assert grid is None
    record = trainer.evaluate(drawn)
    prompts, backbone = trainer.evaluation_prompts, trainer.backbone
    assert record["step"] == 1 and len(prompts) == 3 and set(record["pictures"]) == NAMES | STATISTICS

    rows, norms = [], []
    for first in (0, 2):  # batches of two, as the recipe's
        texts = prompts[first : first + 2]
        noise = NoiseSource(0, SAMPLE_STEP, tuple(range(first, first + len(texts))))
        x, squares = backbone.initial_latents(noise), []
        with torch.no_grad():
            for step in trainer.schedule:
                f = guided_prediction(backbone, x, step, trainer.encoded(texts))
                squares.append(f.double().square().mean((1, 2, 3)))
                x = step.a * x + step.b * f
            rows.append(backbone.decode(x))
        norms += torch.stack(squares).mean(0).sqrt().tolist()
    images, own = torch.cat(rows), record["pictures"]
    assert own["prediction_norm"] == pytest.approx(norms, rel=1e-5)
    for name, path in (("reward", tiny.clip), ("held_out/other", other)):
        scores = load_reward("clip", path).score(images, prompts).double()
        assert own[name] == pytest.approx(scores.tolist(), rel=1e-4)
        assert record["values"][name] == pytest.approx(scores.mean().item(), rel=1e-4)
        assert record["values"][f"{name}_se"] == pytest.approx(scores.std().item() / math.sqrt(3), rel=1e-3)
    s1 = sharpness(load_reward("clip", tiny.clip), images, prompts, 0.5)
    assert own["s1"] == pytest.approx(s1.tolist(), rel=1e-3)
    tower = load_reward("clip", tiny.clip)
    features = tower.model.get_image_features(pixel_values=tower.preprocess(images)).pooler_output.double()
    similar = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    assert record["values"]["diversity"] == pytest.approx(1 - (similar.sum().item() - 3) / 6, rel=1e-3)
    change = {n: p.detach() for n, p in trainer.parameters.items()}
    products = [2.0 * change[n.replace("lora_A", "lora_B")] @ a for n, a in change.items() if "lora_A" in n]
    length = math.sqrt(sum(p.double().square().sum().item() for p in products))
    assert record["values"]["lora_norm"] == pytest.approx(length, rel=1e-4) and length > 0


def test_the_norm_of_adapters_is_that_of_their_products():
    a, b = torch.randn(3, 5, 2, 2), torch.randn(7, 3, 1, 1)
    c, d = torch.randn(4, 6), torch.randn(9, 4)
    found = lora_norm({"x.lora_A.w": a, "x.lora_B.w": b, "y.lora_A.w": c, "y.lora_B.w": d}, -1.5)
    wanted = 1.5 * math.sqrt((b.flatten(1) @ a.flatten(1)).square().sum() + (d @ c).square().sum())
    assert found == pytest.approx(wanted, rel=1e-5)


def test_diversity_is_measured_in_dino_or_pixels_where_asked_or_needed(tiny, out, other, tmp_path):
    folder = write_dino(tmp_path / "dino")
    said: list[str] = []
    settings = config(tiny, out, "sd3", evaluation=watched(other, features=str(folder)))
    trainer = Trainer(settings, check_config(settings), said.append)
    _, drawn = trainer.draw(False, True)
    with torch.no_grad():
        features = load_features(folder)(drawn.images).double()
    wanted = 1 - (features @ features.T).masked_select(~torch.eye(4, dtype=torch.bool)).mean().item()
    assert trainer.evaluate(drawn)["values"]["diversity"] == pytest.approx(wanted, rel=1e-4)
    assert any("diversity" in line and "dinov2" in line and str(folder) in line for line in said)

    parts = {"name": "combination", "parts": [{"path": str(tiny.clip)}]}
    settings = config(tiny, out, "sd3", evaluation=watched(other), reward=parts)
    said.clear()
    trainer = Trainer(settings, check_config(settings), said.append)
    assert any("diversity" in line and "pixels" in line for line in said)
    flat = drawn.images.clamp(0, 1).double().flatten(1) - 0.5  # 32 x 32 already
    features = flat / flat.norm(dim=1, keepdim=True)
    wanted = 1 - (features @ features.T).masked_select(~torch.eye(4, dtype=torch.bool)).mean().item()
    assert trainer.evaluate(drawn)["values"]["diversity"] == pytest.approx(wanted, rel=1e-4)


def test_a_run_is_evaluated_from_the_start_and_changes_nothing(tiny, out, other, tmp_path):
    said: list[str] = []
    # Two pictures of four, by twos: of another batch shape they would differ in rounding.
    keys = {"max_steps": 5, "samples": {"every": 2, "count": 2}}
    train(config(tiny, out, "sd3", evaluation=watched(other), **keys), log=said.append)
    records = read_evaluations(out)
    assert [record["step"] for record in records] == [0, 2, 4, 5]
    for record in records:
        assert set(record) == {"step", "set", "values", "pictures", "alarms"}
        assert set(record["values"]) == NAMES | STATISTICS | {
            "reward_se", "held_out/other_se", "prediction_norm_base", "lora_norm"
        }  # fmt: skip
        assert record["values"]["prediction_norm_base"] == records[0]["values"]["prediction_norm"]
    assert records[0]["values"]["lora_norm"] == 0 < records[1]["values"]["lora_norm"]
    told = [line for line in said if line.startswith("update 5/5")]
    assert f"held-out other {records[2]['values']['held_out/other']:.4g}" in told[0]
    lines = [line for line in said if line.startswith("evaluation after update")]
    assert len(lines) == 4 and f"{records[3]['values']['reward']:.4g}" in lines[3]

    plain = tmp_path / "plain"
    train(config(tiny, plain, "sd3", **keys), log=lambda line: None)
    assert not (plain / "evaluations.jsonl").exists()
    one, two = load_file(out / "lora/pytorch_lora_weights.safetensors"), load_file(
        plain / "lora/pytorch_lora_weights.safetensors"
    )  # fmt: skip
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    figures = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(folder)] for folder in (out, plain)
    ]
    assert figures[0] == figures[1]
    for step in (0, 2, 4, 5):  # the grid is among the evaluation's pictures, which are drawn once
        grids = [(folder / f"samples/step_{step}.png").read_bytes() for folder in (out, plain)]
        assert grids[0] == grids[1]


@pytest.mark.slow
@pytest.mark.parametrize("where", [Monitors, BestModel], ids=["in an evaluation", "between its record and its model"])
def test_a_killed_run_goes_on_to_the_same_evaluations(tiny, out, other, tmp_path, where, monkeypatch):
    keys = {"max_steps": 5, "checkpoint_every": 3, "evaluation": watched(other, best="held_out/other")}
    train(config(tiny, tmp_path / "whole", "sd3", **keys), log=lambda line: None)

    class Killed(BaseException):
        pass

    name, calls = ("measure", 3) if where is Monitors else ("offer", 2)  # those of the evaluation after update 4

    honest = getattr(where, name)

    def die(*given, **named):
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise Killed
        return honest(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(where, name, die)
        with pytest.raises(Killed):
            train(config(tiny, out, "sd3", **keys), log=lambda line: None)
    assert len(lines_of(out)) == (2 if where is Monitors else 3)
    with (out / "evaluations.jsonl").open("a") as stream:
        stream.write('{"step": 4, "val')  # a line that the kill cut short
    train(config(tiny, out, "sd3", resume="auto", **keys), log=lambda line: None)
    assert lines_of(out) == lines_of(tmp_path / "whole")
    best = [json.loads((folder / "best/evaluation.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert best[0] == best[1]


@pytest.mark.slow
def test_a_run_that_was_stopped_in_an_evaluation_makes_it_first(tiny, out, other, tmp_path, monkeypatch):
    keys = {"max_steps": 3, "evaluation": watched(other)}
    train(config(tiny, tmp_path / "whole", "sd3", **keys), log=lambda line: None)
    honest = Monitors.draw

    def stopped(self, stop):
        if self.history:
            signal.raise_signal(signal.SIGTERM)
        return honest(self, stop)

    with monkeypatch.context() as patched:
        patched.setattr(Monitors, "draw", stopped)
        outcome = train(config(tiny, out, "sd3", **keys), log=lambda line: None)
    assert outcome.step == 2 and outcome.stopped_by == signal.SIGTERM and len(lines_of(out)) == 1
    train(config(tiny, out, "sd3", resume="auto", **keys), log=lambda line: None)
    assert lines_of(out) == lines_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_later_best_model_is_made_again_when_the_run_goes_back(tiny, out, other, tmp_path):
    keys = {"checkpoint_every": 2, "keep_checkpoints": None, "evaluation": watched(other, best="reward")}
    train(config(tiny, out, "sd3", max_steps=6, **keys), log=lambda line: None)
    before = lines_of(out), (out / "best/evaluation.json").read_text()
    values = [record["values"]["reward"] for record in read_evaluations(out)][1:]
    assert json.loads(before[1]) == {"step": 2 + 2 * values.index(max(values)), "score": "reward", "value": max(values)}
    weights = load_file(out / "best/lora/pytorch_lora_weights.safetensors")
    kept = load_file(out / f"checkpoints/step_{json.loads(before[1])['step']}/lora/pytorch_lora_weights.safetensors")
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    for step in (4, 6):
        shutil.rmtree(out / f"checkpoints/step_{step}")
    train(config(tiny, out, "sd3", max_steps=6, resume="auto", **keys), log=lambda line: None)
    assert (lines_of(out), (out / "best/evaluation.json").read_text()) == before
    again = load_file(out / "best/lora/pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)

    said: list[str] = []  # another score: what was kept is no longer the best, and not deleted either
    keys["evaluation"] = watched(other, best="held_out/other")
    train(config(tiny, out, "sd3", max_steps=8, resume="auto", **keys), log=said.append)
    assert json.loads((out / "superseded-1/best/evaluation.json").read_text())["score"] == "reward"
    assert json.loads((out / "best/evaluation.json").read_text())["step"] == 8


@pytest.mark.slow
def test_other_pictures_begin_a_new_list(tiny, out, other):
    train(config(tiny, out, "sd3", max_steps=2, evaluation=watched(other)), log=lambda line: None)
    said: list[str] = []
    train(config(tiny, out, "sd3", max_steps=4, resume="auto", evaluation=watched(other, count=5)), log=said.append)
    records = read_evaluations(out)
    assert [record["step"] for record in records] == [0, 2, 4]
    assert all(len(record["pictures"]["reward"]) == 5 for record in records)
    assert any("other pictures" in line for line in said)


def falling(tmp_path, monkeypatch, name: str = "falling") -> dict:
    """A held-out reward that is the untrained picture's distance to the present one, negative."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "seen = {}\n"
        "def score(images, prompts):\n"
        "    means = images.double().mean((1, 2, 3))\n"
        "    return torch.stack([-(m - seen.setdefault(p, m)).abs() for m, p in zip(means, prompts)]).float()\n"
    )
    return {"name": "python", "path": f"{name}:score"}


@pytest.mark.slow
def test_a_run_ends_when_its_score_no_longer_rises(tiny, out, tmp_path, monkeypatch):
    rewards = {"start": falling(tmp_path, monkeypatch)}
    keys = {"max_steps": 5, "checkpoint_every": 5, "optimizer__lr": 0.05}
    evaluation = {"rewards": rewards, "every": 1, "count": 4, "stop_on": "held_out/start", "patience": 3}
    outcome = train(config(tiny, out, "sd3", evaluation=evaluation, **keys), log=lambda line: None)
    scores = [record["values"]["held_out/start"] for record in read_evaluations(out)]
    assert outcome.step == 3 and scores[0] == 0 and max(scores[1:]) < 0
    assert "held_out/start" in outcome.message and "patience 3" in outcome.message and outcome.export.is_dir()
    again = train(config(tiny, out, "sd3", evaluation=evaluation, resume="auto", **keys), log=lambda line: None)
    assert again.step == 3
    on = train(
        config(tiny, out, "sd3", evaluation=evaluation | {"stop_on": None}, resume="auto", **keys),
        log=lambda line: None,
    )
    assert on.step == 5


def test_a_run_ends_at_an_alarm_that_is_told_once(tiny, out, tmp_path, monkeypatch):
    rewards = {"start": falling(tmp_path, monkeypatch, "sinking")}
    keys = {"max_steps": 4, "optimizer__lr": 0.05, "loss": {"map": "linear"}}
    evaluation = {"rewards": rewards, "every": 1, "count": 8, "alarm_errors": 0.5, "alarm_drift": 1e9}
    said: list[str] = []
    train(config(tiny, out, "sd3", evaluation=evaluation, **keys), log=said.append)
    alarms = [record["alarms"] for record in read_evaluations(out)]
    first = next(step for step, lines in enumerate(alarms) if lines)
    assert alarms[0] == [] and alarms[first][0].startswith("held_out/start: ") and "update 0" in alarms[first][0]
    told = [line for line in said if line.startswith("alarm")]
    assert told[0] == f"alarm after update {first}: {alarms[first][0]}"
    assert len(told) == sum(bool(b) and not a for a, b in zip(alarms, alarms[1:]))
    stopped = out.with_name("stopped")
    outcome = train(config(tiny, stopped, "sd3", evaluation=evaluation | {"stop_on": "alarm"}, **keys), log=said.append)
    assert outcome.step == first and "held_out/start" in outcome.message and "stop_on" in outcome.message


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"best": "held_out/othr"}, says("evaluation.best", "held_out/othr", "held_out/other")),
        ({"stop_on": "s1"}, says("evaluation.stop_on", "s1", "alarm")),
    ],
    ids=str,
)
def test_scores_that_are_not_there_are_refused(tiny, out, other, keys, line):
    with pytest.raises(UserError, match=line):
        check_keys(config(tiny, out, evaluation=watched(other, **keys)))


def test_a_held_out_reward_is_not_the_trained_one(tiny, out, other):
    for reward in (
        {"path": other},
        {"name": "combination", "parts": [{"path": str(tiny.clip)}, {"path": other, "label": "b"}]},
    ):
        with pytest.raises(UserError, match=says("evaluation.rewards.other", other)):
            check_keys(config(tiny, out, evaluation=watched(other), reward=reward))
    agreement = {"judges": {"other": {"path": str(tiny.clip)}}, "pictures": 8}
    with pytest.raises(UserError, match=says("evaluation.rewards.other", "rename")):
        check_keys(config(tiny, out, evaluation=watched(other), agreement=agreement))


def test_a_judge_and_a_held_out_reward_of_one_name_are_one(tiny, out, other):
    agreement = {"judges": {"other": {"path": other}}, "pictures": 8, "every": 2}
    settings = config(tiny, out, "sd3", max_steps=3, evaluation=watched(other, every=1), agreement=agreement)
    train(settings, log=lambda line: None)
    metrics, records = read_metrics(out), read_evaluations(out)
    assert "agreement/other" not in records[0]["values"]
    for record, source in zip(records[1:], (0, 0, 2)):  # the latest measurement, which comes before an update
        assert record["values"]["agreement/other"] == pytest.approx(metrics[source]["agreement/other"], rel=1e-5)


@pytest.mark.slow
def test_the_estimate_counts_what_an_evaluation_needs(tiny, out, other, tmp_path):
    plain = estimate(config(tiny, out, data__batch_size=1), cuda=False)
    folder = write_dino(tmp_path / "dino")
    with_features = estimate(
        config(tiny, out, data__batch_size=1, evaluation=watched(other, features=str(folder))), cuda=False
    )
    assert with_features.standing["judges"] == pytest.approx(plain.standing["reward"], rel=0.05)
    files = sum(tensor.numel() * 4 for tensor in load_file(folder / "model.safetensors").values())
    assert with_features.standing["features of the evaluation"] == pytest.approx(files, rel=0.05)
    assert with_features.phase("evaluating").own > 0 and with_features.peak > plain.peak
    unknown = config(tiny, out, evaluation={"rewards": {"mine": {"name": "python", "path": "os:getcwd"}}})
    assert any("mine" in note and "not counted" in note for note in estimate(unknown, cuda=False).notes)
