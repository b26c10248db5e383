"""The OCR reward: its score against an edit distance written out here, its eyes against text rendered by PIL."""

from __future__ import annotations

import json
import sys
from functools import lru_cache

import numpy as np
import pytest
import torch
from builders.messages import says
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.rewards.ocr import plain, target_text, text_score

pytest.importorskip("rapidfuzz")


def written(*lines: str, size: int = 32, ink: str = "black") -> torch.Tensor:
    """White picture (1, 3, 64 a line, 256)."""
    picture = Image.new("RGB", (256, 64 * len(lines)), "white")
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        pen.text((16, 64 * i + 12), line, fill=ink, font=ImageFont.load_default(size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("rapidocr")
    return load_reward(RewardSettings(name="ocr"))


@pytest.mark.slow
def test_text_rendered_by_pil_is_read(reward):
    """Each of four prompts against one picture; the last two quote other words at a known distance."""
    picture = written("Hello World")
    prompts = ['sky with "Hello World"', "a sign 'hello   world'", 'a "Hella World"', 'a "xyz"']
    scores = [reward.score_picture(picture[0], prompt) for prompt in prompts]
    assert scores == pytest.approx([1, 1, 0.9, 0])
    assert plain(reward.read(picture[0])) == "helloworld"


def test_lines_colours_and_blank_pictures(reward):
    two = written("OPEN", "late", ink="red")
    assert reward.score(two, ['"open late"']).tolist() == [1]
    blank = torch.ones(1, 3, 64, 256)
    assert reward.score(blank, ['"open"']).tolist() == [0]


@pytest.mark.slow
def test_a_score_does_not_depend_on_its_neighbours(reward):
    pictures = torch.cat([written("one"), written("two"), written("six")])
    prompts = ['"one"', '"two"', '"sex"']
    together = reward.score(pictures, prompts)
    assert together.tolist() == pytest.approx([1, 1, 2 / 3])
    assert reward.score(pictures[[2, 0]], [prompts[2], prompts[0]]).tolist() == together[[2, 0]].tolist()
    assert reward.score(pictures[:0], []).shape == (0,)
    pictures[1] = float("nan")
    assert reward.score(pictures, prompts).isnan().tolist() == [False, True, False]


def test_it_has_no_gradient_and_says_what_scored(reward):
    assert not reward.differentiable and not RewardSettings(name="ocr").differentiable
    assert not reward.score(written("a").requires_grad_(), ['"a"']).requires_grad
    assert len(reward.spec.sha256) == 64 and reward.spec.preprocessing["det"].endswith(".onnx")
    json.dumps(reward.spec.preprocessing)


@lru_cache
def distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


words = st.text("abc", max_size=7)


@given(words, words.filter(bool))
def test_the_score_is_the_published_one(read, target):
    expected = 1 - min(distance(read, target), len(target)) / len(target)
    assert text_score(read, target, substring=False) == pytest.approx(expected)
    assert text_score(read, target) == pytest.approx(1 if target in read else expected)


def test_repeats_cost_what_is_asked():
    assert text_score("openopenopen", "open") == 1
    assert text_score("openopenopen", "open", repeat_penalty=0.25) == 0.5
    assert text_score("open" * 9, "open", repeat_penalty=0.25) == 0
    assert text_score("xopenx", "open", substring=False, repeat_penalty=0.25) == 0.5


@pytest.mark.parametrize(
    "prompt, target",
    [
        ('a "Big Cat" and "dog"', "Big Cat"),
        ("a shop that says 'Diffusion', isn't it", "Diffusion"),
        ("the dog's sign: 'it's late'", "it's late"),
        ("“Deep” and 'x'", "Deep"),
        ("""a "" and 'x'""", "x"),
    ],
)
def test_the_target_is_the_first_quoted_text(prompt, target):
    assert target_text(prompt) == target


@pytest.mark.parametrize("prompt", ["", "a red ox", 'half a "quote', "the dog's bone", '" "'])
def test_a_prompt_that_quotes_nothing_is_one_clear_line(prompt):
    with pytest.raises(UserError, match=says(f"prompt {prompt!r}", "OCR")) as caught:
        target_text(prompt)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_one_clear_line(tmp_path, monkeypatch):
    pytest.importorskip("rapidocr")
    with pytest.raises(UserError, match="repeat_penalty: .*greater than or equal to 0"):
        load_reward("ocr", repeat_penalty=-1)
    with pytest.raises(UserError, match=r"holds 0 files \*_det_\*.onnx"):
        load_reward("ocr", tmp_path)
    for part in ("det", "rec"):
        (tmp_path / f"x_{part}_y.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="do not load"):
        load_reward("ocr", tmp_path)
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match="needs rapidocr, which is missing; pip install rapidocr onnxruntime rapidfuzz"):
        load_reward("ocr")
