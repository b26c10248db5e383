"""The one reader of pictures, against what a viewer shows (Pillow's own tools), and on what is no picture."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from builders.messages import says
from PIL import Image, ImageOps

from rsaft_fast.data.pictures import check_pictures, open_rgb, picture_files, read_picture
from rsaft_fast.errors import UserError

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (40, 24, 3), dtype=np.uint8))
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def read(content: bytes) -> torch.Tensor:
    return read_picture(io.BytesIO(content), "x")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PICTURE, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    with Image.open(io.BytesIO(content)) as picture:
        expected = ImageOps.exif_transpose(picture).convert("RGB")
    assert expected.size == (PICTURE.size if orientation < 5 else PICTURE.size[::-1])
    assert np.array_equal(open_rgb(io.BytesIO(content)), expected)


def test_a_damaged_orientation_leaves_the_picture_as_it_is():
    content = encoded(PICTURE, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12")
    assert np.array_equal(open_rgb(io.BytesIO(content)), PICTURE)


def test_sixteen_bits_of_grey_are_scaled_and_not_cut():
    grey = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    shown = read(encoded(Image.fromarray(grey), "PNG"))
    assert np.abs(shown[0].numpy() - grey / 65535).max() <= 0.5 / 255 + 1e-6
    clear = read(encoded(Image.fromarray(grey), "PNG", transparency=int(grey[0, 0])))
    assert clear[0, :, 0, 0].tolist() == [1, 1, 1] and torch.equal(clear[..., 1:], shown[..., 1:])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_transparency_lies_on_white_whatever_holds_it(mode):
    picture = PICTURE.convert(mode)
    options = {"transparency": 0} if mode == "P" else {}
    if picture.mode in ("LA", "RGBA"):
        picture.putalpha(Image.fromarray(RNG.integers(0, 256, (40, 24), dtype=np.uint8)))
    content = encoded(picture, "PNG", **options)
    with Image.open(io.BytesIO(content)) as opened:
        rgba = np.asarray(opened.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    expected = (rgba[..., :3] * alpha + 255 * (1 - alpha)) / 255
    assert np.abs(read(content)[0].permute(1, 2, 0).numpy() - expected).max() <= 1.01 / 255


def test_four_inks_become_three_lights():
    content = encoded(PICTURE.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert np.abs(read(content)[0].permute(1, 2, 0).numpy() * 255 - np.asarray(PICTURE)).mean() < 1


def test_animations_are_refused_and_a_phones_two_pictures_in_one_file_are_not():
    other = PICTURE.rotate(180)
    for format in ("PNG", "WEBP"):
        with pytest.raises(UserError, match=says("animated", 2)):
            read(encoded(PICTURE, format, save_all=True, append_images=[other]))
    photo = encoded(PICTURE, "MPO", save_all=True, append_images=[other])
    assert np.array_equal(open_rgb(io.BytesIO(photo)), open_rgb(io.BytesIO(encoded(PICTURE, "JPEG"))))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is that large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "PNG, JPEG, WEBP, BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PNG, JPEG, WEBP, BMP"),
        (encoded(PICTURE, "GIF"), "PNG, JPEG, WEBP, BMP"),
        (encoded(PICTURE, "TIFF"), "PNG, JPEG, WEBP, BMP"),
        (png_header(30_000, 30_000), says("pixels", 178956970)),
        (png_header(12_000, 12_000), "truncated"),
        *((encoded(PICTURE, format)[:-400], r"picture (number 0|'.*a\.png') ") for format in FORMATS),
    ],
    ids=["empty", "EPS", "GIF", "TIFF", "bomb", "large", *FORMATS],
)
def test_what_is_no_whole_picture_is_one_line_without_addresses(content, words, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    for source in (io.BytesIO(content), tmp_path / "a.png"):
        with pytest.raises(UserError, match=words) as caught:
            read_picture(source, "" if source == tmp_path / "a.png" else "number 0")
        assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_bytes_never_end_in_anything_but_a_line(format):
    content, rng = encoded(PICTURE, format), random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            read(bytes(damaged))
        except UserError as error:
            assert "\n" not in str(error)


def test_every_file_is_decoded_to_its_end(tmp_path):
    """`Image.verify`, which reads no pixel, passes a JPEG of which half is missing."""
    files = [tmp_path / f"{i}.jpg" for i in range(9)]
    for file in files:
        file.write_bytes(encoded(PICTURE, "JPEG"))
    check_pictures(files)
    files[7].write_bytes(files[7].read_bytes()[:-300])
    with Image.open(files[7]) as picture:
        picture.verify()
    with pytest.raises(UserError, match=says("7.jpg'", "truncated")):
        check_pictures(files)


def test_a_folder_in_natural_order_and_what_is_passed_over(tmp_path):
    wanted = ["1.PNG", "2.png", "02b.jpg", "10.png", "a1.webp", "A2.png", "a10.bmp", "b.jpeg"]
    for name in (*wanted, "notes.md", "c.gif", "._1.png"):
        (tmp_path / name).touch()
    (tmp_path / "inside.png").mkdir()
    files, line = picture_files(tmp_path)
    assert [file.name for file in files] == wanted
    assert says(8, 4).search(line) and "._1.png, c.gif, inside.png/, ..." in line
    for name in ("notes.md", "c.gif", "._1.png"):
        (tmp_path / name).unlink()
    (tmp_path / "inside.png").rmdir()
    assert picture_files(tmp_path)[1] == ""
    (tmp_path / "3.png").symlink_to("gone.png")
    assert "3.png" in [file.name for file in picture_files(tmp_path)[0]]


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=says("gone", "No such file")):
        picture_files(tmp_path / "gone")
