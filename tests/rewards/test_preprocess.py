"""Preprocessing against independent resizers (torch's interpolate, PIL) and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders.clip import write_clip
from builders.image_reward import head_state, write_image_reward
from builders.messages import says
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate
from transformers import CLIPImageProcessorPil

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.rewards.aesthetic import FILE as AESTHETIC
from rsaft_fast.rewards.preprocess import Preprocess, resize, resize_matrix

SIZES = [((64, 64), (16, 16)), ((37, 53), (224, 31)), ((1, 9), (4, 1)), ((224, 224), (224, 224)), ((5, 300), (7, 13))]


def smooth_picture(height: int, width: int, seed: int) -> np.ndarray:
    """A uint8 picture with soft and hard edges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (rng.uniform(1, 6) * x + rng.uniform(1, 6) * y + rng.uniform())) for _ in range(3)]
    picture = 127.5 + 100 * np.stack(waves, -1)
    picture[height // 4 : height // 2, width // 3 : width // 2] = rng.integers(0, 256, 3)
    return picture.round().clip(0, 255).astype(np.uint8)


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape, size", SIZES)
def test_resize_equals_antialiased_interpolate(filter, shape, size):
    images = torch.rand(2, 3, *shape)
    expected = interpolate(images, size, mode=filter, antialias=True, align_corners=False)
    assert (resize(images, size, filter) - expected).abs().max() < 1e-5
    double = interpolate(images.double(), size, mode=filter, antialias=True, align_corners=False)
    assert (resize(images.double(), size, filter) - double).abs().max() < 1e-12


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape, size", [*SIZES, ((512, 384), (224, 168)), ((7, 3), (1, 40))])
def test_resize_without_antialiasing_equals_plain_interpolate(filter, shape, size):
    images = torch.rand(2, 3, *shape, dtype=torch.float64)
    expected = interpolate(images, size, mode=filter, antialias=False, align_corners=False)
    assert (resize(images, size, filter, antialias=False) - expected).abs().max() < 1e-12


def test_antialiasing_leaves_no_pixel_without_gradient():
    """What a picture of 1024 x 1024 shows a 224 x 224 tower: all of it, or holes."""
    unseen = {aa: (resize_matrix(1024, 224, "bicubic", aa) == 0).all(0).double().mean() for aa in (True, False)}
    assert unseen[True] == 0
    # Either axis hides a pixel.
    assert 1 - (1 - unseen[False]) ** 2 == pytest.approx(0.23, abs=0.01)


@pytest.mark.parametrize("filter, pil", [("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)])
@pytest.mark.parametrize("size", [(224, 224), (96, 150), (600, 500)])
def test_resize_follows_pil(filter, pil, size):
    picture = smooth_picture(512, 400, seed=size[0])
    expected = np.asarray(Image.fromarray(picture).resize(size[::-1], pil), dtype=np.float64)
    ours = resize(to_tensor(picture), size, filter)[0].permute(1, 2, 0).numpy() * 255
    difference = np.abs(ours.clip(0, 255) - expected)
    # Half of PIL's own rounding to whole numbers is in this: 0.25 on average.
    assert difference.mean() < 0.3 and difference.max() < 2.5


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(["bicubic", "bilinear"]))
@settings(deadline=None, max_examples=60)
def test_a_constant_stays_constant(length, resized, filter):
    matrix = resize_matrix(length, resized, filter)
    assert matrix.shape == (resized, length) and torch.isfinite(matrix).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(resized, dtype=torch.float64))
    if length == resized:
        assert torch.equal(matrix, torch.eye(length, dtype=torch.float64))


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float64, 1e-12)])
def test_every_dtype_is_computed_in_fp32_or_better(dtype, limit):
    images = torch.rand(1, 3, 40, 24).to(dtype)
    small = resize(images, (16, 16))
    exact = resize(images.double(), (16, 16))
    assert small.dtype == dtype
    # Rounded once, at the end: at most half a unit in the last place below 1.
    assert (small.double() - exact).abs().max() <= limit / 2 + 1e-6 * (dtype != torch.float64)


def test_shapes_without_batch_and_without_contiguity():
    images = torch.rand(2, 40, 24, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(resize(images, (9, 9)), resize(images.contiguous(), (9, 9)))
    torch.testing.assert_close(resize(images[0], (9, 9)), resize(images, (9, 9))[0])
    assert Preprocess((8, 8))(torch.rand(0, 3, 20, 9)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(300, 200), (200, 301), (100, 100), (33, 57)])
