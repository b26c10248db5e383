"""ClipReward on tiny checkpoints in the public layout, against transformers' own forward and finite differences."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from builders.clip import CONTEXT, tiny_clip, write_clip
from builders.messages import says
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from rsaft_fast.errors import UserError
from rsaft_fast.memory import saved_tensor_bytes
from rsaft_fast.rewards import RewardSettings, load_reward

PROMPTS = ["a red circle", "a blue square left of a red circle", "three green triangles"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def reference_scores(folder, inputs, prompts):
    """Diagonal of transformers' own CLIPModel forward, in float64."""
    model = CLIPModel.from_pretrained(folder).double().eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(
        list(prompts), padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**tokens, pixel_values=inputs.double()).logits_per_image.diagonal()


def test_logit_scale_equals_transformers_own_forward(folder, images):
    reward = load_reward("clip", folder, dtype=torch.float64)
    expected = reference_scores(folder, reward.preprocess(images), PROMPTS)
    score = reward.score(images, PROMPTS)
    assert score.dtype == torch.float64 and expected.std() > 0.1
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=1e-12)
    cosine = load_reward("clip", folder, dtype=torch.float64, scale="cosine").score(images, PROMPTS)
    logit_scale = CLIPModel.from_pretrained(folder).logit_scale.detach().double().exp()
    torch.testing.assert_close(cosine * logit_scale, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_fp32_whatever_the_towers_are(folder, images, dtype):
    reward = load_reward("clip", folder, dtype=dtype)
    score = reward(images, PROMPTS)
    assert score.dtype == torch.float32 and score.shape == (3,)
    expected = reference_scores(folder, reward.preprocess(images), PROMPTS)
    assert (score - expected).abs().max() < 60 * torch.finfo(dtype).eps


def test_the_factor_is_read_before_the_cast(tmp_path):
    folder = write_clip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] = torch.tensor(4.6052)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    reward = load_reward("clip", folder, dtype=torch.bfloat16)
    assert reward.score_factor == pytest.approx(100.0, abs=0.01)


def test_gradient_of_the_whole_reward_at_a_foreign_size(folder):
    """Resize, crop, normalise and both layers of the tower, against central differences in float64."""
    reward = load_reward("clip", folder, dtype=torch.float64, clamp="none")
    images = torch.rand(2, 3, 21, 33, dtype=torch.float64, requires_grad=True)
    prompts = PROMPTS[:2]
    (gradient,) = torch.autograd.grad(reward.score(images, prompts).sum(), images)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        h = 1e-5
        with torch.no_grad():
            ahead, behind = (reward.score(images + s * h * direction, prompts).sum() for s in (1, -1))
        assert (gradient * direction).sum() == pytest.approx((ahead - behind).item() / (2 * h), rel=1e-6, abs=1e-8)


def test_gradcheck_at_the_native_size(folder):
    reward = load_reward("clip", folder, dtype=torch.float64, clamp="none", checkpoint=False)
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reward.score(x, PROMPTS[:1]), images, fast_mode=True)


