"""Judges in a run: what they say is logged, what is done about it is done, and a resumed run repeats it bit for bit."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from builders.clip import write_clip
from builders.messages import says
from builders.recipes import config
from safetensors.torch import load_file

from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.evaluation.alarms import AGREEMENT, AGREEMENT_ERROR
from rsaft_fast.recipe.check import check_keys
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.logging import read_metrics
from rsaft_fast.train.loop import train
from rsaft_fast.train.steering import KEPT, OPPOSED, RADIUS
from rsaft_fast.train.trainer import Trainer


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another reward."""
    return {"path": str(write_clip(tmp_path_factory.mktemp("other"), context=40, seed=7))}


def opposite(tiny):
    """The trained reward's negative, as a judge: its gradient is the opposite one."""
    return {"name": "combination", "parts": [{"path": str(tiny.clip), "weight": -1.0}]}


def judged(judges, **keys):
    return {"judges": judges, "pictures": 8, "every": 1} | keys


def by_fours(tiny, out, **keys):
    """A recipe that takes four pictures at a time: half the network calls of a measurement."""
    return config(tiny, out, **{"data__batch_size": 4} | keys)


def comparable(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.slow
def test_agreement_is_logged_from_before_the_first_update(tiny, out, other):
    said = []
    judges = {"itself": {"path": str(tiny.clip)}, "opposite": opposite(tiny), "other": other}
    outcome = train(
        by_fours(tiny, out, max_steps=3, agreement=judged(judges, every=2), smoothing={"image": None}), log=said.append
    )
    records = read_metrics(out)
    assert outcome.step == 3 and [AGREEMENT + "other" in r for r in records] == [True, False, True]
    for record in records[::2]:
        assert record[AGREEMENT + "itself"] == pytest.approx(1, abs=1e-5)
        assert record[AGREEMENT + "opposite"] == pytest.approx(-1, abs=1e-5)
        assert abs(record[AGREEMENT + "other"]) < 0.9999 and record[AGREEMENT_ERROR + "other"] > 0
    assert sum("warning" in line and "itself" in line for line in said) == 1
    assert any(line.startswith("update 3/3") and "agreement other" in line for line in said)


RESUMED = {
    "auto": {
        "smoothing": {
            "image": {"radius": "auto"},
            "radius_search": {"pictures": 8, "radii": [0.1], "space": "image"},
        }
    },
    "radius": {"agreement__control": "radius", "agreement__every": 2, "agreement__space": "latent"},
    "project-updates": {
        "agreement__control": "project",
        "agreement__pictures_of": "updates",
        "agreement__window": 3,
        "agreement__metric": "optimizer",
        "data__accumulate": 2,
    },
    "project-fixed": {"agreement__control": "project", "agreement__every": 3},
    "weight": {"agreement__control": "weight", "agreement__space": "image", "agreement__pictures_of": "updates"},
}


LONG = ("radius", "project-fixed", "weight")
"""Those whose parts the others have, too."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [pytest.param(keys, id=name, marks=[pytest.mark.slow] * (name in LONG)) for name, keys in RESUMED.items()],
)
def test_resuming_repeats_the_unbroken_run_bit_for_bit(tiny, tmp_path, other, overrides):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = {"agreement": judged({"other": other}, every=4)} | overrides
    common |= {"checkpoint_every": 2, "keep_checkpoints": None, "max_steps": 4}
    train(config(tiny, whole, **common))
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step_4")
    train(config(tiny, broken, resume="auto", **common), log=lambda line: None)
    assert comparable(read_metrics(broken)) == comparable(read_metrics(whole))
    for name in ("weights", "optimizer", "algorithm"):
        one, two = (load_file(run / f"checkpoints/step_4/{name}.safetensors") for run in (whole, broken))
        assert one.keys() == two.keys() and len(one) > 0
        assert all(torch.equal(one[key], two[key]) or torch.isnan(one[key]).all() for key in one), name


@pytest.mark.slow
def test_the_radius_that_is_found_is_the_one_trained_with(tiny, tmp_path, other):
    """A run whose search finds a radius is, to the bit, the run that is given it."""
    search = {"radii": [0.2, 3.0], "pictures": 8, "judges": {"other": other}}
    found = tmp_path / "found"
    train(by_fours(tiny, found, smoothing={"image": {"radius": "auto"}, "radius_search": search}))
    radius = read_metrics(found)[0][RADIUS]
    assert radius in (0.0, 0.2, 3.0) and RADIUS not in read_metrics(found)[1]
    given = tmp_path / "given"
    train(by_fours(tiny, given, smoothing__image={"radius": radius} if radius else None))
    one, two = (load_file(run / "checkpoints/step_2/weights.safetensors") for run in (found, given))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_a_run_is_ended_when_the_judges_were_against_it_often_enough(tiny, out):
    keys = {"agreement": judged({"no": opposite(tiny)}, control="stop", patience=3), "max_steps": 9, "smoothing": None}
    outcome = train(by_fours(tiny, out, **keys))
    # Asked before updates 1, 2 and 3: the third is not made.
    assert outcome.step == 2 and outcome.stopped_by is None and outcome.exit_code == 0
    assert outcome.export == out / "lora" and (out / "checkpoints/step_2/COMPLETE").is_file()
    assert says(2, 9, "agreement.threshold 0", "agreement.patience 3").search(outcome.message)
    again = train(by_fours(tiny, out, resume="auto", **keys))
    assert again.step == 2 and says("agreement.control=none").search(again.message)
    on = train(by_fours(tiny, out, resume="auto", **keys | {"agreement__control": "none", "max_steps": 4}))
    assert on.step == 4


def test_a_run_that_the_judges_are_against_from_the_start_leaves_nothing(tiny, out):
    outcome = train(by_fours(tiny, out, agreement=judged({"no": opposite(tiny)}, control="stop", patience=1)))
    assert outcome.step == 0 and outcome.export is None and not out.exists()
    assert says("before the first update", "agreement.patience 1").search(outcome.message)


@pytest.mark.parametrize(("control", "kept"), [("drop", 0.0), ("weight", math.exp(-1 / 0.5))])
def test_samples_that_the_judges_oppose_count_less_or_not_at_all(tiny, tmp_path, control, kept):
    plain, out = tmp_path / "plain", tmp_path / "out"
    judges = judged({"no": opposite(tiny)}, control=control, space="image", softness=0.5, pictures_of="updates")
    smoothing = {"image": None, "parameters": None}
    train(by_fours(tiny, plain, max_steps=1, smoothing=smoothing))
    train(by_fours(tiny, out, max_steps=1, smoothing=smoothing, agreement=judges))
    (record,), (before,) = read_metrics(out), read_metrics(plain)
    assert record[KEPT] == pytest.approx(kept, abs=1e-5) and record[AGREEMENT + "no"] == pytest.approx(-1, abs=1e-5)
    assert record["grad_norm"] == pytest.approx(kept * before["grad_norm"], rel=1e-4, abs=1e-9)
    assert record["reward"] == before["reward"]


def test_what_opposes_the_judges_is_projected_out_of_the_update(tiny, tmp_path):
    judges = judged({"no": opposite(tiny)}, control="project", pictures_of="updates", window=1)
    plain, out = tmp_path / "plain", tmp_path / "out"
    smoothing = {"image": None, "parameters": None}
    train(by_fours(tiny, plain, max_steps=1, smoothing=smoothing))
    train(by_fours(tiny, out, max_steps=1, smoothing=smoothing, agreement=judges))
    (record,), (before,) = read_metrics(out), read_metrics(plain)
    assert record[OPPOSED] == pytest.approx(-1, abs=1e-5) and record[AGREEMENT + "no"] == pytest.approx(-1, abs=1e-5)
    assert record["grad_norm"] < 1e-4 * before["grad_norm"]


def test_judges_of_an_update_are_asked_at_the_same_samples_in_every_micro_batch(tiny, tmp_path, other):
    """Division into micro-batches changes no agreement."""
    cosines = []
    for name, batch in (("one", {"batch_size": 4}), ("two", {"batch_size": 2, "accumulate": 2})):
        keys = {f"data__{key}": value for key, value in batch.items()}
        agreement = judged({"other": other}, pictures_of="updates")
        train(config(tiny, tmp_path / name, max_steps=1, agreement=agreement, **keys))
        cosines.append(read_metrics(tmp_path / name)[0][AGREEMENT + "other"])
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-4) and abs(cosines[0]) < 0.9999


@pytest.mark.slow
def test_watching_changes_no_weight(tiny, tmp_path, other):
    runs = {
        "plain": {},
        "fixed": {"agreement": judged({"other": other})},
        "updates": {"agreement": judged({"other": other}, pictures_of="updates")},
    }
    for name, keys in runs.items():
        train(by_fours(tiny, tmp_path / name, **keys))
    first, *rest = (load_file(tmp_path / name / "checkpoints/step_2/weights.safetensors") for name in runs)
    assert all(torch.equal(first[key], run[key]) for run in rest for key in first)


@pytest.mark.slow
def test_the_estimate_counts_judges_and_their_gradients(tiny, out, other):
    plain = estimate(config(tiny, out), cuda=False)
    watched = estimate(config(tiny, out, agreement=judged({"other": other})), cuda=False)
    assert watched.standing["judges"] == pytest.approx(watched.standing["reward"], rel=0.05)
    assert watched.phase("comparing gradients").own > 0 and watched.peak > plain.peak
    sought = config(tiny, out, smoothing={"image": {"radius": "auto"}, "radius_search": {"judges": {"other": other}}})
    assert estimate(sought, cuda=False).standing["judges"] == watched.standing["judges"]


def test_the_trainer_takes_a_judge_only_with_a_gradient(tiny, out):
    judge = {"name": "combination", "how": "rank", "parts": [{"path": str(tiny.clip)}]}
    with pytest.raises(UserError, match=says("agreement.judges.a", "how rank", "no gradient")):
        check_keys(config(tiny, out, agreement=judged({"a": judge})))


SEARCH = {"image": {"radius": "auto"}, "radius_search": {"pictures": 8}}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"smoothing": SEARCH}, says("smoothing.image.radius", "auto", "agreement.judges")),
        ({"sharpness": {"radius": "auto"}}, says("sharpness.radius", "auto", "number")),
        ({"smoothing": {"radius_search": {"pictures": 8}}}, says("smoothing.radius_search", 0.01, "auto")),
        ({"control": "drop"}, says("agreement.control drop", "agreement.space", "image or latent")),
        ({"control": "project", "space": "image"}, says("agreement.control project", "parameter")),
        ({"metric": "optimizer"}, says("agreement.metric", "project", "none")),
        ({"control": "project", "metric": "optimizer", "optimizer__state_bits": 8}, says("state_bits 8", "plain")),
        ({"control": "radius", "pictures_of": "updates"}, says("agreement.control radius", "fixed")),
        ({"control": "radius", "smoothing": None}, says("agreement.control", "radius", "smoothing.image is null")),
        (
            {"control": "radius", "smoothing": {"radius_search": {"every": 2}}},
            says("smoothing.radius_search", "agreement.control radius"),
        ),
        ({"control": "project", "optimizer__release_gradients": True}, says("optimizer.release_gradients", "project")),
    ],
    ids=str,
)
def test_keys_that_contradict_each_other_are_refused(tiny, out, other, keys, line):
    own = {key: value for key, value in keys.items() if "__" not in key and key not in ("sharpness", "smoothing")}
    rest = {key: value for key, value in keys.items() if key not in own}
    agreement = {"agreement": judged({"other": other}, **own)} if own else {}
    with pytest.raises(UserError, match=line):
        check_keys(config(tiny, out, **agreement, **rest))


def test_a_name_stands_for_one_reward(tiny, out, other):
    smoothing = {"image": {"radius": "auto"}, "radius_search": {"judges": {"a": {"path": str(tiny.clip)}}}}
    with pytest.raises(UserError, match=says("agreement.judges.a", "smoothing.radius_search.judges.a")):
        check_keys(config(tiny, out, agreement=judged({"a": other}), smoothing=smoothing))


@pytest.mark.slow
def test_a_run_without_judges_may_go_on_with_them_and_back(tiny, out, other):
    train(config(tiny, out, max_steps=2))
    train(config(tiny, out, max_steps=4, resume="auto", agreement=judged({"other": other}, every=2)))
    train(config(tiny, out, max_steps=5, resume="auto"), log=lambda line: None)
    assert [AGREEMENT + "other" in record for record in read_metrics(out)] == [False, False, True, False, False]


def test_a_search_that_never_ran_is_not_smoothed_by_a_guess(tiny, out, other):
    search = {"judges": {"other": other}, "pictures": 8}
    keys = config(tiny, out, smoothing={"image": {"radius": "auto"}, "radius_search": search})
    trainer = Trainer(keys, check_config(keys))
    trainer.steering = None
    with pytest.raises(UserError, match=says("radius", "auto")):
        trainer.update()
