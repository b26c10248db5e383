"""Variants of smoothing as recipe keys: they resume to the bit, save what they say they save, and are estimated."""

from __future__ import annotations

import shutil

import pytest
from builders.messages import says
from builders.recipes import config
from train.test_loop import notes, same_files, without_time

from rsaft_fast.algorithms import RewardGradient
from rsaft_fast.algorithms.base import At
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.recipe.check import check_keys
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.logging import read_metrics
from rsaft_fast.train.loop import train

PARTS = [{"label": "a", "name": "clip"}, {"label": "b", "name": "clip"}]


BI_LORA = {"smoothing": {"image": None, "parameters": {"direction": "bi_lora"}}}


def combination(tiny):
    return {"name": "combination", "parts": [part | {"path": str(tiny.clip)} for part in PARTS]}


def smoothing(image=None, parameters=None, **more):
    return {"smoothing": {"image": image, "parameters": parameters, **more}}


VARIANTS = {
    "momentum-s1-cosine": smoothing(
        {"radius": 0.3, "per_sample": "s1", "schedule": "cosine"}, {"rho": 0.1, "direction": "momentum"}
    ),
    "reuse-steps-full": smoothing({"radius": 0.3, "steps": 2}, {"rho": 0.1, "reuse": 3, "space": "full"}),
    "friendly-gaussian": smoothing(
        {"radius": 0.3, "kind": "gaussian", "samples": 2}, {"rho": 0.1, "direction": "friendly"}
    ),
    "bi_lora": smoothing({"radius": 0.3}, {"rho": 0.1, "direction": "bi_lora"})
    | {"method": {"name": "leapalign"}, "sampler": {"steps": 3}},
}


ONE_PASS = ("momentum-s1-cosine", "bi_lora")
"""What has no perturbation before the first update."""


