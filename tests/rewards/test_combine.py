"""Combined rewards: every rule and its gradient against float64 written out here, ties, memory, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from builders.clip import write_clip
from builders.image_reward import write_image_reward
from builders.messages import says

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import Reward, RewardSettings, RewardSpec, load_reward
from rsaft_fast.rewards.calibration import calibration_text, measure, read_calibration
from rsaft_fast.rewards.combine import Combination, Part
from rsaft_fast.rewards.ensemble import win_rates
from rsaft_fast.smoothing.sharpness import sharpness

PROMPTS = ["a red ox", "blue", "a big owl"]
RULES = {
    "weighted": lambda s, w, p: sum(a * b for a, b in zip(w, s)),
    "worst": lambda s, w, p: torch.minimum(torch.minimum(s[0], s[1]), s[2]),
    "mean-std": lambda s, w, p: torch.stack(s).mean(0) - p * torch.stack(s).std(0, unbiased=False),
}


class Linear(Reward):
    """r(x) = <direction, x>; the gradient is the direction, to the last digit."""

    def __init__(self, direction, name="linear", differentiable=True):
        super().__init__()
        self.register_buffer("direction", direction)
        self.spec, self.differentiable, self.kept = RewardSpec(name, sha256=name), differentiable, None

    def score(self, images, prompts):
        return (images * self.direction).sum((1, 2, 3))

    def keep_prompts(self, prompts):
        self.kept = list(prompts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three tiny rewards on disk: two CLIPs of different input sizes and an ImageReward."""
    make = tmp_path_factory.mktemp
    return {
        "small": write_clip(make("small"), image_size=16),
        "large": write_clip(make("large"), image_size=24, seed=1),
        "blip": write_image_reward(make("blip")),
    }


def settings(folders, how, dtype="float64", **options):
    common = {"dtype": dtype, "clamp": "none"}
    parts = [
        {"name": "clip", "path": str(folders["small"]), "label": "small", **common},
        {"name": "clip", "path": str(folders["large"]), "label": "large", **common},
        {"name": "imagereward", "path": str(folders["blip"]), **common},
    ]
    if how == "weighted":
        for part, weight in zip(parts, (0.7, -0.2, 1.3)):
            part["weight"] = weight
    return RewardSettings(name="combination", how=how, parts=parts, **options)


@pytest.fixture(scope="module")
def calibrations(folders, tmp_path_factory):
    """Measured by hand on twelve random pictures, in float64 and in float32 alike: the files are the same."""
    images = torch.rand(12, 3, 20, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    entries = []
    for part in settings(folders, "rank").parts:
        reward = load_reward(part)
        scores = reward.score(images, (PROMPTS * 4)).tolist()
        entries.append(measure(reward.spec, scores))
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    path.write_text(calibration_text(entries), encoding="utf-8")
    return path


def load(folders, calibrations, how, **options):
    needs = {"calibration": str(calibrations)} if how != "rank" else {}
    penalty = {"penalty": 0.6} if how == "mean-std" else {}
    return load_reward(settings(folders, how, **needs, **penalty, **options))


def test_every_part_says_which_prompts_it_cuts(folders):
    notes = load_reward(settings(folders, "rank")).prompt_notes(["red " * 50])
    assert len(notes) == 2 and ["reward clip" in notes[0], "reward imagereward" in notes[1]] == [True, True]


@pytest.mark.parametrize("calibrate", ["std", "iqr"])
@pytest.mark.parametrize("how", RULES)
def test_scores_and_gradient_are_those_of_one_graph_through_all_parts(folders, calibrations, how, calibrate):
    reward = load(folders, calibrations, how, calibrate=calibrate)
    assert reward.differentiable
    torch.manual_seed(1)
    images = torch.rand(3, 3, 21, 17, dtype=torch.float64, requires_grad=True)
    scores = reward.score(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)

    own = []
    for part, entry in zip(reward.parts, read_calibration(calibrations)):
        low, median, high = entry.quartiles
        centre, width = (entry.mean, entry.std) if calibrate == "std" else (median, (high - low) / 1.3489795003921634)
        own.append((part.reward.score(images, PROMPTS) - centre) / width)
    expected = RULES[how](own, (0.7, -0.2, 1.3), 0.6)
    (truth,) = torch.autograd.grad(expected.sum(), images)
    assert torch.allclose(scores, expected, rtol=1e-12, atol=1e-12)
    assert (gradient - truth).norm() <= 1e-12 * truth.norm()


@pytest.mark.parametrize("how", RULES)
def test_gradient_is_that_of_finite_differences(folders, calibrations, how):
    reward = load(folders, calibrations, how)
    torch.manual_seed(2)
    images = torch.rand(3, 3, 19, 22, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS).sum(), images)
    for _ in range(3):
        direction = torch.randn_like(images)
        direction /= direction.norm()
        step = 1e-5
        with torch.no_grad():
            ahead, behind = (reward.score(images + s * direction, PROMPTS) for s in (step, -step))
        slopes = (gradient * direction).sum((1, 2, 3))
        assert torch.allclose(slopes, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-9)


