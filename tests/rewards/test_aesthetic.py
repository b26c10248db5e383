"""The LAION aesthetic predictor from its public .pth and a CLIPModel folder, against transformers' own embedding."""

from __future__ import annotations

import re

import pytest
import torch
from builders.clip import tiny_clip, write_clip
from builders.image_reward import head_score, head_state
from transformers import CLIPModel

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.rewards.aesthetic import FILE
from rsaft_fast.rewards.heads import AffineHead

PROMPTS = ["a", "", "c"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("tower"), hidden_act="quick_gelu", text_act="quick_gelu")


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    file = tmp_path_factory.mktemp("head") / FILE
    torch.save(head_state(12), file)
    return file


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def test_scores_are_those_of_the_original_computation(tower, head, images):
    reward = load_reward("aesthetic", head, image_tower=tower, dtype=torch.float64)
    model = CLIPModel.from_pretrained(tower).double()
    with torch.no_grad():
        embedding = model.visual_projection(model.vision_model(reward.preprocess(images)).pooler_output)
    embedding = embedding / embedding.norm(dim=1, keepdim=True)
    expected = head_score(embedding, {name: value.double() for name, value in head_state(12).items()})
    assert expected.std() > 0.01
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=0, atol=1e-12)
    single = load_reward("aesthetic", head.parent, image_tower=tower)
    score = single.score(images, PROMPTS)
    assert score.dtype == torch.float32 and (score - expected).abs().max() < 1e-6
    assert torch.equal(single.score(images, ["other", "words", "here"]), score)


def test_the_full_head_has_the_published_size():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AffineHead(768).parameters())
    # fp32 in a file of 3,714,759 bytes, the rest being the archive.
    assert 0 < 3_714_759 - 4 * parameters < 8000


def test_gradient_of_the_whole_reward(tower, head):
    reward = load_reward("aesthetic", head, image_tower=tower, dtype=torch.float64, clamp="none")
    images = torch.rand(2, 3, 21, 33, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward.score(images, ["", ""]).sum(), images)
    for seed in range(4):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (reward.score(images + h * direction, ["", ""]).sum() for h in (1e-5, -1e-5))
        assert (gradient * direction).sum() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-6, abs=1e-8)


def test_a_score_does_not_depend_on_its_neighbours(tower, head, images):
    reward = load_reward("aesthetic", head, image_tower=tower, dtype=torch.float64)
    together = reward.score(images, PROMPTS)
    for chosen in ([0], [2, 0], [2, 1, 0]):
        part = reward.score(images[chosen], [PROMPTS[i] for i in chosen])
        torch.testing.assert_close(part, together[chosen], rtol=1e-12, atol=1e-12)
    assert reward.score(images[:0], []).shape == (0,)


def test_no_text_tower_and_an_fp32_head_under_a_bf16_tower(tower, head, images):
    reward = load_reward("aesthetic", head, image_tower=tower, dtype=torch.bfloat16)
    assert not any("text" in name for name, _ in reward.named_parameters())
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}
    assert reward.score(images, PROMPTS).dtype == torch.float32
    assert not any(p.requires_grad for p in reward.parameters())


def test_a_recipe_names_it(tower, head, images):
    reward = load_reward(RewardSettings(name="aesthetic", path=str(head), image_tower=str(tower)))
    expected = load_reward("aesthetic", head, image_tower=tower).score(images, PROMPTS)
    torch.testing.assert_close(reward.score(images, PROMPTS), expected)
    assert len(reward.spec.sha256) == len(reward.spec.preprocessing["image_tower_sha256"]) == 64


def test_another_tower_or_head_is_one_clear_line(tower, head, tmp_path):
    wrong_activation = write_clip(tmp_path / "gelu")
    with pytest.raises(UserError, match="computes with gelu, the published reward with quick_gelu"):
        load_reward("aesthetic", head, image_tower=wrong_activation)
    wide = tmp_path / "wide.pth"
    torch.save(head_state(768), wide)
    with pytest.raises(UserError, match="reads 768 features, .* gives 12"):
        load_reward("aesthetic", wide, image_tower=tower)
    torch.save(tiny_clip().state_dict(), wide)
    with pytest.raises(UserError, match="lacks 10 weights, first 'layers.0.bias'"):
        load_reward("aesthetic", wide, image_tower=tower)
    with pytest.raises(UserError, match=f"holds no {re.escape(FILE)}"):
        load_reward("aesthetic", tmp_path, image_tower=tower)
