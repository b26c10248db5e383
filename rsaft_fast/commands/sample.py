"""`rsaft-fast sample`: pictures by our sampler, from a pipeline as it is or with what a run trained."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from rsaft_fast.algorithms.copies import MEAN
from rsaft_fast.backbones import Backbone, add_lora, traits_of
from rsaft_fast.backbones.lora_files import has_text_part, load_lora
from rsaft_fast.commands.output import output_folder
from rsaft_fast.data.encoded import EncodedPrompts, negative_texts
from rsaft_fast.data.encodings import Encodings, load_shapes
from rsaft_fast.data.picture_lists import GRID, LISTING
from rsaft_fast.data.prompts import checked_prompt, load_prompts
from rsaft_fast.dtypes import DTYPES
from rsaft_fast.errors import UserError
from rsaft_fast.figures.grids import save_grid, save_png, to_picture
from rsaft_fast.files import write_atomically
from rsaft_fast.out_of_memory import oom_as_user_error
from rsaft_fast.progress import Counter
from rsaft_fast.recipe.check import check_device, check_path, pick_device
from rsaft_fast.recipe.config import PLAYGROUND, BackboneSettings, Config, SamplerSettings
from rsaft_fast.recipe.load import find_recipe, load_config
from rsaft_fast.recipe.schema import explain
from rsaft_fast.sampling import Schedule
from rsaft_fast.sampling.pictures import sample_images
from rsaft_fast.settings import Settings
from rsaft_fast.speed import SpeedSettings, apply_speed
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.loaders import prepare_backbone
from rsaft_fast.train.logging import BEST, CONFIG

Group = TypeVar("Group", bound=Settings)


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast sample`."""
    _check_arguments(arguments)
    trained = _read_run(arguments.run) if arguments.run else None
    settings = _backbone(arguments, trained)
    check_path("PIPELINE", settings.path)
    if arguments.prompts:
        prompts = [checked_prompt(text, "--prompts") for text in arguments.prompts]
    else:
        prompts = load_prompts(arguments.prompts_file, held_out=True)
    with output_folder(arguments.output, "samples") as output:
        return _draw(arguments, trained, settings, prompts, output)


def _draw(
    arguments: argparse.Namespace,
    trained: Config | None,
    settings: BackboneSettings,
    prompts: list[str],
    output: Path,
) -> int:
    device = pick_device(arguments.device)
    shapes = load_shapes(settings, DTYPES[settings.dtype], device)
    sampler = _sampler(arguments, trained, shapes, settings.path)
    schedule = shapes.schedule(sampler.steps, sampler.eta)
    with oom_as_user_error("sampling"):
        backbone, encoded = _load(arguments, settings, device, shapes, prompts, sampler)
        if trained is not None and not arguments.untrained:
            load_trained(backbone, trained, Path(arguments.run), arguments.checkpoint)
        apply_speed(backbone, trained.speed.portable() if trained else SpeedSettings())
        columns = _pictures(arguments, backbone, schedule, encoded, prompts, output)
    grid = output / GRID
    save_grid(grid, prompts, columns)
    print(
        f"rsaft-fast: {len(prompts) * len(columns)} pictures and {grid} "
        f"({sampler.steps} steps, guidance {sampler.guidance_scale:g})"
    )
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    check_device(arguments.device, "--device")
    if arguments.pipeline is None and not arguments.run:
        raise UserError("sample needs a PIPELINE (folder, hub id, or playground), or --run FOLDER, which knows its own")
    for option, given in (("--untrained", arguments.untrained), ("--checkpoint", arguments.checkpoint is not None)):
        if given and not arguments.run:
            raise UserError(f"{option} is of --run FOLDER, and there is none; leave it out, or name the run")
    if arguments.untrained and arguments.checkpoint is not None:
        raise UserError("--untrained leaves out what --checkpoint would load; give one of them")


