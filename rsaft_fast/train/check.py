"""What can be found wrong with a recipe before anything is loaded or written."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from rsaft_fast.backbones import PipelineBackbone, adapter_for
from rsaft_fast.backbones.quantized import why_not
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.prompt_sets import overlap_note, prompt_notes
from rsaft_fast.hub import is_hub_id
from rsaft_fast.ops import backends
from rsaft_fast.rewards import RewardSettings
from rsaft_fast.rewards.calibration import read_calibration
from rsaft_fast.sampling import GradientPlan, derive_rng
from rsaft_fast.speed import check as speed
from rsaft_fast.speed.apply import require_unet
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.config import MOST_PICTURES, PLAYGROUND, Config
from rsaft_fast.train.data import load_prompts
from rsaft_fast.train.denoising import CaptionedImage, load_folder
from rsaft_fast.train.logging import CHECKPOINTS, CONFIG, METRICS, SAMPLES, TENSORBOARD
from rsaft_fast.train.samples import first_prompts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TF32_ROUNDING = 2.0**-11
"""Half a unit in the last of TF32's 10 bits."""
# torch knows more names, such as meta and mps, on which nothing here runs.
_DEVICE = re.compile(r"cpu|cuda(:\d{1,2})?")


@dataclass(frozen=True)
class Inputs:
    """What a recipe's paths hold.

    Attributes:
        prompts: of the training.
        sample_prompts: of the sample grids.
        images: of the denoising loss.
        checkpoint: to go on from; None for a new run.
        notes: lines that the user should see.
    """

    prompts: list[str]
    sample_prompts: list[str]
    images: list[CaptionedImage]
    checkpoint: Path | None
    notes: list[str]


def check_config(config: Config) -> Inputs:
    """Check everything that needs no model, and read the small inputs.

    Raises:
        UserError: the first thing that is wrong.
    """
    # The method itself knows whether its K fits into the sampler's steps.
    plan = config.method.draw(config.sampler.steps, derive_rng(config.seed, 0, "plan"))
    _check_agreement(config)
    _check_offload(config)
    check_device(config.backbone.device)
    _check_backend(config.backbone.device)
    check_path("backbone.path", config.backbone.path)
    _check_true_cfg(config)
    _check_speed(config, adapter_for(config.backbone.path, text=False) if config.speed.channels_last else None)
    speed.check_device(config.speed, pick_device(config.backbone.device), DTYPES[config.backbone.dtype])
    _check_memory_options(config, plan)
    checkpoint, notes = _find_checkpoint(config)
    notes += _drowned_radii(config)
    if config.reward.calibration is not None:
        read_calibration(config.reward.calibration)
    prompts = load_prompts(config.data.prompts, config.data.column)
    sample_prompts = _sample_prompts(config, prompts)
    notes += _prompt_notes(config, prompts, sample_prompts)
    return Inputs(
        prompts=prompts,
        sample_prompts=sample_prompts,
        images=load_folder(config.denoising.images, notes.append) if config.denoising else [],
        checkpoint=checkpoint,
        notes=notes,
    )


def check_settings(config: Config, adapter: type[PipelineBackbone]) -> None:
    """Check the keys by themselves, for a pipeline of that adapter: no file, device or output folder is needed.

    Raises:
        UserError: the first thing that is wrong.
    """
    plan = config.method.draw(config.sampler.steps, derive_rng(config.seed, 0, "plan"))
    _check_agreement(config)
    _check_offload(config)
    if config.backbone.device.partition(":")[0] != "cuda":  # a recipe for a GPU may be looked at without one
        check_device(config.backbone.device)
    _check_true_cfg(config, adapter)
    _check_speed(config, adapter)
    _check_memory_options(config, plan, adapter)


