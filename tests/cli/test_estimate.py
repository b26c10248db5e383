"""`rsaft-fast estimate`, and what a run makes of the estimate."""

from __future__ import annotations

import json
import re

import pytest
import torch
from builders.clip import write_clip
from builders.messages import says
from builders.recipes import config, recipe, write_recipe

from rsaft_fast import phases
from rsaft_fast.cli import main
from rsaft_fast.cli.parser import build_parser, parse_arguments
from rsaft_fast.errors import UserError
from rsaft_fast.estimate import forecast as forecasts
from rsaft_fast.estimate.estimate import RESERVED, estimate, one_rank, spare
from rsaft_fast.estimate.forecast import announce, forecast
from rsaft_fast.estimate.live import LiveBytes, shapes_alone
from rsaft_fast.estimate.reward_skeleton import skeleton_reward
from rsaft_fast.estimate.skeleton import skeleton_backbone
from rsaft_fast.estimate.suggestions import candidates, changed, fitting, suggest
from rsaft_fast.memory.shared import RehearsedSharing, share_weights
from rsaft_fast.rewards import RewardSettings
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.loop import train
from rsaft_fast.train.trainer import Trainer


@pytest.fixture
def path(tiny, out, tmp_path):
    return write_recipe(tmp_path / "recipe.yaml", recipe(tiny, out))


@pytest.fixture(scope="module")
def truth(tiny, tmp_path_factory):
    """That recipe's estimate."""
    return estimate(config(tiny, tmp_path_factory.mktemp("truth") / "run"))