def _load(
    arguments: argparse.Namespace,
    settings: BackboneSettings,
    device: torch.device,
    shapes: Backbone,
    prompts: list[str],
    sampler: SamplerSettings,
) -> tuple[Backbone, EncodedPrompts]:
    """The model and its prompts, encoded first: text encoders and denoiser are never in memory together.

    Unless a LoRA has a part of theirs, which peft attaches with the rest.
    """
    if arguments.lora and has_text_part(arguments.lora):
        backbone = prepare_backbone(settings, device)
        lines = [*backbone.notes, *load_lora(backbone, arguments.lora)]
        encoded = EncodedPrompts.encode(backbone, prompts, sampler)
        lines += backbone.cut_prompts([*prompts, sampler.negative_prompt])
    else:
        lines: list[str] = []
        encodings = Encodings(shapes, settings, prompts + negative_texts(shapes, sampler), None, lines.append)
        encodings.complete()
        backbone = prepare_backbone(settings, device, text=False, made=shapes)
        encoded = EncodedPrompts(backbone, encodings, sampler)
        lines += [note for note in backbone.notes if note not in lines]
        lines += load_lora(backbone, arguments.lora) if arguments.lora else []
    for line in lines:
        print(f"rsaft-fast: {line}", file=sys.stderr)
    return backbone, encoded


def _read_run(folder: str) -> Config:
    path = Path(folder) / CONFIG
    if not os.path.isfile(path):
        raise UserError(f"--run {folder} is not a run folder: it has no {CONFIG}")
    return load_config(path)


def _sampler(arguments: argparse.Namespace, trained: Config | None, shapes: Backbone, path: str) -> SamplerSettings:
    """The options given, over the run's settings, over those that are usual for the model."""
    base = usual_sampler(trained, shapes, path)
    given = {
        "steps": arguments.steps,
        "eta": arguments.eta,
        "guidance_scale": arguments.guidance,
        "negative_prompt": arguments.negative,
    }
    sampler = with_options(base, given)
    if arguments.negative and sampler.guidance_scale == sampler.true_cfg_scale == 1:
        raise UserError("--negative does nothing at guidance scale 1; raise --guidance, or leave it out")
    return sampler


def usual_sampler(trained: Config | None, shapes: Backbone, path: str) -> SamplerSettings:
    """Give a run's sampler settings, or those that are usual for the model."""
    if trained is not None:
        return trained.sampler
    if path == PLAYGROUND:
        return load_config(find_recipe(PLAYGROUND)).sampler
    steps, guidance = shapes.usual_sampling
    return SamplerSettings(steps=steps, guidance_scale=guidance)


def _backbone(arguments: argparse.Namespace, trained: Config | None) -> BackboneSettings:
    path = arguments.pipeline or trained.backbone.path
    base = trained.backbone if trained else BackboneSettings(path=path)
    given = {"height": arguments.height, "width": arguments.width, "dtype": arguments.dtype}
    return with_options(base, {"path": path, "checkpoint": ()} | given)


def with_options(base: Group, given: Mapping[str, Any]) -> Group:
    """Settings with the options that were given, each within the limits that it has in a recipe."""
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return type(base).model_validate(base.model_dump() | given)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, type(base), CONFIG, set(given)))) from None


@torch.no_grad()
def load_trained(backbone: Backbone, config: Config, folder: Path, step: int | str | None = None) -> None:
    """Put a run's newest weights, those of a step, or its `BEST` into the backbone.

    They are the running mean of the weights where the run kept one.

    Raises:
        UserError: no complete checkpoint, or one of another model; a run that kept no best.
    """
    if step == BEST:
        _load_best(backbone, config, folder)
        return
    assert not isinstance(step, str)
    path, weights = saved_weights(folder, step)
    if config.parameters.train == "lora":
        add_lora(backbone, config.parameters.lora, config.seed)
    else:
        backbone.train_all_parameters()
    take_weights(backbone, path, weights, config.backbone.path)


