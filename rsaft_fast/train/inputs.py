"""What can be found wrong with a recipe before anything is loaded or written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rsaft_fast.algorithms.denoising import CaptionedImage, load_folder
from rsaft_fast.backbones import Backbone, traits_of
from rsaft_fast.data.prompt_sets import overlap_note, prompt_notes
from rsaft_fast.data.prompts import first_prompts, load_prompts
from rsaft_fast.errors import UserError
from rsaft_fast.files import check_writable
from rsaft_fast.recipe.check import check_keys, check_machine, check_model
from rsaft_fast.recipe.config import Config
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.logging import BEST, CHECKPOINTS, CONFIG, EVALUATIONS, METRICS, SAMPLES, TENSORBOARD
from rsaft_fast.train.trackers import require_trackers

TF32_ROUNDING = 2.0**-11
"""Half a unit in the last of TF32's 10 bits."""


@dataclass(frozen=True)
class Inputs:
    """What a recipe's paths hold.

    Attributes:
        prompts: of the training.
        sample_prompts: of the sample grids.
        images: of the denoising loss.
        checkpoint: to go on from; None for a new run.
        notes: lines that the user should see.
        evaluation_prompts: of the pictures that the run is evaluated on, one each.
    """

    prompts: list[str]
    sample_prompts: list[str]
    images: list[CaptionedImage]
    checkpoint: Path | None
    notes: list[str]
    evaluation_prompts: list[str] = field(default_factory=list)


def check_config(config: Config, own: Backbone | None = None) -> Inputs:
    """Check everything that needs no model, and read the small inputs.

    Args:
        own: the caller's own backbone; None for the one that the recipe names.

    Raises:
        UserError: the first thing that is wrong.
    """
    plan = check_keys(config)
    check_machine(config, own is not None)
    check_model(config, plan, own)
    checkpoint, notes = _find_checkpoint(config, own)
    require_trackers(config.logging.trackers)
    notes += _drowned_radii(config)
    for reward in (config.reward, *(config.evaluation.rewards.values() if config.evaluation else ())):
        reward.check_files()
    prompts = load_prompts(config.data.prompts, config.data.column)
    sample_prompts = _sample_prompts(config, prompts)
    evaluation_prompts = _evaluation_prompts(config, prompts)
    notes += _prompt_notes(config, prompts, sample_prompts)
    notes += _evaluation_notes(config, prompts, evaluation_prompts)
    return Inputs(
        prompts=prompts,
        sample_prompts=sample_prompts,
        images=load_folder(config.denoising.images, notes.append) if config.denoising else [],
        checkpoint=checkpoint,
        notes=notes,
        evaluation_prompts=evaluation_prompts,
    )


def _drowned_radii(config: Config) -> list[str]:
    """A line about process-wide products in TF32 or bf16, which round away image radii that float32 holds."""
    precision = torch.get_float32_matmul_precision()
    if precision == "highest":
        return []
    height, width = config.backbone.height or 512, config.backbone.width or 512
    for key, ball in (("smoothing.image", config.smoothing.smallest_ball), ("sharpness", config.sharpness)):
        if ball is None or ball.space == "latent":
            continue
        rms = ball.number if ball.norm == "rms" else ball.number / (3 * height * width) ** 0.5
        if rms < TF32_ROUNDING:
            return [
                f"warning: torch.get_float32_matmul_precision() is {precision!r}, which rounds products to "
                f"{TF32_ROUNDING:.0e} or worse, and {key}.radius {ball.number:g} ({ball.norm}) is {rms:.0e} a pixel: "
                "the reward's float32 is not what it says; set_float32_matmul_precision('highest')"
            ]
    return []


