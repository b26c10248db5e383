"""Every key of a recipe with values that nobody should give: lines that name the key, never another exception."""

from __future__ import annotations

import os
import random
import string
import time

import pytest
import yaml
from builders.recipes import recipe

from rsaft_fast.errors import UserError
from rsaft_fast.recipe import schema
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import load_config, validate
from rsaft_fast.settings import LONGEST_TEXT

KEYS = sorted({key for key, _, _ in schema.keys(Config)})
# As many values as a file may stand for.
LAUGHS = ["lol"]
for _ in range(4):
    LAUGHS = [LAUGHS] * 10

# Wrong for each and every key.
ALWAYS_WRONG = {
    "nan": float("nan"),
    "inf": float("inf"),
    "over float32": -1e300,
    "NUL": "a\0b",
    "half a character": "a\ud800b",
    "very long": "x" * (LONGEST_TEXT + 1),
    "nested": [[[[[["a"]]]]]],
    "a section in a list": [{"a": {"b": 1}}],
    "laughs": LAUGHS,
    "another section": {"zzz": 1, "name": "zzz", "path": 3},
    "an object": object(),
    "bytes": b"\xff",
}
# Wrong for most.
OFTEN_WRONG = {
    "nothing": None,
    "true": True,
    "negative": -1,
    "zero": 0,
    "a fraction": 0.5,
    "huge": 10**12,
    "over 64 bits": 2**70,
    "tiny": 1e-300,
    "empty": "",
    "blank": " \t",
    "unicode": "\u202e\u0660\U0001f600 \x1b[31m",
    "lines": "a\nb\r\nc",
    "a long name": "n" * 300,
    "home of nobody": "~nobody-of-that-name/x",
    "an address": "s3://bucket/x",
    "an empty list": [],
    "an empty section": {},
    "a long list": ["x"] * 5000,
}


@pytest.fixture
def raw(tiny, out) -> dict:
    return recipe(tiny, out)


def put(raw: dict, key: str, value) -> dict:
    head, _, rest = key.partition(".")
    if not rest:
        return raw | {head: value}
    inner = raw.get(head)
    return raw | {head: put(inner if isinstance(inner, dict) else {}, rest, value)}


def refused(raw: dict) -> list[str]:
    """Lines of the refusal; none where the recipe is taken."""
    try:
        validate(raw, "mine.yaml")
    except UserError as error:
        return str(error).split("\n")
    return []


def check_lines(lines: list[str], key: str) -> None:
    for line in lines:
        assert line.isprintable() and len(line) < 1500 and "Value error" not in line, line
    # Where a section is no section, or lacks its other keys, another line may come first.
    section = key.partition(".")[0]
    assert len(lines) <= 30
    assert not lines or any(section in line and " in mine.yaml" in line for line in lines), lines


@pytest.mark.parametrize("name", ALWAYS_WRONG)
def test_what_no_key_takes_is_refused_in_lines_that_name_the_key(raw, name):
    started = time.perf_counter()
    for key in KEYS:
        lines = refused(put(raw, key, ALWAYS_WRONG[name]))
        assert lines, key
        check_lines(lines, key)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("name", OFTEN_WRONG)
def test_what_most_keys_do_not_take_is_refused_or_taken(raw, name):
    for key in KEYS:
        check_lines(refused(put(raw, key, OFTEN_WRONG[name])), key)


@pytest.mark.parametrize("value", [10**9, 10**12, 2**70])
@pytest.mark.parametrize(
    "key",
    ["data.batch_size", "data.accumulate", "sampler.steps", "parameters.lora.rank", "method.k", "backbone.height"],
)
def test_sizes_that_no_machine_has_are_refused_by_key_value_and_limit(raw, key, value):
    (line,) = refused(put(raw, key, value))
    field = next(field for name, _, field in schema.keys(Config) if name == key)
    limit = next(entry.le for entry in field.metadata if hasattr(entry, "le"))
    assert key in line and f" {limit:g}" in line and repr(value) in line


def test_a_list_with_thousands_of_faults_is_told_in_a_few_lines(raw):
    lines = refused(put(raw, "reward", {"name": "combination", "parts": [{"zzz": 1}] * 5000}))
    assert len(lines) < 30 and "more" in lines[-1]


HOSTILE_FILES = {
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "1073741824 bytes": lambda path: (path.touch(), os.truncate(path, 2**30)),
    "values, aliases": lambda path: path.write_text(
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(10 * [f'*{a}'])}]\n" for a, b in zip("abcdefghi", "bcdefghij"))
    ),
    "too deeply": lambda path: path.write_text("a: " + "[" * 5000),
    "holds itself": lambda path: path.write_text("a: &a [*a]\n"),
    "5000 characters": lambda path: path.write_text("seed: " + "9" * 5000),
    "tagged": lambda path: path.write_text("seed: !!timestamp 2024-13-45\n"),
    "quote it": lambda path: path.write_text("1: 2\n"),
    "half a character": lambda path: path.write_text('output_dir: "\\ud800"\n'),
    "NUL": lambda path: path.write_text('output_dir: "\\0"\n'),
    "UTF-16": lambda path: path.write_bytes("seed: 1".encode("utf-16")),
}


@pytest.mark.parametrize("words", HOSTILE_FILES)
def test_a_recipe_file_that_would_hang_or_crash_its_reader_is_one_line(tmp_path, words):
    path = tmp_path / "recipe.yaml"
    HOSTILE_FILES[words](path)
    started = time.process_time()
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert time.process_time() - started < 3
    line = str(raised.value)
    assert line.isprintable() and words in line and "recipe.yaml" in line and len(line) < 1500


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(20))
def test_random_recipe_texts_are_read_or_refused(raw, tmp_path, seed):
    """A valid recipe with characters replaced, taken out and put in, 500 times a seed."""
    generator, text = random.Random(seed), yaml.safe_dump(raw)
    letters = string.printable + "&*!|>%@`\ufeff\x85\ud800\0"
    path = tmp_path / "recipe.yaml"
    for _ in range(500):
        changed = list(text)
        for _ in range(generator.randint(1, 8)):
            place = generator.randrange(len(changed))
            changed[place : place + generator.randint(0, 3)] = generator.choices(letters, k=generator.randint(0, 4))
        path.write_bytes("".join(changed).encode("utf-8", "surrogatepass"))
        try:
            load_config(path)
        except UserError as error:
            assert all(line.isprintable() and len(line) < 2000 for line in str(error).split("\n")), str(error)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(20))
def test_random_overrides_are_read_or_refused(tiny, out, tmp_path, seed):
    generator = random.Random(seed)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny, out)))
    for _ in range(300):
        value = "".join(generator.choices(string.printable + "[]{}&*!\ud800\0\u202e", k=generator.randint(0, 40)))
        try:
            load_config(path, [f"{generator.choice(KEYS)}={value}"])
        except UserError as error:
            assert all(line.isprintable() and len(line) < 2000 for line in str(error).split("\n")), str(error)
