"""DINO features from public layouts, and the distances in them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from builders.clip import write_clip
from builders.dino import write_dino
from builders.messages import says
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from rsaft_fast.errors import UserError
from rsaft_fast.memory import saved_tensor_bytes
from rsaft_fast.rewards import RewardSettings
from rsaft_fast.rewards.features import cosine_distances, diversity, feature_shapes, load_features, nearest_distances

KINDS = ("dinov2", "dinov3_vit")


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return write_dino(tmp_path_factory.mktemp(request.param), request.param)


def by_pil(folder, picture: Image.Image) -> torch.Tensor:
    """The published preprocessing with PIL."""
    if "dinov2" in folder.name:
        width, height = picture.size
        scale = 32 / min(width, height)
        picture = picture.resize((int(width * scale), int(height * scale)), Image.BICUBIC)
        left, top = (picture.width - 28) // 2, (picture.height - 28) // 2
        picture = picture.crop((left, top, left + 28, top + 28))
    else:
        picture = picture.resize((32, 32), Image.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels - mean) / std


def test_features_are_the_models_own_class_token(folder):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise).resize((60, 40)), Image.fromarray(255 - noise).resize((60, 40))]
    images = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])
    features = load_features(folder)(images)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        own = torch.cat([model(by_pil(folder, p)).last_hidden_state[:, 0] for p in pictures])
    own = own / own.norm(dim=1, keepdim=True)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert (features - own).abs().max() < 0.03  # PIL rounds to 8 bits
    assert (features[0] - features[1]).abs().max() > 0.1


def test_preprocessing_without_a_config_is_the_published_one(folder, tmp_path):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    other = write_dino(tmp_path, kind)
    (other / "preprocessor_config.json").unlink()
    prepare = load_features(other).prepare
    assert prepare.size == (224, 224) and prepare.mean == (0.485, 0.456, 0.406)
    expected = {"dinov2": ("shortest_crop", 256, "bicubic"), "dinov3_vit": ("stretch", 224, "bilinear")}[kind]
    assert (prepare.geometry, prepare.shortest_side, prepare.filter) == expected


def test_gradient(folder):
    model = load_features(folder, dtype=torch.float64, clamp="none")
    images = torch.rand(2, 3, 30, 40, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(diversity(model(images)), images)
    direction = torch.randn(images.shape, dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (diversity(model(images + h * direction)) for h in (1e-5, -1e-5))
    assert (gradient * direction).sum() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-4)


def test_batch_independence_and_checkpointing(folder):
    images, results = torch.rand(3, 3, 36, 36), {}
    for checkpoint in (False, True):
        model = load_features(folder, checkpoint=checkpoint)
        x = images.clone().requires_grad_()
        with saved_tensor_bytes(model.parameters()) as saved:
            features = model(x)
        results[checkpoint] = (saved.peak, features, torch.autograd.grad(features[:, 0].sum(), x)[0])
    assert results[True][0] < 0.6 * results[False][0]
    assert torch.equal(results[True][1], results[False][1]) and torch.equal(results[True][2], results[False][2])
    torch.testing.assert_close(model(images[[2, 0]]), features[[2, 0]])
    assert model(images[:0]).shape == (0, 32) and not model.train().training


@pytest.mark.gpu
def test_the_gpu_gives_the_cpus_features(folder):
    images = torch.rand(3, 3, 36, 36)
    found = load_features(folder, device="cuda")(images.cuda())
    torch.testing.assert_close(found.cpu(), load_features(folder)(images), rtol=0, atol=1e-4)
    assert diversity(found).item() == pytest.approx(diversity(found.cpu()).item(), abs=1e-5)


def test_distances_against_numpy():
    features = torch.nn.functional.normalize(torch.randn(5, 7, dtype=torch.float64), dim=1)
    rows = features.numpy()
    own = [[1 - a @ b for b in rows] for a in rows]
    np.fill_diagonal(np.array(own), 0)
    pairs = [own[i][j] for i in range(5) for j in range(i)]
    assert diversity(features).item() == pytest.approx(np.mean(pairs))
    nearest = [min(own[i][j] for j in range(5) if j != i) for i in range(5)]
    assert nearest_distances(features).tolist() == pytest.approx(nearest)
    assert cosine_distances(features).diag().tolist() == [0] * 5
    same = features[:1].expand(3, -1)
    assert diversity(same).item() == pytest.approx(0, abs=1e-12)
    opposite = torch.stack([features[0], -features[0]])
    assert diversity(opposite).item() == pytest.approx(2)
    for few in (features[:1], features[0]):
        with pytest.raises(UserError, match=says("features", "two", str(tuple(few.shape)))):
            diversity(few)
        with pytest.raises(UserError, match=says("features", "two", str(tuple(few.shape)))):
            nearest_distances(few)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_shipped_rewards_encoder_stands_in_for_dino(checkpoint):
    reward = RewardSettings(path="playground/fair").load()
    features = load_features("playground/fair", checkpoint=checkpoint)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        own = reward.model.get_image_features(pixel_values=reward.preprocess(images)).pooler_output
    own = own / own.norm(dim=1, keepdim=True)
    torch.testing.assert_close(features(images), own)
    assert nearest_distances(features(images)).min() > 0 and features(images[:0]).shape == (0, own.shape[1])
    assert (features.spec.source, features.spec.sha256) == ("playground/fair", reward.spec.sha256)
    assert not hasattr(features.model, "text_model")
    with pytest.raises(UserError, match=says("playground/none")):
        load_features("playground/none")


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def test_full_size_has_the_published_number_of_parameters():
    """ViT-L of both: 304 M and 303 M on their model cards."""
    with torch.device("meta"):
        two = Dinov2Model(Dinov2Config(image_size=518, patch_size=14, **LARGE))
        three = DINOv3ViTModel(DINOv3ViTConfig(intermediate_size=4096, num_register_tokens=4, **LARGE))
    assert [sum(p.numel() for p in model.parameters()) for model in (two, three)] == [304_368_640, 303_129_600]


@pytest.mark.parametrize("path", ["playground/fair", None])
def test_shapes_alone_are_those_of_the_weights(path, folder):
    shapes, real = feature_shapes(path or folder), load_features(path or folder)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in shapes.parameters())
    images = torch.rand(2, 3, 36, 36)
    assert shapes(images.to("meta")).shape == real(images).shape


def test_shapes_of_what_is_published_are_known_without_it():
    names = ("facebook/dinov2-large", "facebook/dinov3-vitl16-pretrain-lvd1689m")
    counts = [sum(p.numel() for p in feature_shapes(name).parameters()) for name in names]
    assert counts == [304_368_640, 303_129_600]
    with pytest.raises(UserError, match=says("nobody/nothing", "dinov2-large", "download")):
        feature_shapes("nobody/nothing")


def test_what_is_wrong_is_one_clear_line(folder, tmp_path):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    with pytest.raises(UserError, match=says("'clip'", "dinov2", "dinov3_vit")):
        load_features(write_clip(tmp_path / "clip"))
    weights = load_file(folder / "model.safetensors")
    broken = write_dino(tmp_path / "missing", kind)
    save_file({n: v for n, v in weights.items() if n != "norm.weight" and n != "layernorm.weight"},
              broken / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match=says(str(broken), "lacks", 1, "norm.weight")):
        load_features(broken)
    cut = write_dino(tmp_path / "cut", kind)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:3000])
    with pytest.raises(UserError, match=says("cut/model.safetensors", "header")) as caught:
        load_features(cut)
    assert "\n" not in str(caught.value)
    crops = {"crop_size": {"height": 30, "width": 30}, "size": {"height": 30, "width": 30}}
    with pytest.raises(UserError, match=says("(30, 30)", 14 if kind == "dinov2" else 16, "crop")):
        load_features(write_dino(tmp_path / "crop", kind, **crops))
    with pytest.raises(UserError, match=says("(B, 3, H, W)", "(1, 4, 32, 32)", "images[:, :3]")):
        load_features(folder)(torch.rand(1, 4, 32, 32))