def _check_agreement(config: Config) -> None:
    """Keys that contradict each other."""
    _check_reward(config)
    _check_quantize(config)
    backbone = config.backbone
    if {"decoder", "decoder-strips"} <= set(backbone.checkpoint):
        raise UserError(
            "backbone.checkpoint has both decoder and decoder-strips, two ways of recomputing the same network; leave "
            "one of them out"
        )
    if backbone.keep_blocks and "denoiser" not in backbone.checkpoint:
        raise UserError(
            f"backbone.keep_blocks is {backbone.keep_blocks}, but backbone.checkpoint has no denoiser, so that all of "
            "its blocks keep their activations; add denoiser to checkpoint, or leave keep_blocks out"
        )
    if config.pictures_per_update > MOST_PICTURES:
        raise UserError(
            f"data.batch_size {config.data.batch_size} times data.accumulate {config.data.accumulate} is "
            f"{config.pictures_per_update} pictures an update; at most {MOST_PICTURES}"
        )
    if config.sharpness is not None and config.sharpness.space not in ("pixel01", "pixel11"):
        raise UserError(f"sharpness.space is {config.sharpness.space!r}; S1 is measured in pixel01 or pixel11")
    sampler = config.sampler
    if sampler.negative_prompt and sampler.guidance_scale == sampler.true_cfg_scale == 1:
        raise UserError("sampler.negative_prompt does nothing at sampler.guidance_scale 1; raise it, or leave it out")
    schedule, warmup = config.optimizer.schedule, config.optimizer.warmup_steps
    if schedule != "constant" and warmup >= config.max_steps:
        raise UserError(
            f"optimizer.warmup_steps is {warmup}, which leaves nothing of max_steps {config.max_steps} for the "
            f"{schedule} schedule"
        )
    if config.backbone.dtype == "fp16" and config.parameters.train == "full":
        raise UserError("backbone.dtype fp16 with parameters.train full: its gradients underflow; use bf16 or fp32")
    for group in config.smoothing.parameters.groups if config.smoothing.parameters else ():
        try:
            re.compile(group.match)
        except re.error as error:
            raise UserError(
                f"smoothing.parameters.groups: {group.match!r} is not a regular expression ({error})"
            ) from error


def _check_quantize(config: Config) -> None:
    """What a base in few bits needs: adapters beside it, and the means to read it."""
    quantize = config.backbone.quantize
    if quantize is None:
        return
    if config.parameters.train == "full":
        raise UserError(
            f"backbone.quantize {quantize} with parameters.train full: quantised weights cannot take small changes; "
            "train lora, or leave quantize out"
        )
    obstacle = why_not(quantize)
    if obstacle is not None:
        raise UserError(f"backbone.quantize is {quantize}, but {obstacle}")


def _check_offload(config: Config) -> None:
    """What streamed blocks need: weights that are never written, and graphs that do not keep them."""
    count = config.backbone.offload_blocks
    if not count:
        return
    if config.parameters.train == "full":
        raise UserError(
            f"backbone.offload_blocks {count} with parameters.train full: offloaded weights are never written; train "
            "lora, or keep the optimizer's state on the host (optimizer.offload=state)"
        )
    if "denoiser" not in config.backbone.checkpoint:
        raise UserError(
            f"backbone.offload_blocks {count} without denoiser in backbone.checkpoint: the backward pass would keep "
            "every block's weights on the device; set backbone.checkpoint=[denoiser,decoder]"
        )
    if config.backbone.keep_blocks:
        raise UserError(
            f"backbone.offload_blocks {count} with keep_blocks {config.backbone.keep_blocks}: a block that is not "
            "recomputed keeps its weights on the device until its backward pass; leave one of the two out"
        )


def _check_reward(config: Config) -> None:
    """A reward whose gradient can be followed where the recipe follows it."""
    reward, image = config.reward, config.smoothing.image
    if not reward.differentiable:
        raise UserError(
            f"{_without_gradient(reward)} has no gradient, and method.name {config.method.name} follows the reward's; "
            "score with it (rsaft-fast score), or train with a differentiable one"
        )
    if image is not None and image.space == "reward_input" and reward.name == "combination":
        raise UserError(
            "smoothing.image.space is reward_input; the parts of reward.name combination have an input of their own "
            "each: take pixel01, pixel11 or latent"
        )


def _without_gradient(reward: RewardSettings) -> str:
    for index, part in enumerate(reward.parts):
        if not part.differentiable:
            return f"reward.parts[{index}].name {part.name}"
    return f"reward.how {reward.how}" if reward.name == "combination" else f"reward.name {reward.name}"


def _check_true_cfg(config: Config, adapter: type[PipelineBackbone] | None = None) -> None:
    """A second guidance scale needs a model whose first one is embedded."""
    scale = config.sampler.true_cfg_scale
    if scale != 1 and not (adapter or adapter_for(config.backbone.path, text=False)).embeds_guidance:
        raise UserError(
            f"sampler.true_cfg_scale is {scale}, which FLUX.1 alone knows; leave it out and set sampler.guidance_scale"
        )


def _check_speed(config: Config, adapter: type[PipelineBackbone] | None) -> None:
    """What makes an update faster, against what the model is and how its weights are kept."""
    backbone = config.backbone
    speed.check_agreement(config.speed, quantize=backbone.quantize, offload_blocks=backbone.offload_blocks)
    if config.speed.channels_last and adapter is not None:
        require_unet(adapter)


