"""ImageReward from its public layout, against BLIP's computation written out in plain torch."""

from __future__ import annotations

import json

import pytest
import torch
from builders.image_reward import CONFIG, WORDS, random_state, score, write_image_reward
from builders.messages import says

from rsaft_fast.errors import NonFiniteRewardError, UserError
from rsaft_fast.memory import saved_tensor_bytes
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.rewards.heads import AffineHead
from rsaft_fast.rewards.image_reward import BlipScorer, text_config, to_transformers, vision_config
from rsaft_fast.smoothing.objective import require_finite

MEAN, STD = 0.16717362830052426, 1.0333394966054072
PROMPTS = ["a red ox", "blue", "a big big owl"]
# What the published file's shapes and med_config.json say.
FULL = {
    "blip.visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
    "blip.visual_encoder.pos_embed": (1, 197, 1024),
    **{f"blip.visual_encoder.blocks.{i}.mlp.fc1.weight": (4096, 1024) for i in range(24)},
}
FULL_CONFIG = CONFIG | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 512,
    "vocab_size": 30524,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_reward(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def expected_scores(reward, images, prompts=PROMPTS):
    raw = [score(random_state(), pixels, words) for pixels, words in zip(reward.preprocess(images), prompts)]
    return (torch.stack(raw) - MEAN) / STD


def test_scores_are_those_of_the_original_computation(folder, images):
    double = load_reward("imagereward", folder, dtype=torch.float64)
    expected = expected_scores(double, images)
    assert expected.std() > 0.05
    torch.testing.assert_close(double.score(images, PROMPTS), expected, rtol=0, atol=1e-11)
    single = load_reward("imagereward", folder).score(images, PROMPTS)
    assert single.dtype == torch.float32 and (single - expected).abs().max() < 2e-6


def test_the_picture_matters_to_the_text(folder, images):
    reward = load_reward("imagereward", folder)
    same_prompt = reward.score(images, ["a red ox"] * 3)
    assert same_prompt.std() > 0.01


def test_bf16_towers_give_fp32_scores_near_it(folder, images):
    reward = load_reward("imagereward", folder, dtype=torch.bfloat16)
    score = reward.score(images, PROMPTS)
    assert score.dtype == torch.float32 and reward.head.layers["0"].weight.dtype == torch.float32
    assert (score - expected_scores(reward, images)).abs().max() < 0.1


def test_prompts_are_cut_at_35_tokens_and_it_is_said(folder, images):
    reward = load_reward("imagereward", folder)
    whole, longer = " ".join(["red"] * 33), " ".join(["red"] * 33 + ["ox"])
    assert reward.score(images[:1], [whole]) == reward.score(images[:1], [longer])
    (note,) = reward.prompt_notes([whole, longer])
    assert says("imagereward", 35, "tokens").search(note) and "1 of 2" in note and "36 tokens" in note
    assert reward.prompt_notes([whole]) == []


def test_every_weight_is_used_or_knowingly_dropped(folder):
    state = random_state()
    renamed = to_transformers(state)
    dropped = [name for name, value in state.items() if not to_transformers({name: value})]
    assert sorted(dropped) == [
        "blip.text_encoder.embeddings.position_ids",
        *(f"blip.{tower}_proj.{kind}" for tower in ("text", "vision") for kind in ("bias", "weight")),
    ]
    assert len(renamed) == len(state) - len(dropped)
    reward = load_reward("imagereward", folder)
    names = {*reward.model.state_dict(), *(f"mlp.{name}" for name in reward.head.state_dict())}
    assert renamed.keys() == names


def test_the_full_architecture_has_the_published_size():
    with torch.device("meta"):
        shapes = {name: torch.empty(shape) for name, shape in FULL.items()}
        vision = vision_config(shapes, "x")
        model, head = BlipScorer(vision, text_config(FULL_CONFIG, vision.hidden_size)), AffineHead(768)
    assert (vision.image_size, vision.num_attention_heads, vision.num_hidden_layers) == (224, 16, 24)
    parameters = sum(p.numel() for module in (model, head) for p in module.parameters())
    # The published count, and file size, include BLIP's two projections to 256, which no score needs.
    unused = (1024 + 1) * 256 + (768 + 1) * 256
    assert round((parameters + unused) / 1e6, 2) == 446.67


def test_gradient_of_the_whole_reward(folder):
    reward = load_reward("imagereward", folder, dtype=torch.float64, clamp="none")
    images = torch.rand(2, 3, 21, 33, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:2]).sum(), images)
    assert gradient.abs().sum() > 0
    for seed in range(4):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (reward.score(images + h * direction, PROMPTS[:2]).sum() for h in (1e-5, -1e-5))
        assert (gradient * direction).sum() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-6, abs=1e-8)


def test_a_score_depends_on_its_own_picture_and_prompt_alone(folder, images):
    reward = load_reward("imagereward", folder, dtype=torch.float64)
    together = reward.score(images, PROMPTS)
    for chosen in ([0], [2, 0], [1, 2], [2, 1, 0]):
        part = reward.score(images[chosen], [PROMPTS[i] for i in chosen])
        torch.testing.assert_close(part, together[chosen], rtol=1e-11, atol=1e-11)