@pytest.mark.parametrize("resize_to", [32, 47])
def test_shortest_side_and_crop_follow_clips_own_processor(shape, resize_to):
    picture = smooth_picture(*shape, seed=shape[0])
    processor = CLIPImageProcessorPil(size={"shortest_edge": resize_to}, crop_size={"height": 32, "width": 32})
    expected = torch.as_tensor(np.stack(processor(Image.fromarray(picture))["pixel_values"]))
    ours = Preprocess((32, 32), "shortest_crop", resize_to)(to_tensor(picture))
    assert ours.shape == expected.shape
    # In units of one 255th, before the division by std (about 0.27).
    difference = (ours - expected).abs() * 0.27 * 255
    assert difference.mean() < 0.4


@pytest.mark.parametrize("shape", [(64, 40), (40, 64), (31, 100), (50, 50)])
def test_longest_side_and_pad(shape):
    size, images = 24, torch.rand(2, 3, *shape, dtype=torch.float64)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    ours = Preprocess((size, size), "longest_pad", mean=mean, std=std)(images)
    height, width = (round(side * size / max(shape)) for side in shape)
    canvas = torch.zeros(2, 3, size, size, dtype=torch.float64)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[..., top : top + height, left : left + width] = interpolate(
        images, (height, width), mode="bicubic", antialias=True
    )
    expected = (canvas - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
    assert (ours - expected).abs().max() < 1e-6


@pytest.mark.parametrize("geometry", ["shortest_crop", "longest_pad", "stretch"])
@pytest.mark.parametrize("clamp", ["none", "hard"])
def test_gradient_and_second_derivative(geometry, clamp):
    images = torch.rand(1, 3, 5, 7, dtype=torch.float64) * 0.9 + 0.05
    images.requires_grad_()
    prepare = Preprocess((3, 3), geometry, clamp=clamp)
    assert torch.autograd.gradcheck(prepare, images)
    assert torch.autograd.gradgradcheck(lambda x: prepare(x) ** 2, images)


def test_backward_repeats_its_bits():
    images = torch.rand(3, 3, 50, 61, requires_grad=True)
    weight = torch.rand(3, 3, 16, 16)
    gradients = [torch.autograd.grad((Preprocess((16, 16))(images) * weight).sum(), images)[0] for _ in range(5)]
    assert all(torch.equal(gradients[0], g) for g in gradients[1:])


def test_every_pixel_has_a_gradient():
    images = torch.rand(1, 3, 1024, 1024, requires_grad=True)
    weight = torch.rand(1, 3, 224, 224)
    (Preprocess((224, 224))(images) * weight).sum().backward()
    assert (images.grad != 0).double().mean() > 0.999


def test_clamps():
    images = torch.tensor([-0.5, 0.25, 1.5], dtype=torch.float64)
    images = images[None, None, :, None].expand(1, 3, 3, 1).clone().requires_grad_()
    plain = dict(size=(3, 1), geometry="stretch", mean=(0.0,) * 3, std=(1.0,) * 3)
    for clamp, values, gradient in [
        ("hard", [0.0, 0.25, 1.0], [0.0, 1.0, 0.0]),
        ("ste", [0.0, 0.25, 1.0], [1.0, 1.0, 1.0]),
        ("none", [-0.5, 0.25, 1.5], [1.0, 1.0, 1.0]),
    ]:
        out = Preprocess(**plain, clamp=clamp)(images)
        assert out[0, 0, :, 0].tolist() == values
        assert torch.autograd.grad(out.sum(), images)[0][0, 1, :, 0].tolist() == gradient


def test_autocast_does_not_reach_it():
    images = torch.rand(1, 3, 40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Preprocess((16, 16))(images)
    assert torch.equal(inside, Preprocess((16, 16))(images))


def test_a_first_call_under_inference_mode_leaves_later_gradients_alone():
    prepare = Preprocess((11, 11))
    with torch.inference_mode():
        prepare(torch.rand(1, 3, 29, 31))
    images = torch.rand(1, 3, 29, 31, requires_grad=True)
    prepare(images).sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("images", [torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8).byte()])
def test_wrong_images_are_refused(images):
    with pytest.raises(UserError, match=says("(B, 3, H, W)", "got")):
        Preprocess((4, 4))(images)


@pytest.mark.parametrize("channels, mend", [(1, "images.expand(-1, 3, -1, -1)"), (4, "images[:, :3]")])
def test_rgba_and_greyscale_are_refused_with_their_mend(channels, mend):
    with pytest.raises(UserError, match=says(f"(1, {channels}, 8, 8)", mend)):
        Preprocess((4, 4))(torch.rand(1, channels, 8, 8))


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match=says(7, "crop", "(8, 8)")):
        Preprocess((8, 8), resize_to=7)
    with pytest.raises(UserError, match=says("std", "(1.0, 0.0, 1.0)", 0)):
        Preprocess((8, 8), std=(1.0, 0.0, 1.0))
    with pytest.raises(UserError, match=says("'lanczos'", "bicubic, bilinear")):
        resize(torch.rand(1, 3, 8, 8), (4, 4), "lanczos")
    with pytest.raises(UserError, match=says("size", "(0, 8)", 1)):
        Preprocess((0, 8))


