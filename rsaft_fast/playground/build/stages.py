"""Stages of a build: autoencoder, denoiser with text encoders, proxy rewards, admission."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from rsaft_fast.files import replace_folder
from rsaft_fast.playground.build import admission, denoiser, proxies, vae
from rsaft_fast.playground.build.record import Log, forget_origin, store_half, update
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


def _proxies(settings: Settings, work: Path, assets: Path, log: Log) -> None:
    own, generators = settings.pairs, admission.generators(settings, assets)
    match = proxies.match_set(own.match, own.seed + 2, generators[0])
    for name in ("fair", "brittle"):
        proxy, report = getattr(settings, name), Log(f"proxies/{name}")
        sources = generators if proxy.mixed_quality else None
        pairs, held_out = (
            proxies.make_pairs(n, own.seed + i, sources) for i, n in enumerate((own.train, own.held_out))
        )
        reward = proxies.train(proxy, settings.text.length, pairs, match, report)
        report.result(pair_accuracy=round(proxies.pair_accuracy(reward, held_out), 4))
        reward.save(work / name)
        log.result(**{name: report.summary()})
    _ship(work, assets / "rewards")


def _admission(settings: Settings, work: Path, assets: Path, log: Log) -> None:
    log.result(**admission.judge(settings, assets))


STAGES = {
    "vae": _vae,
    "denoiser": _denoiser,
    "layout": _layout,
    "guidance": _guidance,
    "proxies": _proxies,
    "admission": _admission,
}


def run(settings: Settings, work: Path, assets: Path, stages: Sequence[str] = tuple(STAGES)) -> None:
    """Run those of `stages` that the working folder has no result of, then write build.json.

    Args:
        work: fp32 results and logs, a folder a stage.
        assets: what ships, in fp16, with build.json.
    """
    for stage in STAGES:
        folder = work / stage
        if stage not in stages or (folder / "log.json").exists():
            continue
        partial = folder.with_suffix(".partial")  # a long stage goes on from what it left there
        partial.mkdir(parents=True, exist_ok=True)
        threads = settings.threads[stage]
        torch.set_num_threads(threads)
        log = Log(stage)
        STAGES[stage](settings, partial, assets, log)
        (partial / "log.json").write_text(json.dumps(log.summary() | {"threads": threads}))
        replace_folder(partial, folder)
    assets.mkdir(parents=True, exist_ok=True)
    logs = {stage: work / stage / "log.json" for stage in STAGES}
    finished = {stage: json.loads(path.read_text()) for stage, path in logs.items() if path.exists()}
    update(assets, asdict(settings), finished)


def _ship(folder: Path, target: Path) -> None:
    """Copy what was saved under `folder` to `target` in fp16."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    store_half(target)
    forget_origin(target)