def test_a_score_does_not_depend_on_its_neighbours(folder, images):
    reward = load_reward("clip", folder, dtype=torch.float64)
    together = reward.score(images, PROMPTS)
    alone = torch.cat([reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    poisoned = images.clone()
    poisoned[1] = float("nan")
    score = reward.score(poisoned, PROMPTS)
    assert score.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(score[[0, 2]], together[[0, 2]], rtol=1e-12, atol=1e-12)


def test_text_is_encoded_once_and_bit_for_bit_whatever_came_with_it(folder, monkeypatch):
    reward = load_reward("clip", folder)
    calls = []
    original = reward.model.get_text_features
    monkeypatch.setattr(reward.model, "get_text_features", lambda *a, **k: calls.append(1) or original(*a, **k))
    first = reward.encode_text([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    again = reward.encode_text([PROMPTS[1]])
    assert len(calls) == 2
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], again[0])
    assert torch.equal(load_reward("clip", folder).encode_text([PROMPTS[1]])[0], first[1])
    assert not first.requires_grad


def test_the_text_cache_is_bounded_and_follows_a_cast(folder, monkeypatch):
    monkeypatch.setattr("rsaft_fast.rewards.clip._CACHED_PROMPTS", 2)
    reward = load_reward("clip", folder)
    five = reward.encode_text([f"prompt {i}" for i in range(5)])
    assert five.shape == (5, 12) and len(reward._text_cache) == 2
    torch.testing.assert_close(reward.encode_text(["prompt 0"])[0], five[0])
    assert reward.double().encode_text(["prompt 4"]).dtype == torch.float64


def test_the_text_tower_goes_once_all_prompts_are_kept(folder, images):
    reward = load_reward("clip", folder)
    expected, before = reward.score(images, PROMPTS), sum(p.numel() for p in reward.parameters())
    text = sum(p.numel() for p in reward.model.text_model.parameters()) + reward.model.text_projection.weight.numel()
    reward.keep_prompts([*PROMPTS, PROMPTS[0]])
    assert sum(p.numel() for p in reward.parameters()) == before - text > 0
    assert torch.equal(reward.score(images, PROMPTS), expected)
    with pytest.raises(UserError, match=says("'another'", 3, "keep_prompts")):
        reward.score(images[:1], ["another"])
    # What was kept outlives a move, at the precision of scores.
    reward.bfloat16()
    assert reward.encode_text(PROMPTS).dtype == torch.float32
    assert reward.double().encode_text(PROMPTS).dtype == torch.float64
    assert reward.encode_text([]).shape == (0, 12)


def test_more_prompts_than_the_cache_holds_can_be_kept(folder, images, monkeypatch):
    monkeypatch.setattr("rsaft_fast.rewards.clip._CACHED_PROMPTS", 1)
    reward = load_reward("clip", folder)
    expected = reward.score(images, PROMPTS)
    reward.keep_prompts(PROMPTS)
    assert torch.equal(reward.score(images, PROMPTS), expected)


def test_clipscore_is_that_of_its_paper(folder, images):
    """2.5 max(cosine, 0) of "A photo depicts " and the prompt (arXiv 2104.08718)."""
    reward = load_reward(RewardSettings(name="clipscore", path=str(folder), dtype="float64"))
    logits = reference_scores(folder, reward.preprocess(images), [f"A photo depicts {p}" for p in PROMPTS])
    expected = 2.5 * logits.clamp(min=0) / CLIPModel.from_pretrained(folder).logit_scale.detach().double().exp()
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=1e-12, atol=1e-12)
    assert reward.spec.name == "clipscore" and reward.spec.preprocessing["scale"] == "clipscore"
    signed = load_reward(RewardSettings(name="clipscore", path=str(folder), scale="cosine"))
    generator = torch.Generator().manual_seed(5)
    many, prompts = torch.rand(40, 3, 16, 16, generator=generator), [PROMPTS[i % 3] for i in range(40)]
    many = many * torch.rand(40, 3, 1, 1, generator=generator)
    cosine, clamped = signed.score(many, prompts), reward.score(many, prompts)
    assert (clamped >= 0).all() and (cosine < 0).any()


def test_pickscore_is_a_clip_with_its_own_activation_and_uncleaned_text(folder, images, tmp_path):
    settings = RewardSettings(name="pickscore", path=str(folder))
    expected = load_reward("clip", folder).score(images, PROMPTS)
    reward = load_reward(settings)
    assert torch.equal(reward.score(images, PROMPTS), expected) and reward.spec.name == "pickscore"
    # HPSv2 would read both as the same prompt.
    assert not torch.equal(*reward.encode_text(["a &amp; b", "a & b"]))
    other = write_clip(tmp_path, hidden_act="quick_gelu")
    with pytest.raises(UserError, match=says("quick_gelu, ", "gelu:", "hidden_act")):
        load_reward(settings.model_copy(update={"path": str(other)}))


def test_long_prompts_are_cut_at_the_context_length(folder, images):
    reward = load_reward("clip", folder)
    # The tiny tokenizer has one token a letter; 14 letters fill the context beside the start and end tokens.
    kept, longer = "abcdefghijklmn", "abcdefghijklmn" + "opqrstuvwxyz" * 20
    long_letters = " ".join(longer)
    short_letters = " ".join(kept)
    score = reward.score(images[:1].expand(3, -1, -1, -1), [short_letters, long_letters, " ".join("nmlkjihgfedcba")])
    assert score[0] == score[1] != score[2]
    (note,) = reward.prompt_notes([short_letters, long_letters, short_letters])
    assert says(CONTEXT, "tokens").search(note) and "1 of 2" in note and repr(long_letters)[:40] in note
    assert reward.prompt_notes([short_letters]) == []
    # CLIPScore's own words before the prompt take up room.
    scored = load_reward(RewardSettings(name="clipscore", path=str(folder)))
    assert "reward clipscore" in scored.prompt_notes([short_letters])[0]
    reward.keep_prompts([long_letters])
    assert reward.prompt_notes([long_letters])


def test_frozen_and_in_eval_for_good(folder):
    reward = load_reward("clip", folder)
    reward.train()
    assert not any(module.training for module in reward.modules())
    assert not any(p.requires_grad for p in reward.parameters())


def test_checkpointed_layers_keep_less_and_change_no_bit(tmp_path):
    folder = write_clip(tmp_path, num_hidden_layers=8)
    images, results = torch.rand(4, 3, 16, 16), {}
    for checkpoint in (False, True):
        reward = load_reward("clip", folder, checkpoint=checkpoint)
        x = images.clone().requires_grad_()
        with saved_tensor_bytes(reward.parameters()) as saved:
            score = reward.score(x, ["a", "b", "c", "d"])
        results[checkpoint] = (saved.peak, score.detach(), torch.autograd.grad(score.sum(), x)[0])
    assert results[True][0] < results[False][0] / 2
    assert torch.equal(results[True][1], results[False][1]) and torch.equal(results[True][2], results[False][2])


def test_a_first_call_under_inference_mode_or_autocast_leaves_no_trace(folder, images):
    reward, fresh = (load_reward("clip", folder) for _ in range(2))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reward.score(images, PROMPTS)
    x = images.clone().requires_grad_()
    score = reward.score(x, PROMPTS)
    score.sum().backward()
    assert x.grad.abs().sum() > 0
    assert torch.equal(score, fresh.score(images, PROMPTS))
    assert torch.equal(inside, score)


def test_an_empty_batch(folder):
    images = torch.rand(0, 3, 20, 20, requires_grad=True)
    score = load_reward("clip", folder).score(images, [])
    assert score.shape == (0,)
    score.sum().backward()
    assert images.grad.shape == images.shape


def test_the_spec_names_what_produced_a_score(folder):
    reward = load_reward(RewardSettings(path=str(folder), scale="cosine", clamp="ste"))
    assert reward.spec.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert reward.spec.name == "clip" and reward.spec.source == str(folder)
    expected = {"scale": "cosine", "clamp": "ste", "filter": "bicubic", "size": (16, 16), "antialias": True}
    assert reward.spec.preprocessing.items() >= expected.items()
    json.dumps(reward.spec.preprocessing)


@pytest.mark.parametrize(
    "preprocessor, expected",
    [
        ({"resample": 2}, {"filter": "bilinear"}),
        ({"size": {"shortest_edge": 20}}, {"resize_to": 20}),
        ({"size": 18, "crop_size": 16}, {"resize_to": 18, "geometry": "shortest_crop"}),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": False}, {"geometry": "stretch"}),
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]}, {"std": (0.1, 0.2, 0.3)}),
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
    ],
)
def test_the_processor_config_is_obeyed(tmp_path, preprocessor, expected):
    reward = load_reward("clip", write_clip(tmp_path, preprocessor=preprocessor))
    assert reward.spec.preprocessing.items() >= expected.items()
    assert reward.preprocess(torch.rand(1, 3, 30, 40)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "preprocessor, message",
    [
        ({"resample": 0}, says("resample=0", "2 (bilinear), 3 (bicubic)")),
        ({"crop_size": {"height": 24, "width": 24}}, says("(24, 24)", "16x16")),
        ({"size": {"shortest_edge": 20}, "do_center_crop": False}, "16x16"),
        ({"size": {"shortest_edge": 12}}, says(12, "crop", "(16, 16)", 16)),
        ({"rescale_factor": 1.0}, says("rescale_factor=1.0", "1/255")),
        ({"do_resize": False}, "do_resize=false"),
    ],
)
def test_a_processor_config_that_cannot_be_obeyed_is_refused(tmp_path, preprocessor, message):
    with pytest.raises(UserError, match=message):
        load_reward("clip", write_clip(tmp_path, preprocessor=preprocessor))