def test_empty_and_overlong_prompts(folder, images):
    reward = load_reward("imagereward", folder, dtype=torch.float64)
    prompts = ["", "x " * 500, "x " * 33]
    score = reward.score(images[:1].expand(3, -1, -1, -1), prompts)
    torch.testing.assert_close(
        score, expected_scores(reward, images[:1].expand(3, -1, -1, -1), prompts), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(score[1], score[2], rtol=1e-12, atol=1e-12)


def test_an_empty_batch_and_nan_pixels(folder, images):
    reward = load_reward("imagereward", folder)
    assert reward.score(torch.rand(0, 3, 20, 20), []).shape == (0,)
    images[1, 0, 3, 3] = float("nan")
    score = reward.score(images, PROMPTS)
    assert score.isnan().tolist() == [False, True, False]
    with pytest.raises(NonFiniteRewardError, match=says("1 of 3", "finite", "nan", "'blue'")):
        require_finite(score, PROMPTS)


def test_checkpointed_layers_keep_less_and_change_no_bit(folder, images):
    results = {}
    for checkpoint in (False, True):
        reward = load_reward("imagereward", folder, checkpoint=checkpoint)
        x = images.clone().requires_grad_()
        with saved_tensor_bytes(reward.parameters()) as saved:
            score = reward.score(x, PROMPTS)
        results[checkpoint] = (saved.peak, score.detach(), torch.autograd.grad(score.sum(), x)[0])
    assert results[True][0] < results[False][0] / 2
    assert torch.equal(results[True][1], results[False][1]) and torch.equal(results[True][2], results[False][2])


def test_frozen_and_without_dropout(folder, images):
    reward = load_reward("imagereward", folder)
    reward.train()
    assert not any(module.training for module in reward.modules())
    assert not any(p.requires_grad for p in reward.parameters())
    assert torch.equal(reward.score(images, PROMPTS), reward.score(images, PROMPTS))


def test_a_recipe_names_it(folder, images):
    reward = load_reward(RewardSettings(name="imagereward", path=str(folder / "ImageReward.pt"), clamp="ste"))
    torch.testing.assert_close(reward.score(images, PROMPTS), load_reward("imagereward", folder).score(images, PROMPTS))
    assert reward.spec.name == "imagereward" and len(reward.spec.sha256) == 64
    assert (
        reward.spec.preprocessing.items() >= {"geometry": "shortest_crop", "clamp": "ste", "mean_score": MEAN}.items()
    )


def spoil(folder, how):
    state, config = random_state(), dict(CONFIG)
    if how == "weight missing":
        del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    elif how == "no image encoder":
        state = {name: v for name, v in state.items() if "visual" not in name}
    elif how == "foreign":
        state["blip.visual_encoder.blocks.0.ls1"] = torch.zeros(1)
    elif how == "foreign outside":
        state["rm_head.weight"] = torch.zeros(1)
    elif how == "positions":
        state["blip.visual_encoder.pos_embed"] = torch.zeros(1, 6, 128)
    elif how == "head":
        state["mlp.layers.7.weight"] = torch.zeros(2, 16)
    elif how == "activation":
        config["hidden_act"] = "relu"
    elif how == "config key":
        del config["num_attention_heads"]
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(config))
    if how == "cut":
        file = folder / "ImageReward.pt"
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "no config":
        (folder / "med_config.json").unlink()
    elif how == "no vocabulary":
        (folder / "vocab.txt").unlink()
    elif how == "large vocabulary":
        (folder / "vocab.txt").write_text("\n".join([*WORDS, "more"]))


@pytest.mark.parametrize(
    "how, message",
    [
        ("weight missing", says("ImageReward.pt", "lacks", 1, "'text_encoder.encoder.layer.1.cross")),
        ("no image encoder", says("ImageReward.pt", "lacks", "BLIP's image encoder")),
        ("foreign", says("'blip.visual_encoder.blocks.0.ls1'", "ImageReward")),
        ("foreign outside", says("'rm_head.weight'", "ImageReward")),
        ("positions", says("ImageReward.pt", "(128, 3, 8, 8)", "(1, 6, 128)")),
        ("head", says("layers.7.weight", "(2, 16)", "(1, 16)")),
        ("activation", says("med_config.json", "hidden_act 'relu'", "gelu")),
        ("config key", says("med_config.json", "'num_attention_heads'")),
        ("cut", says("ImageReward.pt", "RuntimeError: PytorchStreamReader")),
        ("no config", says("med_config.json", "save_pretrained")),
        ("no vocabulary", says("'google-bert/bert-base-uncased'", "HF_HUB_OFFLINE")),
        ("large vocabulary", says("tokens", 16, "text tower", 15)),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(tmp_path, monkeypatch, how, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = write_image_reward(tmp_path)
    spoil(folder, how)
    for path in (folder, folder / "ImageReward.pt"):
        with pytest.raises(UserError, match=message) as caught:
            load_reward("imagereward", path)
        assert "\n" not in str(caught.value)
