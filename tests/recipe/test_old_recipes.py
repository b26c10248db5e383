"""What version 0.1 wrote is read: its one class for all rewards, and its two spellings of a dtype."""

from __future__ import annotations

import pytest
import torch
import yaml
from builders.recipes import config, recipe

from rsaft_fast.dtypes import DTYPES, short_name
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.load import respelled, to_yaml, validate
from rsaft_fast.rewards import REWARDS, RewardSettings
from rsaft_fast.train.changes import what_changed

# The reward section of a config.yaml of version 0.1, word for word.
WRITTEN = """
name: clip
path: playground/fair
scale: null
resize: aa
clamp: hard
dtype: float32
checkpoint: true
tokenizer: null
image_tower: null
token_variable: RSAFT_SERVER_TOKEN
timeout: 60.0
patience: 120.0
instruction: null
substring: true
repeat_penalty: 0.0
metadata: null
credit: partial
how: weighted
penalty: 1.0
parts: []
calibration: null
calibrate: std
"""
# A part had no keys of a combination, and two of its own.
PART = {
    key: value
    for key, value in yaml.safe_load(WRITTEN).items()
    if key not in ("how", "penalty", "parts", "calibration", "calibrate")
} | {"weight": 2.0, "label": None}


@pytest.mark.parametrize("name", sorted(REWARDS.keys() - {"python", "combination"}))
def test_every_key_for_every_family(name):
    old = RewardSettings.model_validate(yaml.safe_load(WRITTEN) | {"name": name})
    assert old == RewardSettings(name=name, path="playground/fair")


def test_a_combination_and_its_parts():
    old = yaml.safe_load(WRITTEN) | {"name": "combination", "path": "", "parts": [PART, PART | {"name": "ocr"}]}
    parts = [{"name": name, "path": "playground/fair", "weight": 2.0} for name in ("clip", "ocr")]
    assert RewardSettings.model_validate(old) == RewardSettings(name="combination", parts=parts)


@pytest.mark.parametrize(
    ("key", "value", "owners"),
    [("resize", "legacy_noaa", "hpsv2, hpsv2.1"), ("how", "rank", "combination"), ("credit", "strict", "geneval-hf")],
)
def test_what_was_said_of_another_family_is_refused_by_key_family_and_owners(tiny, out, key, value, owners):
    with pytest.raises(UserError, match=f"reward in .*{key} is a key of {owners}, not of clip"):
        config(tiny, out, reward=yaml.safe_load(WRITTEN) | {key: value})


def test_one_vocabulary_of_dtypes(tiny, out):
    for name, dtype in DTYPES.items():
        long = str(dtype).removeprefix("torch.")
        assert short_name(long) == short_name(dtype) == short_name(name) == name
        for spelling in (name, long, dtype):
            assert RewardSettings(path="x", dtype=spelling).tower["dtype"] == dtype
    assert config(tiny, out, backbone__dtype="bfloat16").backbone.dtype == "bf16"
    for section in ("backbone", "reward"):
        with pytest.raises(UserError, match=rf"{section}\.dtype is 'int8' .*fp32, bf16, fp16"):
            config(tiny, out, **{f"{section}__dtype": "int8"})
    with pytest.raises(UserError, match=r"backbone\.dtype is 'float64'"):
        config(tiny, out, backbone__dtype="float64")
    assert short_name(3) == 3 and short_name(torch.int8) is torch.int8


def test_a_resumed_run_sees_no_change_in_a_spelling(tiny, out, tmp_path):
    now = config(tiny, out)
    old = yaml.safe_load(to_yaml(now)) | {"reward": yaml.safe_load(WRITTEN) | {"path": str(tiny.clip)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert what_changed(now, tmp_path, {}) == []
    assert what_changed(config(tiny, out, reward__dtype="bf16"), tmp_path, {}) == [
        "reward.dtype was 'fp32' and is 'bf16' now"
    ]
    # What this version does not take is compared word for word.
    assert respelled({"max_steps": "x"}) == {"max_steps": "x"}


def test_a_recipe_that_names_no_family_is_clips(tiny, out):
    assert validate(recipe(tiny, out), "the test's recipe").reward == RewardSettings(name="clip", path=str(tiny.clip))


def plain(config):
    return config.model_copy(update={"smoothing": config.smoothing.model_copy(update={"image": None})})


def test_keys_that_have_come_since_are_no_change(tiny, out, tmp_path):
    now = config(tiny, out)
    old = yaml.safe_load(to_yaml(now))
    old["smoothing"]["image"] = {"radius": 0.01, "norm": "l2", "space": "pixel01"}
    old["smoothing"]["parameters"] = {"rho": 0.01, "adaptive": False, "groups": []}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert what_changed(now, tmp_path, {}) == []
    assert what_changed(config(tiny, out, smoothing={"parameters": {"reuse": 3}}), tmp_path, {}) == [
        "smoothing.parameters.reuse was 1 and is 3 now"
    ]
    gone = what_changed(config(tiny, out, smoothing={"parameters": None}), tmp_path, {})
    assert "smoothing.parameters.rho was 0.01 and is not there (smoothing.parameters is null) now" in gone
    assert all(line.startswith("smoothing.parameters.") for line in gone)
    assert any(line.startswith("smoothing.image.radius was 0.01") for line in what_changed(plain(now), tmp_path, {}))