def best_folder(config: Config, folder: Path) -> Path:
    """Find what a run exported of its best checkpoint: its LoRA's folder, or its denoiser's.

    Raises:
        UserError: the run kept none.
    """
    name = "lora" if config.parameters.train == "lora" else traits_of(config.backbone.path).denoiser_name
    place = folder / BEST / name
    if not os.path.isdir(place):
        raise UserError(
            f"--checkpoint {BEST}: {place} does not exist; a run keeps its best checkpoint where its recipe's "
            "evaluation section names a reward to judge by; give --checkpoint STEP, or leave it out for the newest"
        )
    return place


def _load_best(backbone: Backbone, config: Config, folder: Path) -> None:
    place = best_folder(config, folder)
    if config.parameters.train == "lora":
        load_lora(backbone, place)
        return
    state = {name: tensor for file in sorted(place.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    own = dict(backbone.denoiser.named_parameters())
    if not own.keys() <= state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise UserError(f"the weights of {place} do not fit this pipeline; the run trained {config.backbone.path}")
    backbone.denoiser.load_state_dict(state, strict=False)


def saved_weights(folder: Path, step: int | None = None, option: str = "--run") -> tuple[Path, dict[str, torch.Tensor]]:
    """Read the weights of a run's newest checkpoint, or of a step's: their running mean where it kept one.

    Raises:
        UserError: no complete checkpoint.
    """
    path, passed_over = checkpoints.newest(folder / "checkpoints")
    if step is not None:
        path = folder / "checkpoints" / f"step_{step}"
        if not os.path.isdir(path):
            kept = sorted((place.name for place in path.parent.glob("step_*")), key=lambda name: (len(name), name))
            raise UserError(f"--checkpoint {step}: {path} does not exist; the run kept {', '.join(kept) or 'none'}")
    if path is None:
        raise UserError(
            f"{option} {folder} has no complete checkpoint{''.join(f' ({line})' for line in passed_over[:1])}"
        )
    saved = checkpoints.read(path, verify=step is not None).filled()
    return path, saved.copies.get(MEAN, saved.weights)


@torch.no_grad()
def take_weights(backbone: Backbone, path: Path, weights: Mapping[str, torch.Tensor], trained: str) -> None:
    """Put a checkpoint's weights into a backbone whose trained parameters are attached.

    Args:
        path: of the checkpoint; `trained` is the pipeline that the run trained. Both are for the message.

    Raises:
        UserError: they do not fit.
    """
    parameters = backbone.trainable_parameters
    if {n: p.shape for n, p in parameters.items()} != {n: w.shape for n, w in weights.items()}:
        raise UserError(f"the weights of {path} do not fit this pipeline; the run trained {trained}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


@torch.no_grad()
def _pictures(
    arguments: argparse.Namespace,
    backbone: Backbone,
    schedule: Schedule,
    encoded: EncodedPrompts,
    prompts: list[str],
    output: Path,
) -> dict[str, torch.Tensor]:
    """Draw and write one PNG a picture, named by number: a prompt is never part of a file's name.

    The listing grows with every batch: pictures of a command that was stopped have their prompts too.

    Returns:
        The pictures (N, 3, H, W) of each seed, for the grid.
    """
    columns, listed = {}, []
    seeds = list(dict.fromkeys(arguments.seeds))
    with Counter("drawing", len(prompts) * len(seeds), "picture") as counter:
        for seed in seeds:
            drawn = []
            for first in range(0, len(prompts), arguments.batch_size):
                batch = prompts[first : first + arguments.batch_size]
                images = sample_images(backbone, schedule, encoded(batch), seed, len(batch), samples=[0] * len(batch))
                for index, (prompt, image) in enumerate(zip(batch, images), first):
                    name = f"{index:04d}_seed_{seed}.png"
                    save_png(to_picture(image), output / name)
                    listed.append({"file": name, "prompt": prompt, "seed": seed})
                write_atomically(output / LISTING, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")
                drawn.append(images)
                counter.add(len(batch))
            columns[f"seed {seed}"] = torch.cat(drawn)
    return columns
