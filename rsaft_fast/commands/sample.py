"""`rsaft-fast sample`: pictures by our sampler, from a pipeline as it is or with what a run trained."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from rsaft_fast.backbones import PipelineBackbone, add_lora
from rsaft_fast.commands.output import output_folder
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation import save_grid, save_png
from rsaft_fast.evaluation.grids import to_picture
from rsaft_fast.speed import SpeedSettings, apply_speed
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.check import check_device, check_path, pick_device
from rsaft_fast.train.config import BackboneSettings, Config, SamplerSettings
from rsaft_fast.train.data import EncodedPrompts, load_prompts
from rsaft_fast.train.logging import CONFIG
from rsaft_fast.train.memory_errors import naming_the_phase
from rsaft_fast.train.recipe import load_config
from rsaft_fast.train.samples import sample_images
from rsaft_fast.train.trainer import prepare_backbone


def run(arguments: argparse.Namespace) -> int:
    check_device(arguments.device)
    check_path("PIPELINE", arguments.pipeline)
    prompts = arguments.prompts or load_prompts(arguments.prompts_file, held_out=True)
    output = output_folder(arguments.output, "samples")
    trained = _read_run(arguments.run) if arguments.run else None
    sampler = _sampler(arguments, trained)
    backbone = prepare_backbone(_backbone(arguments, trained), pick_device(arguments.device))
    schedule = backbone.schedule(sampler.steps, sampler.eta)
    if trained is not None:
        load_trained(backbone, trained, Path(arguments.run))
    elif arguments.lora:
        load_lora(backbone, arguments.lora)
    apply_speed(backbone, trained.speed.portable() if trained else SpeedSettings())
    with naming_the_phase("sampling"):
        encoded = EncodedPrompts.encode(backbone, prompts, sampler)
        columns = {
            f"seed {seed}": sample_images(
                backbone, schedule, encoded(prompts), seed, arguments.batch_size, same_noise=True
            )
            for seed in dict.fromkeys(arguments.seeds)
        }
    _write(output, prompts, columns)
    print(f"rsaft-fast: {len(prompts) * len(columns)} pictures and {output / 'grid.png'}")
    return 0


def _read_run(folder: str) -> Config:
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"--run {folder} is not a run folder: it has no {CONFIG}")
    return load_config(path)


def _sampler(arguments: argparse.Namespace, trained: Config | None) -> SamplerSettings:
    """The options given, over the run's settings, over the defaults."""
    base = trained.sampler if trained else SamplerSettings(steps=28)
    given = {
        "steps": arguments.steps,
        "eta": arguments.eta,
        "guidance_scale": arguments.guidance,
        "negative_prompt": arguments.negative,
    }
    return base.model_copy(update={name: value for name, value in given.items() if value is not None})


def _backbone(arguments: argparse.Namespace, trained: Config | None) -> BackboneSettings:
    base = trained.backbone if trained else BackboneSettings(path=arguments.pipeline)
    given = {"height": arguments.height, "width": arguments.width, "dtype": arguments.dtype}
    return base.model_copy(
        update={"path": arguments.pipeline, "checkpoint": ()}
        | {name: value for name, value in given.items() if value is not None}
    )


@torch.no_grad()
def load_trained(backbone: PipelineBackbone, config: Config, folder: Path) -> None:
    """Put a run's newest weights, or their running mean where it kept one, into the backbone.

    Raises:
        UserError: no complete checkpoint, or one of another model.
    """
    path, passed_over = checkpoints.newest(folder / "checkpoints")
    if path is None:
        raise UserError(f"--run {folder} has no complete checkpoint{''.join(f' ({line})' for line in passed_over[:1])}")
    saved = checkpoints.read(path, verify=False)
    if config.parameters.train == "lora":
        add_lora(backbone, config.parameters.lora, config.seed)
    else:
        backbone.train_all_parameters()
    weights, parameters = saved.ema or saved.weights, backbone.trainable_parameters
    if {n: p.shape for n, p in parameters.items()} != {n: w.shape for n, w in weights.items()}:
        raise UserError(f"the weights of {path} do not fit this pipeline; the run trained {config.backbone.path}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def load_lora(backbone: PipelineBackbone, path: str) -> None:
    """Load a LoRA in diffusers' format, by diffusers.

    Raises:
        UserError: nothing there, or not a LoRA of this pipeline.
    """
    file = Path(path)
    if not file.exists():
        raise UserError(f"--lora {path} does not exist; give the file or folder that a run left in lora/")
    if file.is_file() and file.suffix != ".safetensors":
        raise UserError(f"--lora {path} is not a .safetensors file; other formats can run code when they are loaded")
    name = {"weight_name": file.name} if file.is_file() else {}
    try:
        backbone.pipeline.load_lora_weights(
            str(file.parent if file.is_file() else file), use_safetensors=True, local_files_only=True, **name
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"--lora {path} could not be loaded: {str(error).strip().splitlines()[0]}") from error


def _write(output: Path, prompts: list[str], columns: dict[str, torch.Tensor]) -> None:
    """One PNG a picture, named by number: a prompt is never part of a file's name."""
    listed = []
    for label, images in columns.items():
        for index, (prompt, image) in enumerate(zip(prompts, images)):
            name = f"{index:04d}_{label.replace(' ', '_')}.png"
            save_png(to_picture(image), output / name)
            listed.append({"file": name, "prompt": prompt, "seed": int(label.split()[1])})
    save_grid(output / "grid.png", prompts, columns)
    (output / "pictures.json").write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