def output(arguments, capsys) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_shards_are_a_part_of_weights_gradients_and_state_and_a_block_is_whole(tiny, out):
    settings = config(tiny, out, "sd3", parameters__train="full", ema={"decay": 0.9}, smoothing=None)
    whole, part = (estimate(settings, cuda=False, parts=parts) for parts in (1, 4))
    shapes = skeleton_backbone(str(tiny.sd3), height=32, width=32, dtype=torch.float32)[0]
    sizes = {name: p.numel() * 4 for name, p in shapes.denoiser.named_parameters()}
    assert (whole.parts, part.parts) == (1, 4) and whole.standing["denoiser, trained"] == sum(sizes.values())
    quarter = sum(-(-size // 4) for size in sizes.values())
    assert part.standing["denoiser, trained"] == part.standing["running mean (fp32)"] == quarter
    assert part.standing["moments (32 bits)"] == 2 * quarter
    # Between the passes: weights, mean, two moments and the gradient, a quarter each.
    saved = [each.phase(phases.AVERAGING) or each.phase(phases.SCORING) for each in (whole, part)]
    assert saved[0].total - saved[1].total == pytest.approx(4 * (sum(sizes.values()) - quarter), rel=0.3)
    blocks = [sum(p.numel() * 4 for p in block.parameters()) for block in shapes.blocks()]
    rest = sum(sizes.values()) - sum(blocks)
    told = f"{(2 * rest + 5 * max(blocks)) / 2**30:.2f}"
    assert any("4 GPUs" in note and told in note for note in part.notes)
    with pytest.raises(UserError, match=says("release_gradients", 4)):
        estimate(config(tiny, out, "sd3", optimizer__release_gradients=True), parts=4)


def scoring_bytes(settings, sharing):
    """What a score brings beside the reward itself, at its peak."""
    reward, live = skeleton_reward(settings)[0], LiveBytes("meta")
    if sharing is not None:
        share_weights(reward.shared_blocks(), sharing)
    with torch.no_grad(), shapes_alone(cuda=False), live:
        reward.keep_prompts(["one"])
        standing = live.see([*reward.parameters(), *reward.buffers()])
        reward.score(torch.empty(1, 3, 32, 32, device="meta"), ["one"])
    return live.peak - standing


def test_of_a_shared_reward_one_block_at_a_time_is_whole(tmp_path):
    wide = RewardSettings(path=str(write_clip(tmp_path / "wide", hidden_size=128, intermediate_size=512)))
    own, shared = (scoring_bytes(wide, sharing) for sharing in (None, RehearsedSharing(4)))
    block = 4 * (2 * 128 * 512 + 4 * 128 * 128)
    assert 0.9 * block < shared - own < 1.1 * block


@pytest.mark.slow
def test_a_shared_reward_is_a_part_of_its_blocks(tiny, out):
    keys = {"distributed": {"reward": "shared", "timeout": 60}}
    whole, part = (estimate(config(tiny, out, **each), cuda=False, parts=4) for each in ({}, keys))
    layers = skeleton_reward(config(tiny, out).reward)[0].shared_blocks()
    padded = [sum(-(-4 * p.numel() // 256) * 256 for p in layer.parameters()) for layer in layers]
    plain = [sum(4 * p.numel() for p in layer.parameters()) for layer in layers]
    assert len(layers) == 2 and whole.standing["reward"] - part.standing["reward"] == sum(plain) - sum(padded) // 4
    assert (part.gpus, part.parts) == (4, 1) and any("4 GPUs" in note for note in part.notes)
    alone = estimate(config(tiny, out, **keys), cuda=False)
    assert alone.standing == whole.standing and any("--gpus" in note for note in alone.notes)


def test_sharing_the_reward_is_suggested_to_several_gpus(tiny, out):
    shared = {"distributed.reward": "shared"}
    assert shared in list(candidates(config(tiny, out), 4)) and shared not in list(candidates(config(tiny, out)))


def test_the_table_adds_up_and_marks_the_largest(path, out, capsys):
    text = output(["estimate", path, "--quick"], capsys)
    assert not out.exists()
    rows = re.findall(r"^  (.+?)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)(  <- largest)?$", text, re.MULTILINE)
    assert {row[0] for row in rows} >= {phases.SAMPLING, phases.SCORING, phases.DECODER, phases.DENOISER}
    assert sum(bool(row[4]) for row in rows) == 1
    assert "standing throughout" in text and "adapters" in text and "not counted" in text
    assert "estimated peak" in text and "on this machine" not in text


@pytest.mark.slow
def test_one_of_several_gpus_has_its_share_of_the_pictures(tiny, out, path, capsys):
    whole = config(tiny, out, data__batch_size=4, data__accumulate=2)
    # Of 8 pictures four ranks take 2 each, in one micro-batch; three take 3, 3 and 2.
    for gpus, size in ((2, 4), (3, 3), (4, 2), (8, 1)):
        assert estimate(one_rank(whole, gpus)).peak == estimate(config(tiny, out, data__batch_size=size)).peak, gpus
    with pytest.raises(UserError, match=says(8, 9)):
        one_rank(whole, 9)
    text = output(["estimate", path, "--quick", "--gpus", "2"], capsys)
    assert "one of 2 GPUs" in text


@pytest.mark.parametrize(("card", "words"), [("12", "fits with"), ("12 GB", "fits with"), ("1", "does not fit: ")])
def test_a_card_is_judged_in_words(path, truth, capsys, card, words):
    text = output(["estimate", path, "--quick", "--card", card], capsys)
    assert words in text
    assert f"{abs(float(card.split()[0]) - 1 - truth.peak / 2**30):.1f} GiB" in text


@pytest.mark.parametrize(
    ("typed", "recipe", "keys", "quick", "card", "json"),
    [
        ("r.yaml --quick a.b=x", "r.yaml", ["a.b=x"], True, None, False),
        ("--quick r.yaml a=1 --json b=2", "r.yaml", ["a=1", "b=2"], True, None, True),
        ("--card 12 r.yaml a=1", "r.yaml", ["a=1"], False, 12, False),
        ("r.yaml a=1 --card=12 b=-1 --qu c=--x", "r.yaml", ["a=1", "b=-1", "c=--x"], True, 12, False),
        ("--quick -- r.yaml -a=1", "r.yaml", ["-a=1"], True, None, False),
    ],
)
def test_options_and_keys_mix(typed, recipe, keys, quick, card, json):
    parsed = parse_arguments(build_parser(), ["estimate", *typed.split()])
    assert (parsed.recipe, parsed.overrides) == (recipe, keys)
    assert (parsed.quick, parsed.card, parsed.json) == (quick, card, json)


def test_what_follows_an_option_of_train_is_its_own_unless_it_is_a_key():
    assert parse_arguments(build_parser(), ["train", "--help-config", "optimizer"]).help_config == "optimizer"
    with pytest.raises(UserError, match="max_steps=5"):
        parse_arguments(build_parser(), ["train", "r.yaml", "--max-steps", "5", "seed=1"])


@pytest.mark.slow
def test_keys_that_make_it_fit_do(tiny, out):
    settings = config(tiny, out, data__batch_size=4)
    found = estimate(settings)
    suggestions = suggest(settings, found, found.largest.name)
    card = RESERVED + suggestions[0].peak
    single = fitting(settings, suggestions, card)
    assert spare(found.peak, card) < 0 <= spare(estimate(changed(settings, single.keys)).peak, card)
    together = fitting(settings, suggestions, card - 1)
    assert together is None or spare(estimate(changed(settings, together.keys)).peak, card - 1) >= 0
    assert fitting(settings, suggestions, RESERVED) is None


@pytest.mark.slow
def test_json_holds_the_same_in_bytes(path, tiny, out, capsys):
    found = json.loads(output(["estimate", path, "data.batch_size=4", "--json"], capsys))
    truth = estimate(config(tiny, out, data__batch_size=4))
    assert found["peak"] == truth.peak == max(phase["total"] for phase in found["phases"])
    assert found["standing"] == truth.standing
    for phase in found["phases"]:
        assert phase["own"] + phase["beside"] == phase["total"]
    best = found["suggestions"][0]
    again = estimate(changed(config(tiny, out, data__batch_size=4), best["set"]))
    assert best["peak"] == again.peak
    assert best["saves"] == truth.largest.total - again.phase(truth.largest.name).total > 0


@pytest.mark.slow
def test_advice_is_what_estimating_again_says(path, capsys):
    text = output(["estimate", path], capsys)
    lines = re.findall(r"^  (\S+=.*?)\s+saves\s+([\d.]+) GiB \(peak ([\d.]+)\)$", text, re.MULTILINE)
    assert lines, text
    assert any("data.batch_size=1" in keys for keys, _, _ in lines) or "checkpoint" in lines[0][0]


@pytest.mark.parametrize(
    "family", ["sd15", "sdxl", "sd3", "flux", "qwen", pytest.param("krea", marks=pytest.mark.slow)]
)
def test_every_family_is_walked_from_its_own_folder(tiny, out, family):
    found = estimate(config(tiny, out, family))
    assert not found.notes
    assert found.phase(phases.ENCODING).total > 0
    assert found.phase(phases.DENOISER).own > 0


@pytest.mark.slow
def test_every_suggestion_makes_a_valid_recipe(tiny, out):
    full = config(tiny, out, parameters={"train": "full"}, backbone__dtype="bf16", ema={"decay": 0.9})
    tried = [changed(full, keys) for keys in candidates(full)]
    assert len(tried) >= 7
    assert {new.parameters.train for new in tried} == {"full", "lora"}
    best = suggest(full, estimate(full), phases.DENOISER)
    assert best == sorted(best, key=lambda suggestion: -suggestion.saves)
    assert all(suggestion.saves > 0 for suggestion in best)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.k=3", ["method.k is 3", "sampler.steps is 2"]),
        ("method.kk=3", ["method.kk", "method.k?"]),
        ("backbone.height=33", ["height is 33", "multiples of"]),
        ("backbone.device=abacus", ["'abacus'"]),
        ("backbone.path=/nowhere/at/all", ["/nowhere/at/all"]),
        ("backbone.path=somebody/a-cat", ["somebody/a-cat", "cache", "download"]),
        ("reward.path=somebody/a-dog", ["somebody/a-dog", "cache", "download"]),
        ("parameters.lora.targets=[nothing]", ["nothing", "parameters.lora.targets"]),
        ("optimizer.release_gradients=true", ["release_gradients", "accumulate"]),
        ("optimizer.stochastic_rounding=true", ["stochastic_rounding", "bf16"]),
    ],
)
def test_bad_input_is_one_line(path, capsys, override, words):
    overrides = [override, "data.accumulate=2"] if "release" in override else [override]
    assert main(["estimate", str(path), *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("rsaft-fast: error: ")
    for word in words:
        assert word in line


def test_what_training_refuses_is_refused_in_the_same_words(tiny, out, path, capsys):
    with pytest.raises(UserError) as refused:
        check_config(config(tiny, out, optimizer__release_gradients=True, data__accumulate=2))
    assert main(["estimate", str(path), "optimizer.release_gradients=true", "data.accumulate=2"]) == 2
    assert str(refused.value) in capsys.readouterr().err


def test_an_unknown_recipe_is_named(capsys):
    assert main(["estimate", "no-such.yaml"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no-such.yaml" in line and "sd15-lora-24gb" in line


def test_a_missing_prompt_file_does_not_matter_yet(path, capsys):
    assert "estimated peak" in output(["estimate", path, "data.prompts=missing.txt", "--quick"], capsys)


def test_a_run_on_the_cpu_is_not_slowed_down(tiny, out, monkeypatch):
    monkeypatch.setattr(forecasts, "estimate", lambda *_, **__: pytest.fail("estimated"))
    lines = []
    assert announce(config(tiny, out), lines.append)(phases.SCORING) is None
    assert lines == []


def test_a_card_is_compared_and_warned_of(tiny, out, truth):
    settings = config(tiny, out)
    lines = []
    seen = forecast(settings, lines.append, card=2**40)
    assert len(lines) == 1 and lines[0].startswith("estimated peak ") and seen.found == truth
    lines.clear()
    forecast(settings, lines.append, card=2**10)
    assert len(lines) == 2 and lines[1].startswith("warning: ")
    # What `estimate` keeps free is kept free here: one byte is the difference.
    for card, count in ((RESERVED + seen.found.peak, 1), (RESERVED + seen.found.peak - 2**30, 2)):
        lines.clear()
        forecast(settings, lines.append, card=card)
        assert len(lines) == count, lines
    assert says("1.00 GiB", "card").search(lines[1])


def test_an_estimate_that_fails_stops_nothing(tiny, out, monkeypatch):
    monkeypatch.setattr(forecasts, "estimate", lambda config, parts=1: 1 // 0)
    lines = []
    assert forecast(config(tiny, out), lines.append, card=2**40) is None
    assert lines == [
        "the memory that this run needs could not be estimated (ZeroDivisionError: integer division or modulo by zero)"
    ]


@pytest.mark.slow
def test_out_of_memory_advises_what_the_estimate_says(tiny, out, monkeypatch):
    settings = config(tiny, out, data__batch_size=2, backbone__checkpoint=["denoiser", "decoder"])
    grad = torch.autograd.grad

    def exhausted(outputs, *arguments, **options):
        if outputs.is_meta:  # the estimate needs no memory
            return grad(outputs, *arguments, **options)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11 GiB")

    monkeypatch.setattr("rsaft_fast.smoothing.objective.torch.autograd.grad", exhausted)
    best = suggest(settings, estimate(settings), phases.SCORING)[0]
    with pytest.raises(UserError, match=says(f"({phases.SCORING})", "backbone.dtype=bf16")) as raised:
        train(settings, forecast=lambda c, say: forecast(c, say, card=2**40).advise)
    assert str(best) in str(raised.value)


def test_the_outermost_function_names_the_phase(tiny, out, monkeypatch):
    settings = config(tiny, out)
    trainer = Trainer(settings, check_config(settings))
    vae = trainer.backbone.pipeline.vae
    decode = vae.decode

    def decoded(*arguments, **options):
        if torch.is_grad_enabled():
            raise MemoryError
        return decode(*arguments, **options)

    monkeypatch.setattr(vae, "decode", decoded)
    with pytest.raises(UserError) as raised:
        trainer.update()
    assert phases.phase_of(raised.value.__cause__) == phases.DECODER
