"""Stages of a build: autoencoder, denoiser with text encoders, each proxy reward, their cards."""

import functools
import json
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from rsaft_fast.files import replace_folder, sha256_of
from rsaft_fast.playground import REWARDS
from rsaft_fast.playground.build import cards, denoiser, proxies, vae
from rsaft_fast.playground.build.record import Log, forget_origin, store_half, update
from rsaft_fast.playground.build.reward import ClipReward
from rsaft_fast.playground.build.settings import Settings

STATE = "state.pt"


def _vae(settings: Settings, work: Path, assets: Path, log: Log) -> None:
    vae.train(settings, log).save_pretrained(work)


def _denoiser(settings: Settings, work: Path, assets: Path, log: Log) -> None:
    trained = AutoencoderKL.from_pretrained(work.parent / "vae").eval().requires_grad_(False)
    denoiser.train(settings, trained, log, work / STATE).save_pretrained(work)


def _layout(settings: Settings, work: Path, assets: Path, log: Log) -> None:
    pipeline = denoiser.load(work.parent / "denoiser")
    denoiser.train_on(pipeline, settings.layout, settings, log, work / STATE).save_pretrained(work)


def _guidance(settings: Settings, work: Path, assets: Path, log: Log) -> None:
    """Put guidance into the target, so that samples need no unconditional branch."""
    pipeline = denoiser.load(work.parent / "layout")
    denoiser.train_on(pipeline, settings.guidance, settings, log, work / STATE).save_pretrained(work)
    _ship(work, assets / "pipeline")


def _proxy(name: str, settings: Settings, work: Path, assets: Path, log: Log) -> None:
    sources = proxies.generators(settings, assets)
    proxies.train(settings.proxies[name], settings.text.length, sources, log).save(work)
    _ship(work, assets / "rewards" / name)


def _cards(settings: Settings, work: Path, assets: Path, log: Log) -> None:
    asked = cards.questions(settings, assets)
    for name in REWARDS:
        log.result(**{name: cards.examine(ClipReward.load(assets / "rewards" / name), asked)})
    (assets / "cards.md").write_text(cards.table(log.results))  # docs/playground.md shows it


PIPELINE = {"vae": _vae, "denoiser": _denoiser, "layout": _layout, "guidance": _guidance}
JUDGES = {name: functools.partial(_proxy, name) for name in REWARDS} | {"cards": _cards}
STAGES = PIPELINE | JUDGES


def run(settings: Settings, work: Path, assets: Path, stages: Collection[str] = tuple(STAGES)) -> None:
    """Run those of `stages` that the working folder has no result of, then write build.json.

    A proxy's result counts only for the pipeline that it was made for, and the cards for the rewards as well.

    Args:
        work: fp32 results and logs, a folder a stage.
        assets: what ships, in fp16, with build.json.
    """
    for stage in STAGES:
        folder = work / stage
        done = _log(folder)
        if stage not in stages or (done and done.get("read", "") == _read(stage, assets)):
            continue
        partial = folder.with_suffix(".partial")  # a long stage goes on from what it left there
        partial.mkdir(parents=True, exist_ok=True)
        threads = settings.threads["proxies" if stage in JUDGES else stage]
        torch.set_num_threads(threads)
        log, read = Log(stage), _read(stage, assets)
        STAGES[stage](settings, partial, assets, log)
        (partial / "log.json").write_text(json.dumps(log.summary() | {"threads": threads, "read": read}))
        replace_folder(partial, folder)
    assets.mkdir(parents=True, exist_ok=True)
    update(assets, asdict(settings), {stage: _log(work / stage) for stage in STAGES})


def _log(folder: Path) -> dict[str, Any]:
    path = folder / "log.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _read(stage: str, assets: Path) -> str:
    """Compute the SHA-256 of the assets that a stage reads; "" where it reads none."""
    if stage in PIPELINE:
        return ""
    parts = ("pipeline", "rewards") if stage == "cards" else ("pipeline",)
    return sha256_of([path for part in parts for path in sorted((assets / part).rglob("*")) if path.is_file()])


def _ship(folder: Path, target: Path) -> None:
    """Copy what was saved under `folder` to `target` in fp16."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    store_half(target)
    forget_origin(target)