def _find_checkpoint(config: Config, own: Backbone | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and that the output folder may be written."""
    folder = config.run_folder
    check_writable(folder)
    _check_run_folder(config, own)
    if config.resume is None:
        if has_run(folder):
            raise UserError(
                f"output_dir {folder} holds a run already; resume=auto goes on with it, another output_dir= starts anew"
            )
        return None, []
    source = folder if config.resume == "auto" else Path(config.resume)
    if config.resume != "auto" and not has_run(source):
        raise UserError(f"resume: {source} is not a run folder (it has no {CONFIG} and no checkpoints)")
    if source.resolve() != folder.resolve() and has_run(folder):
        raise UserError(
            f"resume={source} into output_dir {folder}, which holds a run already; give an output_dir of its own, or "
            "none to go on in place"
        )
    found, passed_over = checkpoints.newest(source / CHECKPOINTS)
    reasons = "".join(f" ({line})" for line in passed_over[:1])
    if found is None and config.resume != "auto":
        raise UserError(f"resume: {source} has no complete checkpoint{reasons}; leave resume out to start anew")
    if found is None and (damaged := checkpoints.find_damaged(source / CHECKPOINTS)) is not None:
        raise UserError(
            f"resume: {source} has no checkpoint that is whole{reasons}; put {damaged} right, move "
            f"{source / CHECKPOINTS} away to start from the beginning, or give another output_dir"
        )
    if found is None and has_run(folder):
        passed_over.append(f"{folder} has no complete checkpoint: the run starts from the beginning")
    return found, passed_over


def _check_run_folder(config: Config, own: Backbone | None) -> None:
    """That everything the run will write there, the model in the end included, can be written."""
    folder = config.run_folder
    lora = config.parameters.train == "lora"
    export = "lora" if lora else (own or traits_of(config.backbone.path)).denoiser_name
    for name in (CONFIG, METRICS, EVALUATIONS):
        path = folder / name
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"output_dir: {path} is no file, and the run writes one of that name; move it away")
    for name in (export, CHECKPOINTS, SAMPLES, TENSORBOARD, BEST):
        path = folder / name
        if not os.path.lexists(path):
            continue
        if not os.path.isdir(path) or (name == export and path.is_symlink()):
            kind = "a link" if path.is_symlink() else "no folder"
            raise UserError(f"output_dir: {path} is {kind}, and the run writes a folder of that name; move it away")
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: you may not write to {path}; make it writable, or give another output_dir")
    if not has_run(folder) and os.path.isdir(folder / export) and any((folder / export).iterdir()):
        raise UserError(
            f"output_dir: {folder / export} is not a run's, and the model is to be written there; give another one"
        )


def has_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return any(os.path.exists(folder / name) for name in (CONFIG, METRICS, "checkpoints"))


def _prompt_notes(config: Config, prompts: list[str], sample_prompts: list[str]) -> list[str]:
    """What the prompts of training say about the judging."""
    notes = prompt_notes(config.data.prompts, prompts, training=True)
    # The first of data.prompts are trained on by intention.
    if config.samples.prompts is not None and sample_prompts:
        overlap = overlap_note(prompts, sample_prompts, "the sample grids (samples.prompts)")
        notes += [overlap] if overlap else []
    return notes


def _sample_prompts(config: Config, prompts: list[str]) -> list[str]:
    settings = config.samples
    if settings.every == 0:
        return []
    own = prompts if settings.prompts is None else load_prompts(settings.prompts, held_out=True)
    return first_prompts(own, settings.count)


def _evaluation_prompts(config: Config, prompts: list[str]) -> list[str]:
    settings = config.evaluation
    if settings is None:
        return []
    source = settings.prompts if settings.prompts is not None else config.samples.prompts
    own = prompts if source is None else load_prompts(source, held_out=True)
    return first_prompts(own, settings.count)


def _evaluation_notes(config: Config, prompts: list[str], own: list[str]) -> list[str]:
    """What the prompts of training say about the evaluation."""
    if config.evaluation is None:
        return []
    if config.evaluation.prompts is None and config.samples.prompts is None:
        return [
            "note: evaluation.prompts and samples.prompts are null: the run is evaluated on prompts that it trains on, "
            "where rewards rise most"
        ]
    overlap = overlap_note(prompts, own, "the evaluation (evaluation.prompts)")
    return [overlap] if overlap else []
