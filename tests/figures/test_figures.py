"""Grids and figures: the right pixels in the right places, whole files only, text that cannot break them."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from builders.messages import says
from PIL import Image

from rsaft_fast.errors import UserError
from rsaft_fast.figures.bands import Band, BandPanel, band_figure
from rsaft_fast.figures.curves import Curve, Panel, comparison_figure
from rsaft_fast.figures.grids import (
    GREATEST_SIDE,
    compose_grid,
    cut_grid,
    displayed_size,
    font,
    run_colour,
    save_grid,
    save_png,
    to_picture,
    wrap,
)
from rsaft_fast.figures.tables import markdown, summary_table

NASTY = ["costs $5_a^2$ \\frac", "a\nb\x00\tc", "word " * 300, "x" * 4000, "漢字 🎉", "../../etc/passwd"]


def blocks(canvas: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Bounding box of a colour."""
    rows, columns = np.where((np.asarray(canvas) == colour).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_pictures_stand_in_their_row_and_column_enlarged_by_whole_pixels():
    colours = torch.tensor([[[0.2, 0.4, 0.6], [1.0, 0.0, 1.0]], [[0.0, 1.0, 0.8], [0.6, 0.2, 0.0]]])
    columns = {f"run {c}": colours[c][:, :, None, None].expand(2, 3, 32, 32) for c in range(2)}
    canvas = compose_grid(["a", "b"], columns)
    boxes = {}
    for c in range(2):
        for r in range(2):
            box = blocks(canvas, tuple((colours[c, r] * 255).round().int().tolist()))
            assert (box[2] - box[0], box[3] - box[1]) == (160, 160)
            boxes[c, r] = box
    assert boxes[0, 0][0] == boxes[0, 1][0] < boxes[1, 0][0] - 160
    assert boxes[0, 0][1] == boxes[1, 0][1] < boxes[0, 1][1] - 160


def test_small_pictures_repeat_pixels_exactly():
    image = torch.rand(3, 32, 32)
    enlarged = np.asarray(to_picture(image, displayed_size(32, 32)))
    expected = (image.permute(1, 2, 0) * 255).round().byte().numpy().repeat(5, 0).repeat(5, 1)
    assert np.array_equal(enlarged, expected)


@pytest.mark.parametrize(
    "size, shown", [((32, 32), (160, 160)), ((1, 1), (160, 160)), ((512, 300), (512, 300)), ((1024, 768), (512, 384))]
)
def test_displayed_size(size, shown):
    assert displayed_size(*size) == shown and max(shown) <= GREATEST_SIDE
    assert to_picture(torch.rand(3, size[1], size[0]), shown).size == shown


def test_values_outside_the_range_and_nan_are_drawn():
    image = torch.tensor([-1.0, 0.5, 7.0, float("nan"), float("inf")]).expand(3, 1, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert np.asarray(to_picture(image.to(dtype)))[0, :, 0].tolist() == [0, 128, 255, 0, 255]


@pytest.mark.parametrize("text", [*NASTY, "", " ", "one"])
@pytest.mark.parametrize("width", [5, 100, 300])
def test_wrapped_lines_fit_and_lose_nothing_unmarked(text, width):
    lines = wrap(text, width, 16, 4)
    assert 1 <= len(lines) <= 4
    # A line of one character may be wider than the space there is.
    assert all(font(16).getlength(line) <= width or len(line) <= 2 for line in lines)
    shown = "".join("".join(lines).split())
    whole = "".join("".join(c if c.isprintable() else " " for c in text).split())
    assert shown == whole or (shown.endswith("…") and whole.startswith(shown[:-1]))


def test_nasty_text_breaks_nothing(tmp_path):
    count = len(NASTY)
    columns = {text: torch.rand(count, 3, 8, 8) for text in NASTY[:3]}
    captions = {NASTY[0]: NASTY}
    panels = [Panel(NASTY[0], NASTY[0], {text: Curve([0, 1], [0, 1]) for text in [*NASTY[:2], "$alone"]})]
    path = comparison_figure(tmp_path / "f.png", NASTY, columns, panels, captions, NASTY[2], NASTY[0])
    assert os.listdir(tmp_path) == ["f.png"] and Image.open(path).size[0] > 700


def test_figure_holds_grid_and_curves(tmp_path):
    pink, green = ((255, 51, 153), (0, 255, 102))
    columns = {
        label: (torch.tensor(rgb) / 255)[None, :, None, None].expand(2, 3, 8, 8)
        for label, rgb in [("before", pink), ("plain", green)]
    }
    panels = [
        Panel("Proxy reward", "logit", {"plain": Curve(range(50), np.linspace(0, 1, 50)), "RSA-FT": Curve([0], [1])}),
        Panel("S1", "logit", {"plain": Curve([0, 1, 2], [1.0, float("nan"), float("inf")])}),
        Panel("True preference", "0 to 1", {}),
    ]
    path = comparison_figure(tmp_path / "new" / "f.png", ["a", "b"], columns, panels, title="Runs")
    image = Image.open(path).convert("RGB")
    assert image.height >= 3 * 250
    assert blocks(image, pink)[2] < blocks(image, green)[0]
    right = np.asarray(image)[:, blocks(image, green)[2] + 20 :]
    drawn = []
    for index in range(4):
        rgb = tuple(int(run_colour(index)[i : i + 2], 16) for i in (1, 3, 5))
        drawn.append(bool((right == rgb).all(-1).sum() > 50))
    # The second column and the run without one have curves; the first column and a fourth run have none.
    assert drawn == [False, True, True, False]


def test_the_same_figure_has_the_same_bytes(tmp_path):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    panel = Panel("r", "u", {"a": Curve([0, 1], [0, 1])})
    paths = [comparison_figure(tmp_path / f"{i}.png", ["p", "q"], {"a": images}, [panel]) for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = save_grid(tmp_path / "grid.png", ["a"], {"x": torch.zeros(1, 3, 8, 8)})
    before = path.read_bytes()

    def fail(*args, **kwargs):
        args[1].write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (4, 4)), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["grid.png"]


def test_what_does_not_fit_is_refused(tmp_path):
    images = torch.rand(2, 3, 8, 8)
    for arguments, message in [
        ((["a"], {"x": images}), says("'x'", "(2, 3, 8, 8)", "(1, 3, 8, 8)")),
        ((["a", "b"], {"x": images, "y": images[:, :, :4]}), says("'y'", "(2, 3, 4, 8)", "(2, 3, 8, 8)")),
        (([], {"x": images[:0]}), says("0 prompts", "1 runs")),
        ((["a"], {}), says("1 prompts", "0 runs")),
        ((["a", "b"], {"x": images}, {"x": ["one"]}), "captions"),
        ((["a", "b"], {"x": images}, {"y": ["one", "two"]}), "captions"),
    ]:
        with pytest.raises(UserError, match=message):
            compose_grid(*arguments)
    with pytest.raises(UserError, match="panels"):
        comparison_figure(tmp_path / "f.png", ["a", "b"], {"x": images}, [])
    with pytest.raises(UserError, match=says("steps", 2, "values", 1)):
        Curve([0, 1], [0])
    assert os.listdir(tmp_path) == []


def test_summary_table():
    table = summary_table(
        {
            "plain": {"proxy reward": (14.1, 18.25), "true preference r*": (0.7, 0.65), "S1": (0.4, 3)},
            "RSA-FT": {"proxy reward": (14.1, 17), "S1": (0.4, float("nan"))},
        }
    ).split("\n")
    assert table[1].split() == ["run"] + ["before", "after", "change"] * 3
    assert table[3].split() == "plain 14.100 18.250 +4.150 0.700 0.650 -0.050 0.400 3.000 +2.600".split()
    assert table[4].split() == "RSA-FT 14.100 17.000 +2.900 - - - 0.400 - -".split()
    # Every number ends where its heading ends, and each quantity's name stands over its own columns.
    for word, number in [("after", "18.250"), ("change", "+4.150")]:
        assert table[1].index(word) + len(word) == table[3].index(number) + len(number)
    assert table[0].index("S1") <= table[3].index("0.400") < table[0].index("S1") + 8
    assert len({len(line) for line in table[1:4]}) == 1
    with pytest.raises(UserError, match=says("summary table", "runs")):
        summary_table({})


def test_summary_table_holds_long_names():
    table = summary_table({"a": {"a quantity with quite a long name indeed": (0, 1), "b": (2, 3)}}, decimals=0).split(
        "\n"
    )
    assert table[0].index("  b") < table[1].rindex("before") + 6
    assert len(table[0]) <= len(table[1])


def test_bands_are_drawn_around_their_curves_and_not_where_there_is_none(tmp_path):
    def pixels(half):
        bands = {"plain": Band([0, 1, 2], [1, 1, 1], [half] * 3), NASTY[0]: Band([0, 1, 2], [0, 0, 0], [0.0] * 3)}
        panel = BandPanel(NASTY[0], NASTY[1], "r*", bands)
        with Image.open(band_figure(tmp_path / "bands.png", [[panel, panel]], title=NASTY[0])) as image:
            return np.asarray(image).astype(int)

    without, with_band, unknown = pixels(0.0), pixels(0.5), pixels(float("inf"))
    assert without.shape == with_band.shape and (without != with_band).any(-1).sum() > 5_000
    tinted = np.abs(unknown - without).sum(-1) > 0
    assert tinted.sum() < 0.1 * (without != with_band).any(-1).sum()


def test_bands_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=says(3, 2)):
        Band([0, 1, 2], [0, 1], [0, 0])
    panel = BandPanel("a", "x", "y", {})
    with pytest.raises(UserError, match=says("[2, 1]")):
        band_figure(tmp_path / "x.png", [[panel, panel], [panel]])
    with pytest.raises(UserError, match=says("panels", "one")):
        band_figure(tmp_path / "x.png", [])
    assert not list(tmp_path.iterdir())


def test_a_markdown_table_keeps_bars_within_their_cells():
    assert markdown(["a|b", "n"], [["x", "1"]]).split("\n") == [r"| a\|b | n |", "| --- | ---: |", "| x | 1 |"]


@pytest.mark.parametrize("size", [(32, 32), (7, 19), (160, 100), (511, 333)])
def test_pictures_are_cut_out_of_a_saved_grid_as_they_went_in(tmp_path, size):
    prompts = ["a", NASTY[1], NASTY[4]]
    columns = {name: torch.rand(len(prompts), 3, *size) for name in ("before", "after $3")}
    grid = compose_grid(prompts, columns, {"before": ["x", "y", "z"]})
    save_png(grid, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        cut = cut_grid(image)
    assert cut.prompts == prompts and list(cut.columns) == list(columns)
    for name, images in columns.items():
        for image, picture in zip(images, cut.columns[name]):
            assert np.array_equal(np.asarray(picture), (image.permute(1, 2, 0) * 255).round().byte().numpy())
    assert cut_grid(Image.new("RGB", (9, 9))) is None
    grid.info["rsaft_fast.grid"] = '{"prompts": 3}'
    assert cut_grid(grid) is None
