"""The denoising loss: its target, its gradient, its pictures and captions."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.backbones import FAMILIES, gradients, make_backbone
from builders.messages import says
from PIL import Image

from rsaft_fast.algorithms.denoising import DenoisingLoss, captions, load_folder, read_image, regression_target
from rsaft_fast.backbones.flow import FlowBackbone
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import DenoisingSettings, SamplerSettings
from rsaft_fast.sampling import NoiseSource


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


PNG = png()


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request, tmp_path_factory):
    return make_backbone(request.param, tmp_path_factory.mktemp(request.param), dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path / f"{index}.png")
        (path / f"{index}.txt").write_text(f"picture {index}\n")
    return path


def test_the_target_is_the_noise_of_an_epsilon_model_and_the_velocity_of_a_flow(backbone):
    clean, noise = torch.randn(2, 2, *backbone.latent_shape, dtype=torch.float64)
    wanted = noise - clean if isinstance(backbone, FlowBackbone) else noise
    for step in backbone.schedule(250)[::25]:
        torch.testing.assert_close(regression_target(step, clean, noise), wanted, rtol=1e-9, atol=1e-9)
        # And what the sampler would take for x0, were the prediction exact.
        x = step.alpha * clean + step.sigma * noise
        torch.testing.assert_close(step.x0_a * x + step.x0_b * wanted, clean, rtol=1e-8, atol=1e-8)


def test_loss_and_gradient_are_those_of_the_definition(backbone, folder):
    """Against autograd of the mean over pictures, written from the definition in one graph."""
    items = load_folder(folder)
    settings = DenoisingSettings(images=str(folder), batch_size=2, weight=3.0, drop_caption=0.0, levels=20)
    loss = DenoisingLoss(backbone, settings, items, seed=9)
    encoded = EncodedPrompts.encode(backbone, captions(loss.items), SamplerSettings())
    seen = []
    predict = backbone.predict
    backbone.predict = lambda x, step, branch: seen.append((x.clone(), step)) or predict(x, step, branch)
    try:
        for parameter in backbone.trainable_parameters.values():
            parameter.grad = None
        value = loss.backward(encoded, step=4)
    finally:
        del backbone.predict
    ours = gradients(backbone)
    assert len(seen) == 2
    terms = []
    for sample, (x, step) in enumerate(seen):
        noise = NoiseSource(9, 4, (sample,)).draw("denoising", backbone.latent_shape, dtype=torch.float64)
        clean = (x - step.sigma * noise) / step.alpha if step.alpha > 1e-6 else None
        caption, match = _which(backbone, items, clean)
        assert match < 1e-9
        target = noise - clean if isinstance(backbone, FlowBackbone) else noise
        terms.append((predict(x, step, encoded([caption]).positive) - target).square().mean())
    mean = torch.stack(terms).mean()
    assert value == pytest.approx(float(mean.detach()), rel=1e-9)
    truth = torch.autograd.grad(
        3.0 * mean, list(backbone.trainable_parameters.values()), allow_unused=True, materialize_grads=True
    )
    for name, gradient in zip(ours, truth):
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12)


def _which(backbone, items, clean) -> tuple[str, float]:
    """The caption of the picture whose latent `clean` is, and how far it is from it."""
    distances = {
        item.caption: float((backbone.encode_images(read_image(item.path, 32, 32)[None]) - clean).abs().max())
        for item in items
    }
    caption = min(distances, key=distances.get)
    return caption, distances[caption]


def test_all_captions_dropped_is_the_empty_prompt(backbone, folder):
    settings = DenoisingSettings(images=str(folder), batch_size=2, drop_caption=1.0, levels=10)
    loss = DenoisingLoss(backbone, settings, load_folder(folder), seed=0)
    asked = []
    encoded = EncodedPrompts.encode(backbone, [""], SamplerSettings())
    loss.backward(lambda texts: asked.extend(texts) or encoded(texts), step=0)
    assert asked == ["", ""]


def test_pictures_cover_the_size_and_are_cropped_at_the_centre(tmp_path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255  # the middle third is white
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 40, 40)
    assert image.shape == (3, 40, 40) and image.max() <= 1
    assert image[:, :, 2:-2].min() == 1 and image.min() > 0.7  # the edge of the white third, smoothed by the resize
    Image.new("L", (5, 9), 255).save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png", 16, 24), torch.ones(3, 16, 24))


def test_captions_from_metadata(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "an A", "more": 1}) + "\n\n")
    (item,) = load_folder(tmp_path)
    assert item.caption == "an A" and item.path.name == "a.png"


def test_captions_are_read_as_prompts_are_and_what_is_passed_over_is_said(tmp_path):
    """With U+2028 within a line, a byte-order mark, other cases of endings, and what is no picture."""
    for name in ("10.PNG", "9.png", ".hidden.png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "10.txt").write_bytes("\ufefften\r\n".encode())
    (tmp_path / "9.TXT").write_text("nine")
    (tmp_path / "more.png").mkdir()
    said = []
    items = load_folder(tmp_path, said.append)
    assert [(item.path.name, item.caption) for item in items] == [("9.png", "nine"), ("10.PNG", "ten")]
    assert len(said) == 1 and "2 other" in said[0] and ".hidden.png" in said[0] and "more.png/" in said[0]
    line = json.dumps({"file_name": "9.png", "text": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(line + "\n\n" + line, encoding="utf-8-sig")
    assert [item.caption for item in load_folder(tmp_path, said.append)] == ["one\u2028two\x85three"] * 2
    assert "10.PNG" in said[-1]


def test_training_sees_the_picture_that_a_viewer_shows(tmp_path):
    """The reader is the rewards' own: rotation, 16 bits and transparency are its business."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[:, :12] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png", 24, 16)
    assert image[:, :12].min() == 1 and image[:, 12:].max() == 0
    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(tmp_path / "b.png")
    assert image.shape == (3, 24, 16) and read_image(tmp_path / "b.png", 8, 8).mean() == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, says("denoising.images", ".png", ".webp")),
        ({"a.png": None}, says("a.png", "caption", "a.txt")),
        ({"a.png": b"no picture", "a.txt": b"x"}, says("denoising.images", "a.png", "PNG, JPEG")),
        ({"a.png": None, "a.txt": b"M\xe4dchen"}, says("a.txt", "UTF-8", "byte 1")),
        ({"a.png": None, "a.txt": b" \n"}, says("a.txt", "empty")),
        ({"a.png": PNG[:-30], "a.txt": b"x"}, says("denoising.images", "a.png", "truncated")),
        (
            {"a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.txt": b"x"},
            says("denoising.images", "a.png", "PNG, JPEG"),
        ),
        ({"metadata.jsonl": b'{"file_name": "a.png", "text": null}\n'}, says("metadata.jsonl", "line 1", "NoneType")),
        ({"metadata.jsonl": b'{"file_name": 3, "text": "x"}\n'}, says("metadata.jsonl", "line 1", "file_name", "text")),
        ({"metadata.jsonl": b'{"file_name": "a\\u0000", "text": "x"}\n'}, says("metadata.jsonl", "line 1", r"'a\x00'")),
        ({"metadata.jsonl": b'{"file_name": "a.png"'}, says("metadata.jsonl", "line 1", "JSON")),
        ({"metadata.jsonl": b"\xff"}, says("metadata.jsonl", "UTF-8", "byte 0")),
        ({"metadata.jsonl": b"[1]\n"}, says("metadata.jsonl", "line 1", "file_name", "text")),
        (
            {"metadata.jsonl": b'{"file_name": "../../etc/passwd", "text": "x"}\n'},
            says("metadata.jsonl", "line 1", "'../../etc/passwd'"),
        ),
        (
            {"metadata.jsonl": b'{"file_name": "gone.png", "text": "x"}\n'},
            says("denoising.images", "gone.png", "No such file"),
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, files, line):
    for name, content in files.items():
        if content is None:
            Image.new("RGB", (4, 4)).save(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line):
        load_folder(tmp_path)
    with pytest.raises(UserError, match=says("denoising.images", f"'{tmp_path / 'none'}'")):
        load_folder(tmp_path / "none")