@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_repeats_the_unbroken_run_bit_for_bit(tiny, tmp_path, name):
    """Resumed after update 2, which for `reuse: 3` makes no first pass."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"max_steps": 3, "checkpoint_every": 2, "keep_checkpoints": None, **VARIANTS[name]}
    train(config(tiny, whole, "sd3", **options))
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step_3")
    said = []
    train(config(tiny, broken, "sd3", resume="auto", **options), log=said.append)
    assert notes(said) == [f"resuming from {broken / 'checkpoints' / 'step_2'}, after update 2"]
    same_files(whole / "checkpoints/step_3", broken / "checkpoints/step_3")
    records = read_metrics(whole)
    assert without_time(read_metrics(broken)) == without_time(records)
    assert [record["eps_norm"] > 0 for record in records] == [name not in ONE_PASS, True, True]
    saved = checkpoints.read(whole / "checkpoints/step_3")
    kept = {"momentum-s1-cosine": {"gradient_mean"}, "friendly-gaussian": {"gradient_mean"}}
    kept["bi_lora"] = {"auxiliary", "auxiliary_mean", "auxiliary_square"}
    assert set(saved.copies) == kept.get(name, {"direction"})


def test_a_checkpoint_of_another_direction_is_refused(tiny, out):
    train(config(tiny, out, "sd3", max_steps=1, **smoothing(None, {"rho": 0.1, "direction": "momentum"})))
    with pytest.raises(UserError, match=says("resume", "smoothing.parameters.direction", "momentum", "gradient")):
        train(config(tiny, out, "sd3", max_steps=2, resume="auto", **smoothing(None, {"rho": 0.1})))


def test_first_passes_are_saved(tiny, out, monkeypatch):
    asked = []
    backward = RewardGradient.backward
    monkeypatch.setattr(
        RewardGradient, "backward", lambda self, part, at, *check: asked.append(at) or backward(self, part, at, *check)
    )
    train(config(tiny, out, "sd3", max_steps=4, **smoothing({"radius": 0.3}, {"rho": 0.1, "reuse": 3})))
    assert asked == [At.FIRST, At.SECOND, At.PLAIN, At.PLAIN, At.FIRST, At.SECOND]
    records = read_metrics(out)
    assert [record["realised_drop"] is None for record in records] == [False, True, True, False]
    assert all(record["s1"] > 0 and record["eps_norm"] == pytest.approx(0.1, rel=1e-4) for record in records)


@pytest.mark.slow
def test_estimates_know_what_is_kept(tiny, out):
    def standing(parameters):
        found = estimate(config(tiny, out, "sd3", **smoothing({"radius": 0.3}, parameters)), cuda=False)
        return dict(found.standing)

    plain = standing({"rho": 0.1})
    adapters = plain["adapters"]
    assert standing({"rho": 0.1, "space": "transferred"}) == plain
    cases = [({"direction": "momentum"}, 1), ({"reuse": 2}, 1), ({"direction": "friendly", "reuse": 2}, 2)]
    for keys, copies in (*cases, ({"direction": "bi_lora"}, 3)):
        found = standing({"rho": 0.1, **keys})
        assert found.pop("direction of the perturbation") == copies * adapters
        assert found == plain


@pytest.mark.parametrize(
    "keys, said",
    [
        (smoothing({"only_where": 0.5}), ("only_where", "clip", "combination")),
        ({**smoothing({"only_where": 0.5}), "reward": None, "data__batch_size": 1}, ("only_where", "batch_size", 1)),
        (smoothing({"per_sample": "uncertainty"}), ("per_sample", "uncertainty", "weight 0")),
        ({**smoothing({"per_sample": "uncertainty"}), "reward": None}, ("per_sample", "uncertainty", "weight 0")),
        ({"sharpness": {"radius": 1.0, "steps": 3}}, ("sharpness", "smoothing.image")),
        ({**smoothing(None, {"space": "full"}), "parameters": {"train": "full"}}, ("space", "parameters.train full")),
        (
            {**smoothing(None, {"space": "transferred"}), "parameters": {"train": "full"}},
            ("space is transferred", "parameters.train full"),
        ),
        ({**BI_LORA, "parameters": {"train": "full"}}, ("bi_lora", "parameters.train full", "lora")),
        ({**BI_LORA, "regularize": {"kl_to_base": 1.0}}, ("bi_lora", "regularize.kl_to_base")),
        ({**BI_LORA, "speed": {"compile": "all"}}, ("bi_lora", "speed.compile all", "none")),
        ({**BI_LORA, "speed": {"cuda_graph": True}}, ("bi_lora", "speed.cuda_graph")),
        (smoothing(None, {"direction": "bi_lora"}, resample="graded_only"), ("bi_lora", "graded_only", "second pass")),
        (
            {**BI_LORA, "method": {"name": "nft"}, "data__group_size": 2, "data__batch_size": 4},
            ("bi_lora", "method.name nft"),
        ),
        (
            {**smoothing(None, {"direction": "gsam"}), "loss": {"map": "hinge", "margin": 2.0}},
            ("gsam", "hinge", "ascend=loss"),
        ),
        ({**smoothing(None, {"direction": "gsam"}), "optimizer__backup": "gradient"}, ("gsam", "backup")),
        (
            {**smoothing(None, {"direction": "momentum"}), "optimizer__release_gradients": True},
            ("momentum", "release_gradients"),
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tiny, out, keys, said):
    if "reward" in keys:
        keys = keys | {"reward": combination(tiny)}
    with pytest.raises(UserError, match=says(*said)):
        check_keys(config(tiny, out, **keys))


def test_an_auxiliary_reward_that_agrees_leaves_the_radius_as_it_is(tiny, out):
    """The auxiliary part is the reward itself: then it is the plain method, to the bit."""
    reward = combination(tiny)
    reward["parts"][1]["weight"] = 0.0
    options = {"max_steps": 2, "reward": reward, "sharpness": None, "data__batch_size": 3}
    train(config(tiny, out, "sd3", **options, **smoothing({"radius": 0.3, "per_sample": "uncertainty"})))
    train(config(tiny, out / "plain", "sd3", **options, **smoothing({"radius": 0.3})))
    same_files(out / "checkpoints/step_2", out / "plain/checkpoints/step_2", ["weights"])


def test_pictures_that_parts_disagree_on_alone_are_perturbed(tiny, out):
    """Two parts that are one reward never disagree: then it is the plain method, to the bit."""
    options = {"max_steps": 2, "reward": combination(tiny), "sharpness": None, "data__batch_size": 3}
    train(config(tiny, out, "sd3", **options, **smoothing({"radius": 0.3, "only_where": 0.1})))
    train(config(tiny, out / "plain", "sd3", **options, **smoothing()))
    same_files(out / "checkpoints/step_2", out / "plain/checkpoints/step_2", ["weights"])