def test_processor_config_of_a_newer_layout(tmp_path):
    folder = write_clip(tmp_path, preprocessor={"resample": 2})
    image_processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image_processor}))
    assert load_reward("clip", folder).prepare.filter == "bilinear"
    (folder / "processor_config.json").unlink()
    assert load_reward("clip", folder).prepare.filter == "bicubic"


def test_sharded_and_pickled_weights_score_the_same(folder, tmp_path, images):
    expected = load_reward("clip", folder).score(images, PROMPTS)
    sharded = write_clip(tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    tiny_clip().save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    pickled = write_clip(tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for path in (sharded, pickled):
        # Not to the bit: where weights lie in a file decides which CPU kernel a product takes.
        torch.testing.assert_close(load_reward("clip", path).score(images, PROMPTS), expected)


def test_weights_that_are_not_read_are_not_hashed(folder, tmp_path):
    beside, whole = write_clip(tmp_path / "beside"), folder / "model.safetensors"
    expected = hashlib.sha256((beside / "model.safetensors").read_bytes()).hexdigest()
    for name in ("model.fp16.safetensors", "model-00001-of-00001.safetensors", "model_ema.safetensors"):
        (beside / name).write_bytes(whole.read_bytes()[:-1])
    assert load_reward("clip", beside).spec.sha256 == expected
    # Alone it is what is read.
    alone = write_clip(tmp_path / "alone")
    (alone / "model.safetensors").rename(alone / "model.fp16.safetensors")
    assert load_reward("clip", alone).spec.sha256 == expected


@pytest.mark.parametrize(
    "prompts, message",
    [
        ("a red circle", says("prompts", "string", 3)),
        (["a", "b"], says("prompts", 2, "images", 3)),
        (["a", None, "b"], says("prompt 1", "NoneType")),
    ],
)
def test_wrong_prompts_are_refused(folder, images, prompts, message):
    with pytest.raises(UserError, match=message):
        load_reward("clip", folder).score(images, prompts)


def spoil(folder, how):
    weights = folder / "model.safetensors"
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config cut":
        (folder / "config.json").write_text('{"model_type": "cl')
    elif how == "no weights":
        weights.unlink()
    elif how == "weights cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "weight missing":
        state = load_file(weights)
        del state["visual_projection.weight"]
        save_file(state, weights, {"format": "pt"})
    elif how == "weight misshapen":
        state = load_file(weights)
        state["visual_projection.weight"] = torch.zeros(3, 3)
        save_file(state, weights, {"format": "pt"})
    elif how == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif how == "tokenizer cut":
        (folder / "tokenizer.json").write_text("{")
    elif how == "tokenizer of another model":
        config = tiny_clip().config
        config.text_config.vocab_size = 300
        CLIPModel(config).save_pretrained(folder)
    elif how == "text tower alone":
        CLIPTextModel(tiny_clip().config.text_config).save_pretrained(folder)
    elif how == "another architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["CLIPForImageClassification"]}))


@pytest.mark.parametrize(
    "how, message",
    [
        ("no config", says("config.json", "save_pretrained")),
        ("config cut", says("config.json", "JSON")),
        ("no weights", "model.safetensors"),
        ("weights cut", says("model.safetensors", "header")),
        ("weight missing", says("CLIPModel", "lacks", 1, "visual_projection.weight")),
        ("weight misshapen", says("CLIPModel", "RuntimeError")),
        ("no tokenizer", says("tokenizer.json", "vocab.json", "tokenizer.save_pretrained")),
        ("tokenizer cut", says("JSONDecodeError", "tokenizer.save_pretrained")),
        ("tokenizer of another model", says("tokens", 514, "text tower", 300)),
        ("text tower alone", says("CLIPModel", "'clip_text_model'")),
        ("another architecture", says("CLIPModel", "architectures")),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(tmp_path, how, message):
    folder = write_clip(tmp_path)
    spoil(folder, how)
    with pytest.raises(UserError, match=message) as caught:
        load_reward("clip", folder)
    assert "\n" not in str(caught.value)


def test_a_wrong_path_is_one_clear_line(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for path, message in [
        (tmp_path / "absent" / "x", "no reward folder"),
        (file, "is a file"),
        ("", "path: .*it is empty"),
    ]:
        with pytest.raises(UserError, match=message):
            load_reward("clip", path)


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a folder here .*HF_HUB_OFFLINE") as caught:
        load_reward("clip", "nobody/no-such-reward")
    assert "\n" not in str(caught.value)


def test_rewards_that_ship_are_found_by_name(folder, monkeypatch):
    monkeypatch.setattr("rsaft_fast.playground.reward_path", {"fair": folder}.get)
    reward = load_reward(RewardSettings(path="playground/fair"))
    assert reward.spec.source == "playground/fair" and len(reward.spec.sha256) == 64
    monkeypatch.undo()
    with pytest.raises(UserError, match=says("'playground/kind'", "fair, brittle")):
        load_reward(RewardSettings(path="playground/kind"))


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="'clop' .*'clip', 'pickscore'"):
        RewardSettings(name="clop", path="x")
    with pytest.raises(ValueError, match=says("resize is", "hpsv2, hpsv2.1", "clip;")):
        RewardSettings(path="x", resize="legacy_noaa")
    with pytest.raises(UserError, match="'clip' .*resize is a key of hpsv2, hpsv2.1, not of clip"):
        load_reward("clip", "x", resize="legacy_noaa")
    with pytest.raises(UserError, match="settings and path, scale beside them"):
        load_reward(RewardSettings(path="x"), "y", scale="logit")
    with pytest.raises(ValueError, match="scale is a key of clip"):
        RewardSettings(name="imagereward", path="x", scale="cosine")
    # A run's own config.yaml reads back as it is.
    for name in ("clip", "hpsv2.1", "imagereward", "aesthetic"):
        written = RewardSettings(name=name, path="x").model_dump()
        assert RewardSettings(**written).model_dump() == written
    with pytest.raises(ValueError, match="chekpoint"):
        RewardSettings(path="x", chekpoint=False)
    with pytest.raises(ValueError, match="'fp32'.*'int8'"):
        RewardSettings(path="x", dtype="int8")
