"""The pages say what is so: their commands are understood, and the files that they name are those that are written."""

import re
import shlex
from pathlib import Path

import pytest

from rsaft_fast.backbones.lora_formats import KOHYA_FILE
from rsaft_fast.cli.parser import build_parser, parse_arguments
from rsaft_fast.recipe.load import load_config
from rsaft_fast.sampling.protocol import LORA_FILE
from rsaft_fast.train.model_card import CARD

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
COMMANDS = {
    line: page.name
    for page in PAGES
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("rsaft-fast ")
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    arguments = parse_arguments(build_parser(), shlex.split(command)[1:])
    if arguments.command in ("train", "estimate"):
        load_config(arguments.recipe, arguments.overrides)


def test_files_of_a_run_are_called_what_the_walk_calls_them():
    walk = (ROOT / "docs" / "zero-to-comfyui.md").read_text()
    assert set(re.findall(r"^\| `([^`]+)` \| ", walk, re.MULTILINE)) >= {KOHYA_FILE, LORA_FILE, CARD}
    copied = re.findall(r"^cp runs/sdxl/lora/(\S+) ", walk, re.MULTILINE)
    assert copied and set(copied) == {KOHYA_FILE}


def test_files_that_contributing_names_are_there():
    named = re.findall(r"`([\w.]+(?:/[\w.]+)+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 15
    assert [name for name in named if not any((top / name).exists() for top in (ROOT, ROOT / "rsaft_fast"))] == []