def odd_sizes(count: int = 80) -> list[tuple[int, int]]:
    """Heights and widths whose crops do not fall even, those of SDXL's buckets first."""
    rng = np.random.default_rng(5)
    buckets = [(832, 1216), (1216, 832), (896, 1152), (768, 1344), (640, 1536), (1024, 1024), (512, 768)]
    return buckets + [tuple(int(n) for n in rng.integers(9, 500, 2)) for _ in range(count)]


# Formulae of the originals: sizes of torchvision 0.24's functional._compute_resized_output_size (and transformers'
# get_resize_output_image_size, the same), offsets of torchvision's functional.center_crop, and of transformers'
# image_transforms.center_crop.
OFFSETS = {
    "half_even": lambda resized, size: int(round((resized - size) / 2.0)),
    "down": lambda resized, size: (resized - size) // 2,
}


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("size, resize_to", [(24, 24), (23, 31)])
def test_crops_lie_where_the_originals_have_them(offset, size, resize_to):
    prepare = Preprocess((size, size), "shortest_crop", resize_to, crop_offset=offset)
    shifted = 0
    for shape in odd_sizes():
        short, long = sorted(shape)
        lengths = [resize_to if side == short else int(resize_to * long / short) for side in shape]
        for matrix, side, length in zip(prepare.axis_matrices(shape), shape, lengths):
            start = OFFSETS[offset](length, size)
            assert torch.equal(matrix, resize_matrix(side, length)[start : start + size]), (shape, length)
            shifted += start != (length - size) // 2
    assert (shifted > 10) == (offset == "half_even")


def test_padding_lies_where_the_original_has_it():
    """open_clip's ResizeMaxSize, by which HPSv2 pads: the scale is rounded to a float before it multiplies."""
    prepare = Preprocess((23, 23), "longest_pad")
    for shape in odd_sizes():
        scale = 23 / float(max(shape))
        for matrix, side in zip(prepare.axis_matrices(shape), shape):
            length = max(round(side * scale), 1)
            expected = torch.zeros(23, side, dtype=torch.float64)
            start = (23 - length) // 2
            expected[start : start + length] = resize_matrix(side, length)
            assert torch.equal(matrix, expected), shape


def test_only_a_crop_that_is_another_than_ever_is_told_apart():
    """Calibrations compare descriptions, and those on disk know nothing of the key."""
    assert "crop_offset" not in Preprocess((8, 8)).describe()
    assert Preprocess((8, 8), crop_offset="half_even").describe()["crop_offset"] == "half_even"


@pytest.mark.parametrize("name", ["imagereward", "aesthetic", "clipscore", "pickscore", "clip"])
def test_each_reward_sees_the_picture_as_its_original_does(name, tmp_path):
    clip = {"hidden_act": "quick_gelu", "text_act": "quick_gelu"} if name == "aesthetic" else {}
    settings = {"name": name, "path": str(write_clip(tmp_path / "clip", **clip))}
    if name == "imagereward":
        settings["path"] = str(write_image_reward(tmp_path / "blip"))
    if name == "aesthetic":
        torch.save(head_state(12), tmp_path / AESTHETIC)
        settings |= {"path": str(tmp_path / AESTHETIC), "image_tower": settings["path"]}
    reward = load_reward(RewardSettings(**settings))
    size = reward.prepare.size[0]
    offset = OFFSETS["down" if name in ("pickscore", "clip") else "half_even"]
    # The long side is three pixels longer: half even and down differ.
    picture = Image.fromarray(smooth_picture(4 * (size + 3), 4 * size, seed=1))
    start = offset(size + 3, size)
    assert start == (1 if name in ("pickscore", "clip") else 2)
    resized = picture.resize((size, size + 3), Image.BICUBIC).crop((0, start, size, start + size))
    expected = (to_tensor(np.array(resized)) - torch.tensor(reward.prepare.mean)[:, None, None]) / torch.tensor(
        reward.prepare.std
    )[:, None, None]
    ours = reward.preprocess(to_tensor(np.array(picture)))
    assert (ours - expected).abs().mean() * 0.27 * 255 < 0.4
