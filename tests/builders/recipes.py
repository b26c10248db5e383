"""Recipes for runs of a few seconds on tiny pipelines, and the command line as a subprocess."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from builders.clip import write_clip
from builders.pipelines import (
    tiny_flux,
    tiny_klein,
    tiny_krea2,
    tiny_qwen_image,
    tiny_sd3,
    tiny_sd15,
    tiny_sdxl,
    tiny_zimage,
)
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import validate

PROMPTS = ("a red circle", "two blue squares", "a green triangle above a red square", "one")


@dataclass(frozen=True)
class Tiny:
    """Folders of the inputs that a recipe names."""

    sd15: Path
    sdxl: Path
    sd3: Path
    flux: Path
    qwen: Path
    krea: Path
    klein: Path
    zimage: Path
    clip: Path
    prompts: Path


def write_tiny(folder: Path) -> Tiny:
    (folder / "clip").mkdir()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return Tiny(
        sd15=tiny_sd15(folder / "sd15"),
        sdxl=tiny_sdxl(folder / "sdxl"),
        sd3=tiny_sd3(folder / "sd3"),
        flux=tiny_flux(folder / "flux"),
        qwen=tiny_qwen_image(folder / "qwen"),
        krea=tiny_krea2(folder / "krea"),
        klein=tiny_klein(folder / "klein"),
        zimage=tiny_zimage(folder / "zimage"),
        clip=write_clip(folder / "clip", context=40),  # longer than any of `PROMPTS`
        prompts=folder / "prompts.txt",
    )


def recipe(tiny: Tiny, out: Path, family: str = "sd15", **overrides: Any) -> dict[str, Any]:
    """A recipe as a mapping; overrides take `section__key`, whole sections by their name."""
    raw: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 2,
        "checkpoint_every": 2,
        "backbone": {"path": str(getattr(tiny, family)), "device": "cpu", "height": 32, "width": 32},
        "parameters": {"lora": {"rank": 2, "alpha": 4}},
        "sampler": {"steps": 2},
        "method": {"name": "draft"},
        "reward": {"path": str(tiny.clip)},
        "data": {"prompts": str(tiny.prompts), "batch_size": 2},
        "optimizer": {"lr": 1e-2},
        "samples": {"every": 0},
        "logging": {"tensorboard": False},
    }
    for key, value in overrides.items():
        section, _, name = key.rpartition("__")
        (raw.setdefault(section, {}) if section else raw)[name] = copy.deepcopy(value)
    return raw


def config(tiny: Tiny, out: Path, family: str = "sd15", **overrides: Any) -> Config:
    return validate(recipe(tiny, out, family, **overrides), where="the test's recipe")


def write_recipe(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def start_cli(arguments: Sequence[str | Path], cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "rsaft_fast", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_cli(arguments: Sequence[str | Path], cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rsaft_fast", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)