def _drowned_radii(config: Config) -> list[str]:
    """A line about process-wide products in TF32 or bf16, which round away image radii that float32 holds."""
    precision = torch.get_float32_matmul_precision()
    if precision == "highest":
        return []
    height, width = config.backbone.height or 512, config.backbone.width or 512
    for key, ball in (("smoothing.image", config.smoothing.image), ("sharpness", config.sharpness)):
        if ball is None or ball.space == "latent":
            continue
        rms = ball.radius if ball.norm == "rms" else ball.radius / (3 * height * width) ** 0.5
        if rms < TF32_ROUNDING:
            return [
                f"warning: torch.get_float32_matmul_precision() is {precision!r}, which rounds products to "
                f"{TF32_ROUNDING:.0e} or worse, and {key}.radius {ball.radius:g} ({ball.norm}) is {rms:.0e} a pixel: "
                "the reward's float32 is not what it says; set_float32_matmul_precision('highest')"
            ]
    return []


def _check_memory_options(config: Config, plan: GradientPlan, adapter: type[PipelineBackbone] | None = None) -> None:
    """The optimizer's options against what is trained, and how."""
    settings = config.optimizer
    full_bf16 = config.parameters.train == "full" and config.backbone.dtype == "bf16"
    if settings.stochastic_rounding and not full_bf16:
        raise UserError(
            f"optimizer.stochastic_rounding with parameters.train {config.parameters.train} and backbone.dtype "
            f"{config.backbone.dtype}: it is for bf16 weights; LoRA and fp32 weights hold small changes without it"
        )
    if not settings.release_gradients:
        return
    calls = plan.backward_calls(_is_guided(config, adapter), batched=config.speed.cfg == "batched")
    obstacles = {
        "smoothing.parameters null: there is no second pass": config.smoothing.parameters is None,
        f"data.accumulate {config.data.accumulate}; set it to 1": config.data.accumulate > 1,
        f"method {config.method.name}: {calls} backward passes an update, and it needs 1 (k=1, and guidance off, "
        "method.uncond=detached or speed.cfg=batched)": calls > 1,
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise UserError(f"optimizer.release_gradients with {obstacle}")


def _is_guided(config: Config, adapter: type[PipelineBackbone] | None = None) -> bool:
    """Whether a network call has two branches. A guidance scale alone does not say so: FLUX.1 embeds it."""
    sampler = config.sampler
    if sampler.guidance_scale == sampler.true_cfg_scale == 1:
        return False
    adapter = adapter or adapter_for(config.backbone.path, text=False)
    return sampler.true_cfg_scale != 1 or not adapter.embeds_guidance


def check_device(name: str, key: str = "backbone.device") -> None:
    """Refuse a device that torch does not have; `key` is where the user named it."""
    if name == "auto":
        return
    if not _DEVICE.fullmatch(name):
        raise UserError(f"{key} is {name!r}; it must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"{key} is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu "
            "('rsaft-fast doctor' says more)"
        )


def _check_backend(name: str) -> None:
    """A backend forced with RSAFT_BACKEND must run on the device."""
    try:
        backends.choose(pick_device(name))
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" is the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def check_path(key: str, path: str) -> None:
    """Refuse a pipeline's path that is neither a folder nor a hub id."""
    if path != PLAYGROUND and not os.path.exists(Path(path).expanduser()) and not is_hub_id(path):
        raise UserError(f"{key}: there is no folder {path!r}, and it is not a hub id (owner/name)")


def _find_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and that the output folder may be written."""
    folder = config.run_folder
    check_writable(folder)
    _check_run_folder(config)
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


def _check_run_folder(config: Config) -> None:
    """That everything the run will write there, the model in the end included, can be written."""
    folder = config.run_folder
    lora = config.parameters.train == "lora"
    export = "lora" if lora else adapter_for(config.backbone.path, text=False).denoiser_name
    for name in (CONFIG, METRICS):
        path = folder / name
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"output_dir: {path} is no file, and the run writes one of that name; move it away")
    for name in (export, CHECKPOINTS, SAMPLES, TENSORBOARD):
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


def check_writable(folder: Path, key: str = "output_dir") -> None:
    """Refuse an output folder that could not be made."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"{key} {folder} is {'a link to nothing' if folder.is_symlink() else 'a file'}; give a folder")
    existing = folder.absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key} {folder} cannot be made: {existing} is not a folder that you may write to")


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