def parts(*rewards, **weights):
    return [Part(f"p{i}", reward, weights.get(f"p{i}", 1.0)) for i, reward in enumerate(rewards)]


def test_unit_gradients_count_by_their_weight_alone_in_every_picture():
    """A steep reward, a flat one, and one without a slope in the second picture."""
    generator = torch.Generator().manual_seed(11)
    a, b = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    steep, flat = Linear(1e3 * a, "steep"), Linear(1e-3 * b, "flat")
    once = Linear(a - b, "once")
    once.score = lambda images, prompts: (images * once.direction).sum((1, 2, 3)) * torch.tensor([1.0, 0.0])
    both = [Part("steep", steep, 2.0), Part("flat", flat, -0.5), Part("once", once, 1.0)]
    reward = Combination(both, "weighted", unit_gradients=True)
    leaf = images.clone().requires_grad_(True)
    scores = reward.score(leaf, PROMPTS[:2])
    wanted = 2 * steep.score(images, PROMPTS) - 0.5 * flat.score(images, PROMPTS) + once.score(images, PROMPTS)
    torch.testing.assert_close(scores.detach(), wanted)
    (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    first = 2 * a / a.norm() - 0.5 * b / b.norm()
    torch.testing.assert_close(gradient, torch.stack([first + (a - b) / (a - b).norm(), first]))
    plain = Combination(both, "weighted")
    assert plain.spec.sha256 != reward.spec.sha256


def test_tied_parts_share_the_worst_and_its_gradient_lies_below_every_slope():
    torch.manual_seed(3)
    a, b, c = (torch.randn(1, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    reward = Combination(parts(Linear(a), Linear(b), Linear(c)), "worst")
    # At 0 all three score exactly 0; at the second picture the third alone is the worst.
    images = torch.stack([torch.zeros(3, 4, 4), -c[0] - 0.01 * (a + b)[0]]).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward.score(images, ["x", "y"]).sum(), images)
    assert torch.allclose(gradient[0], (a + b + c)[0] / 3, rtol=1e-14)
    assert torch.equal(gradient[1], c[0])
    # What makes it a supergradient of the concave minimum: no direction falls slower than it says.
    for _ in range(20):
        direction = torch.randn(1, 3, 4, 4, dtype=torch.float64)
        assert reward.score(direction, ["x"]) <= (gradient[0] * direction[0]).sum() + 1e-12


def test_agreeing_parts_have_no_spread_and_a_finite_gradient():
    direction = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    reward = Combination(parts(Linear(direction), Linear(direction.clone())), "mean-std", penalty=2.0)
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    scores = reward.score(images, ["x", "y"])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert torch.equal(scores, Linear(direction).score(images, []))
    assert torch.allclose(gradient, direction.expand(2, -1, -1, -1), rtol=1e-14)


def test_a_part_that_does_not_count_cannot_spoil_the_gradient():
    class Root(Linear):
        def score(self, images, prompts):
            return images.sum((1, 2, 3)).sqrt() + 5  # its slope at 0 is infinite

    direction = torch.randn(1, 3, 2, 2)
    reward = Combination(parts(Linear(direction), Root(direction)), "worst")
    images = torch.zeros(1, 3, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward.score(images, ["x"]).sum(), images)
    assert torch.equal(gradient, direction)


@pytest.mark.parametrize("how", ["worst", "mean-std", "weighted"])
def test_a_score_that_is_not_a_number_stays_visible(how):
    class Broken(Linear):
        def score(self, images, prompts):
            return images.sum((1, 2, 3)) * float("nan")

    direction = torch.randn(1, 3, 2, 2)
    reward = Combination(parts(Linear(direction), Broken(direction)), how)
    assert reward.score(torch.rand(2, 3, 2, 2), ["x", "y"]).isnan().all()


def test_only_one_parts_graph_stands_at_a_time(folders):
    """Bytes that autograd holds for the backward pass, counted as they are packed and freed."""
    live, peak = 0, 0

    class Held:
        def __init__(self, tensor):
            nonlocal live, peak
            self.tensor, self.bytes = tensor, tensor.untyped_storage().nbytes()
            live += self.bytes
            peak = max(peak, live)

        def __del__(self):
            nonlocal live
            live -= self.bytes

    def peak_of(reward):
        nonlocal live, peak
        live = peak = 0
        images = torch.rand(3, 3, 20, 20, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            scores = reward.score(images, PROMPTS)
            torch.autograd.grad(scores.sum(), images)
        del scores
        return peak

    towers = [load_reward(settings(folders, "rank").parts[2]) for _ in range(3)]
    alone = peak_of(towers[0])
    picture = 3 * 3 * 20 * 20 * 8
    assert alone <= peak_of(Combination(parts(*towers), "mean-std")) <= alone + 6 * picture < 1.5 * alone


def test_ranks_are_win_rates_among_pictures_of_one_prompt(folders):
    reward = load_reward(settings(folders, "rank"))
    assert not reward.differentiable
    torch.manual_seed(4)
    images, prompts = torch.rand(6, 3, 18, 18, dtype=torch.float64), ["blue", "a red ox"] * 3
    scores, own = reward.score_parts(images, prompts)
    assert list(own) == ["small", "large", "imagereward"]
    expected = torch.stack([win_rates(values, prompts) for values in own.values()]).mean(0)
    assert torch.equal(scores, expected)
    for first in (0, 1):
        assert scores[first::2].mean().item() == pytest.approx(0.5)
    with pytest.raises(UserError, match=says("rank", 2, "how=weighted")):
        reward.score(images[:2], prompts[:2])


def test_parts_keep_their_dtype_and_report_what_they_gave(folders, calibrations):
    chosen = settings(folders, "weighted", dtype="float32")
    mixed = chosen.model_copy(
        update={"parts": (chosen.parts[0].model_copy(update={"dtype": "bf16"}), *chosen.parts[1:])}
    )
    reward = load_reward(mixed)
    assert [part.reward.dtype for part in reward.parts] == [torch.bfloat16, torch.float32, torch.float32]
    images = torch.rand(3, 3, 20, 20)
    scores, own = reward.score_parts(images, PROMPTS)
    assert scores.dtype == torch.float32
    for part in reward.parts:
        assert torch.equal(own[part.name], part.reward.score(images, PROMPTS))
    assert torch.equal(scores, 0.7 * own["small"] - 0.2 * own["large"] + 1.3 * own["imagereward"])
    assert reward.score(images[:0], []).shape == (0,)


def test_a_score_does_not_depend_on_its_neighbours(folders, calibrations):
    reward = load(folders, calibrations, "worst")
    images = torch.rand(3, 3, 20, 20, dtype=torch.float64)
    together = reward.score(images, PROMPTS)
    alone = torch.cat([reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-12)


def test_the_sharpness_of_the_worst_is_at_least_that_of_the_part_that_is_it(folders, calibrations):
    reward = load(folders, calibrations, "worst")
    torch.manual_seed(6)
    images = torch.rand(3, 3, 20, 20, dtype=torch.float64)
    radius = 0.5
    combined = sharpness(reward, images, PROMPTS, radius)
    _, own = reward.score_parts(images, PROMPTS)
    calibrated = torch.stack([(own[p.name] - p.centre) / p.width for p in reward.parts])
    for i, k in enumerate(calibrated.argmin(0).tolist()):
        part = reward.parts[k]
        alone = sharpness(part.reward, images[i : i + 1], PROMPTS[i : i + 1], radius) / part.width
        assert combined[i] >= alone[0] - 1e-9
    with pytest.raises(UserError, match=says("combination", "pixel01, pixel11 or latent")):
        sharpness(reward, images, PROMPTS, space="reward_input")


def test_prompts_are_kept_by_every_part_and_the_spec_names_them_all():
    first, second = Linear(torch.ones(1, 3, 2, 2), "first"), Linear(torch.ones(1, 3, 2, 2), "second")
    reward = Combination([Part("a", first, 2.0), Part("b", second, 1.0, 3.0, 4.0)], "weighted")
    reward.keep_prompts(["x", "y"])
    assert first.kept == second.kept == ["x", "y"]
    described = reward.spec.preprocessing
    assert [(p["label"], p["name"], p["weight"], p["centre"], p["width"]) for p in described["parts"]] == [
        ("a", "first", 2.0, 0.0, 1.0),
        ("b", "second", 1.0, 3.0, 4.0),
    ]
    assert described["how"] == "weighted" and "penalty" not in described
    other = Combination([Part("a", first, 2.5), Part("b", second, 1.0, 3.0, 4.0)], "weighted")
    assert len(reward.spec.sha256) == 64 and reward.spec.sha256 != other.spec.sha256
    for refused in (
        lambda: reward.preprocess(torch.rand(1, 3, 2, 2)),
        lambda: reward.score_inputs(torch.rand(1), ["x"]),
    ):
        with pytest.raises(UserError, match=says("combination", "pixel01, pixel11 or latent")):
            refused()


@pytest.mark.gpu
@pytest.mark.parametrize("how", RULES)
def test_on_the_gpu_as_on_the_cpu(folders, calibrations, how):
    options = {"calibration": str(calibrations)} | ({"penalty": 0.6} if how == "mean-std" else {})
    chosen = settings(folders, how, **options)
    images = torch.rand(3, 3, 20, 20, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        reward, there = load_reward(chosen, device=device), images.to(device).requires_grad_(True)
        scores, own = reward.score_parts(there, PROMPTS)
        (gradient,) = torch.autograd.grad(scores.sum(), there)
        assert scores.device == gradient.device == there.device and all(
            v.is_cuda == there.is_cuda for v in own.values()
        )
        found.append((scores.detach().cpu(), gradient.cpu()))
    for cpu, gpu in zip(*found):
        assert torch.allclose(cpu, gpu, rtol=1e-9, atol=1e-11)


def test_one_part_without_gradient_leaves_none():
    first, second = Linear(torch.ones(1, 3, 2, 2)), Linear(torch.ones(1, 3, 2, 2), differentiable=False)
    reward = Combination(parts(first, second), "weighted")
    assert not reward.differentiable
    assert not reward.score(torch.rand(1, 3, 2, 2, requires_grad=True), ["x"]).requires_grad
    with pytest.raises(UserError, match=says("'combination'", "gradient")):
        sharpness(reward, torch.rand(1, 3, 2, 2), ["x"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"parts": []}, "needs parts"),
        ({"parts": [{"path": "x"}, {"path": "y"}]}, "two parts are called 'clip'; give one of them a label"),
        ({"how": "worst"}, "compares scores of pickscore, hpsv2.1, which have different scales"),
        ({"how": "mean-std"}, "give calibration"),
        ({"how": "rank", "calibration": "x"}, "calibration does nothing with how rank"),
        ({"penalty": 2.0}, "penalty is of how mean-std, not of weighted"),
        ({"dtype": "bfloat16"}, "dtype is a key of clip, .*not of combination"),
        ({"parts": [{"name": "combination", "parts": []}]}, "cannot be part of another|parts"),
        ({"parts": [{"name": "aesthetic"}]}, r"parts\.0\.aesthetic\.path"),
        ({"how": "best"}, "weighted"),
        ({"how": "worst", "unit_gradients": True}, says("unit_gradients", "weighted", "worst")),
        ({"calibration": "x", "unit_gradients": True}, says("unit_gradients", "calibration")),
        ({"penalty": -1.0, "how": "mean-std"}, "greater than or equal to 0"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_loading(change, message):
    good = {"name": "combination", "parts": [{"name": "pickscore", "path": "x"}, {"name": "hpsv2.1", "path": "y"}]}
    RewardSettings(**good)
    with pytest.raises(ValueError, match=message):
        RewardSettings(**good | change)


def test_keys_of_a_combination_are_not_those_of_one_reward():
    with pytest.raises(ValueError, match=says("how is", "combination", "clip;")):
        RewardSettings(path="x", how="worst")
    with pytest.raises(ValueError, match="weight\n"):
        RewardSettings(path="x", weight=2.0)
    weighed = [{"path": "x", "weight": 2.0}, {"path": "y", "label": "b"}]
    with pytest.raises(ValueError, match=says("weight is", "weighted and rank", "worst;")):
        RewardSettings(name="combination", how="worst", parts=weighed)
    written = RewardSettings(name="combination", parts=weighed).model_dump(mode="json")
    assert RewardSettings(**written).model_dump(mode="json") == written


def test_differentiability_is_known_before_loading():
    pair = [{"path": "x"}, {"path": "y", "label": "b"}]
    assert RewardSettings(path="x").differentiable
    assert RewardSettings(name="combination", parts=pair).differentiable
    assert not RewardSettings(name="combination", how="rank", parts=pair).differentiable


def test_a_calibration_belongs_to_the_reward_it_was_measured_with(folders, calibrations, tmp_path):
    chosen = settings(folders, "worst", calibration=str(calibrations))
    rescaled = chosen.parts[0].model_copy(update={"scale": "cosine"})
    with pytest.raises(UserError, match=says(calibrations, "clip", "scale 'logit'", "'cosine'")):
        load_reward(chosen.model_copy(update={"parts": (rescaled, *chosen.parts[1:])}))
    other = chosen.parts[0].model_copy(update={"path": str(write_clip(tmp_path / "other", seed=9))})
    with pytest.raises(UserError, match=says(calibrations, "clip", "SHA-256")):
        load_reward(chosen.model_copy(update={"parts": (other, *chosen.parts[1:])}))
    # The clamp changes gradients, and no score of a picture.
    clamped = chosen.parts[0].model_copy(update={"clamp": "ste"})
    load_reward(chosen.model_copy(update={"parts": (clamped, *chosen.parts[1:])}))
    content = json.loads(calibrations.read_text())
    content["rewards"] = [entry for entry in content["rewards"] if entry["reward"] == "clip"]
    (tmp_path / "two.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=says("two.json", "imagereward", "clip, clip")):
        load_reward(chosen.model_copy(update={"calibration": str(tmp_path / "two.json")}))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, says("calibration.json", "No such file")),
        ("not json", says("calibration.json", "Expecting value")),
        ("{}", says("calibration.json", "format 'rsaft-fast calibration 1'")),
        ('{"format": "rsaft-fast calibration 1"}', says("calibration.json", "KeyError: 'rewards'")),
        (
            '{"format": "rsaft-fast calibration 1", "rewards": [{"reward": "clip"}]}',
            says("calibration.json", "damaged"),
        ),
    ],
)
def test_a_calibration_that_cannot_be_read_is_one_clear_line(tmp_path, folders, content, message):
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_reward(settings(folders, "worst", calibration=str(path)))
    assert "\n" not in str(caught.value)


def test_a_calibration_needs_scores_that_differ():
    spec = RewardSpec("flat")
    with pytest.raises(UserError, match=says("flat", "std", 0, 3)):
        measure(spec, [1.0, 1.0, 1.0]).affine("std")
    for scores in ([1.0], [], [1.0, math.nan]):
        with pytest.raises(UserError, match=says("flat", "finite", 2)):
            measure(spec, scores)
    centre, width = measure(spec, [1.0, 2.0, 3.0, 4.0, 100.0]).affine("iqr")
    assert centre == 3.0 and width == pytest.approx(2 / 1.3489795)
