"""Paths that users write: made whole where they enter, or refused with the limit."""

from __future__ import annotations

import os
import re

import pytest
from builders.messages import says

from rsaft_fast.paths import LONGEST_NAME, LONGEST_PATH, user_path, user_place
from rsaft_fast.recipe import schema
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import load_config, parse_override, read_yaml


def test_the_home_folder_is_put_in_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs") == f"{tmp_path}/runs"
    assert user_path("~") == str(tmp_path)
    assert user_place("drawbench=~/x.tsv") == f"drawbench={tmp_path}/x.tsv"
    for same in ("runs/~", "./~/x", "$HOME/x", "owner/name", "C:x", "a b", "\u00e9"):
        assert user_path(same) == user_place(same) == same
    assert user_place("http://127.0.0.1:1/x") == "http://127.0.0.1:1/x"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (" ", "empty"),
        ("a\0b", "NUL"),
        ("a\udcffb", says(r"'\udcff'", "UTF-8")),
        ("~no-such-user-here/x", says("home folder", "~")),
        ("x/" + "\u00e9" * 128, says("name", 256, LONGEST_NAME)),
        ("x/" * 2500, says("path", 5000, LONGEST_PATH)),
    ],
)
def test_what_no_file_system_has_is_refused(text, words):
    for reader in (user_path, user_place):
        with pytest.raises(ValueError, match=words):
            reader(text)


def test_an_address_is_no_folder():
    for text in ("s3://bucket/runs", "hf://x/y", "file:///tmp/x", "http://x/y"):
        with pytest.raises(ValueError, match=says("address", "this machine")):
            user_path(text)


def test_without_a_home_it_says_so(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 123456789)
    with pytest.raises(ValueError, match=says("home folder", "~")):
        user_path("~/runs")


PATHS = [
    "output_dir",
    "resume",
    "backbone.path",
    "data.prompts",
    "samples.prompts",
    "data.encoding_cache",
    "denoising.images",
    "reward.path",
]


@pytest.mark.parametrize("key", PATHS)
def test_every_path_of_a_recipe_is_expanded_from_the_file_and_from_the_command_line(key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("playground", [f"{key}=~/somewhere"])
    value = config
    for name in key.split("."):
        value = getattr(value, name)
    assert value == f"{tmp_path}/somewhere"


def test_a_judges_path_is_expanded_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("playground", ["agreement.judges.other={name: clip, path: ~/somewhere}"])
    assert config.agreement.judges["other"].path == f"{tmp_path}/somewhere"


def test_no_text_key_that_is_a_path_was_forgotten():
    """Keys whose description speaks of a file or folder, and that are text."""
    named = {
        key
        for key, model, _ in schema.keys(Config)
        if schema.text_kinds(Config, key)
        and re.search(r"folder|file |\.txt|\.jsonl", schema.describe(model, key.rpartition(".")[2]))
    }
    unchecked = {
        key
        for key, model, _ in schema.keys(Config)
        if key in named and not any("user_p" in repr(item) for item in _validators(model, key.rpartition(".")[2]))
    }
    # Names, whose descriptions speak of files; an empty path is one of the choices of a reward, which checks it itself.
    rewards = ("reward", "agreement.judges.NAME", "smoothing.radius_search.judges.NAME", "evaluation.rewards.NAME")
    keys = ("name", "path", "parts.name", "parts.path", "parts.label")
    assert unchecked <= {f"{reward}.{key}" for reward in rewards for key in keys} | {"evaluation.best"}
    assert len(named - unchecked) >= 10


def _validators(model, name: str) -> list:
    field = model.model_fields[name]
    return [*field.metadata, field.annotation]


# (argument, key's value)
TYPED = [
    ("sampler.negative_prompt=(worst quality:1.4), #1", "(worst quality:1.4), #1"),
    ("sampler.negative_prompt=yes", "yes"),
    ("sampler.negative_prompt=", ""),
    ("sampler.negative_prompt=null", "null"),
    ("sampler.negative_prompt=a=b: [c", "a=b: [c"),
    ("sampler.negative_prompt= 1_000 ", " 1_000 "),
    ("sampler.negative_prompt='quoted'", "'quoted'"),
    ("data.prompts=1.txt", "1.txt"),
    ("data.prompts=12:30", "12:30"),
    ("data.prompts=2024-01-02", "2024-01-02"),
    ("output_dir=010", "010"),
    ("output_dir=1e3", "1e3"),
    ("resume=null", None),
    ("samples.prompts=null", None),
    ("data.column=on", "on"),
    ("backbone.dtype=bf16", "bf16"),
    ("method.name=refl", "refl"),
    ("optimizer.lr=1e-4", 1e-4),
    ("optimizer.lr=1E-4", 1e-4),
    ("optimizer.max_grad_norm=null", None),
    ("seed=010", 10),
    ("seed=0o17", 15),
    ("seed=1_000", "1_000"),
    ("logging.tensorboard=off", "off"),
    ("optimizer.betas=[0.9, 1e-1]", [0.9, 0.1]),
    ("parameters.lora.targets=[on, 'a', 12:30]", ["on", "a", "12:30"]),
]


@pytest.mark.parametrize(("argument", "value"), TYPED)
def test_an_argument_is_what_was_typed_where_the_key_is_text_and_yaml_elsewhere(argument, value):
    assert parse_override(argument) == (argument.partition("=")[0], value)


def test_whole_numbers_and_switches_take_the_usual_spellings():
    config = load_config("playground", ["seed=1_000", "logging.tensorboard=off", "logging.diagnostics=yes"])
    assert (config.seed, config.logging.tensorboard, config.logging.diagnostics) == (1000, False, True)


def test_a_recipes_plain_scalars_are_what_stands_there(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("a: 1e-4\nb: on\nc: 010\nd: 12:30\ne: 2024-01-02\nf: 1_000\ng: no\nh: true\ni: ~\nj: 0x10\n")
    assert read_yaml(file) == {
        "a": 1e-4,
        "b": "on",
        "c": 10,
        "d": "12:30",
        "e": "2024-01-02",
        "f": "1_000",
        "g": "no",
        "h": True,
        "i": None,
        "j": 16,
    }
