"""What can be found wrong with the keys of a recipe, before any file of its is read."""

from __future__ import annotations

import os
import re

import torch

from rsaft_fast.backbones import traits_of
from rsaft_fast.backbones.own import is_own
from rsaft_fast.backbones.quantized import why_not
from rsaft_fast.dtypes import DTYPES
from rsaft_fast.errors import UserError
from rsaft_fast.hub import is_hub_id
from rsaft_fast.methods import NFT, FlowGRPO, GradientMethod
from rsaft_fast.methods.gardo import compared_rewards
from rsaft_fast.ops import backends
from rsaft_fast.recipe.check_agreement import check_judges
from rsaft_fast.recipe.check_evaluation import check_evaluation
from rsaft_fast.recipe.check_smoothing import check_smoothing
from rsaft_fast.recipe.config import MOST_PICTURES, PLAYGROUND, Config
from rsaft_fast.rewards.combine import CombinationSettings
from rsaft_fast.sampling import GradientPlan, derive_rng
from rsaft_fast.sampling.protocol import Traits
from rsaft_fast.speed import check as speed
from rsaft_fast.speed.apply import require_convolutions
from rsaft_fast.speed.attention import MASKLESS

# torch knows more names, such as meta and mps, on which nothing here runs.
_DEVICE = re.compile(r"cpu|cuda(:\d{1,2})?")


def check_settings(config: Config, model: Traits) -> None:
    """Check the keys by themselves, for a model of that kind: no file, device or output folder is needed.

    Raises:
        UserError: the first thing that is wrong.
    """
    plan = check_keys(config)
    if config.backbone.device.partition(":")[0] != "cuda":  # a recipe for a GPU may be looked at without one
        check_device(config.backbone.device)
    check_model(config, plan, model)


def check_keys(config: Config) -> GradientPlan | None:
    """Check the keys against each other; return the first update's plan.

    Raises:
        UserError: the first thing that is wrong.
    """
    plan = first_plan(config)  # the method itself knows whether its K fits into the sampler's steps
    if plan is not None and plan.leaps and config.sampler.eta:
        raise UserError(
            f"sampler.eta is {config.sampler.eta} with method.name {config.method.name}, whose leaps cannot cross the "
            "noise that the sampler then draws; set sampler.eta=0 (on a model that predicts epsilon flowbp_sparse and "
            "flowbp_bridge go with it)"
        )
    _check_agreement(config)
    _check_offload(config)
    backbone = config.backbone
    speed.check_agreement(config.speed, quantize=backbone.quantize, offload_blocks=backbone.offload_blocks)
    return plan


def check_machine(config: Config, own_model: bool = False) -> None:
    """Check what the keys ask of this machine: the device, a forced backend, the pipeline's path.

    Args:
        own_model: the caller hands over a model, and `backbone.path` is not read.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_device(config.backbone.device)
    _check_backend(config.backbone.device)
    if not own_model:
        check_path("backbone.path", config.backbone.path)
    speed.check_device(config.speed, pick_device(config.backbone.device), DTYPES[config.backbone.dtype])


def check_model(config: Config, plan: GradientPlan | None, model: Traits | None = None) -> None:
    """Check the keys against the kind of model.

    Args:
        plan: of the first update.
        model: None looks into the pipeline's folder, where a key makes it matter.

    Raises:
        UserError: the first thing that is wrong.
    """
    _check_true_cfg(config, model)
    if config.speed.channels_last:
        require_convolutions(model or traits_of(config.backbone.path))
    _check_masks(config, model)
    _check_memory_options(config, plan, model)


def first_plan(config: Config) -> GradientPlan | None:
    """Draw the first update's plan; None where the method has none.

    Raises:
        UserError: the method's settings do not fit into the sampler's steps.
    """
    if not isinstance(config.method, GradientMethod):
        return None
    return config.method.draw(config.sampler.steps, derive_rng(config.seed, 0, "plan"))


def _check_agreement(config: Config) -> None:
    """Keys that contradict each other."""
    _check_reward(config)
    _check_groups(config)
    check_judges(config)
    check_evaluation(config)
    _check_regularize(config)
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
    if config.pictures_per_iteration > MOST_PICTURES:
        data = config.data
        keys = {"data.batch_size": data.batch_size, "data.accumulate": data.accumulate}
        if data.prompts_per_iteration is not None:
            keys = {"data.prompts_per_iteration": data.prompts_per_iteration, "data.group_size": data.group_size}
        factors = " times ".join(f"{key} {value}" for key, value in keys.items())
        raise UserError(f"{factors} is {config.pictures_per_iteration} pictures an iteration; at most {MOST_PICTURES}")
    if config.sharpness is not None and config.sharpness.space not in ("pixel01", "pixel11"):
        raise UserError(f"sharpness.space is {config.sharpness.space!r}; S1 is measured in pixel01 or pixel11")
    check_smoothing(config)
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


def _check_regularize(config: Config) -> None:
    """A distance to the base needs graded calls, and a backward pass of its own."""
    if config.regularize is None:
        return
    if not isinstance(config.method, GradientMethod):
        raise UserError(
            f"regularize.kl_to_base with method.name {config.method.name}: it is for the calls that carry the reward's "
            "gradient, which an algorithm of your own does not name; leave regularize out"
        )
    if config.optimizer.release_gradients:
        raise UserError(
            "regularize.kl_to_base with optimizer.release_gradients: its gradient is a backward pass more, and "
            "released gradients are applied in the first; leave one of the two out"
        )


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
    if config.method.needs_gradient and reward.without_gradient:
        raise UserError(
            f"{reward.without_gradient} has no gradient, and method.name {config.method.name} follows the reward's; "
            "score with it (rsaft-fast score), or train with a differentiable one"
        )
    if image is not None and image.space == "reward_input" and reward.name == "combination":
        raise UserError(
            "smoothing.image.space is reward_input; the parts of reward.name combination have an input of their own "
            "each: take pixel01, pixel11 or latent"
        )


def _check_groups(config: Config) -> None:
    """Groups that stay whole, in micro-batches that are full."""
    data, method = config.data, config.method
    per_group, updates = data.group_size, method.updates_per_iteration
    if isinstance(method, FlowGRPO | NFT):
        if per_group == 1:
            raise UserError(
                f"data.group_size is 1, and method.name {method.name} compares the pictures of a prompt: take 12 to "
                "24, or at least 2"
            )
        if config.smoothing.image is not None:
            raise UserError(
                f"smoothing.image with method.name {method.name}: it perturbs pictures along the reward's gradient, "
                "which this method does not follow; set smoothing.image null (or smoothing null for none at all)"
            )
        _check_gate(config, method)
    if isinstance(method, FlowGRPO):
        method.trained_calls(config.sampler.steps, config.sampler.steps, derive_rng(config.seed, 0, "plan"))
    if data.prompts_per_iteration is None:
        pictures = data.batch_size * data.accumulate
        made = f"data.batch_size {data.batch_size} times data.accumulate {data.accumulate}"
        if pictures % per_group:
            raise UserError(
                f"{made} is {pictures} pictures, no multiple of data.group_size {per_group}; change one of them, or "
                "set data.prompts_per_iteration"
            )
    else:
        pictures = data.prompts_per_iteration * per_group
        made = f"data.prompts_per_iteration {data.prompts_per_iteration} times data.group_size {per_group}"
        if data.accumulate != 1:
            raise UserError(
                f"data.accumulate is {data.accumulate}, and data.prompts_per_iteration says how many pictures there "
                "are: leave one of them out"
            )
    if pictures % (data.batch_size * updates):
        among = "" if updates == 1 else f" times method.updates {updates}"
        raise UserError(
            f"{made} is {pictures} pictures, no multiple of data.batch_size {data.batch_size}{among}: micro-batches "
            "are full; change one of them"
        )
    if config.max_steps % updates:
        raise UserError(
            f"max_steps is {config.max_steps}, and an iteration of method {method.name} makes {updates} updates; give "
            "a multiple of that"
        )


def _check_gate(config: Config, method: FlowGRPO | NFT) -> None:
    """GARDO's gate needs rewards to compare with. A reward in Python may be a combination: it says so when it loads."""
    gate, reward = method.gardo.gate if method.gardo else None, config.reward
    if gate is None or reward.name == "python":
        return
    weights = {part.column: part.weight for part in reward.parts} if isinstance(reward, CombinationSettings) else {}
    probed = config.sharpness is not None and reward.differentiable
    compared_rewards(gate, weights, differentiable=reward.differentiable, probed=probed)


def _check_true_cfg(config: Config, model: Traits | None = None) -> None:
    """A second guidance scale needs a model whose first one is embedded."""
    scale = config.sampler.true_cfg_scale
    if scale != 1 and not (model or traits_of(config.backbone.path)).embeds_guidance:
        raise UserError(
            f"sampler.true_cfg_scale is {scale}, which FLUX.1 alone knows; leave it out and set sampler.guidance_scale"
        )


def _check_masks(config: Config, model: Traits | None = None) -> None:
    """A kernel that takes no mask cannot attend to texts of unequal lengths in one call."""
    settings, batch = config.speed, config.data.batch_size
    if settings.attention not in MASKLESS or not (model or traits_of(config.backbone.path)).masks_text:
        return
    obstacles = {
        f"data.batch_size {batch}; set it to 1": batch > 1,
        f"speed.cfg {settings.cfg}; set it to separate": settings.cfg != "separate" and _is_guided(config, model),
        f"speed.compile {settings.compile}; set it to none": settings.compile != "none",
        "speed.cuda_graph; leave it out": settings.cuda_graph,
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise UserError(
                f"speed.attention is {settings.attention}, which takes no mask: this model's prompts have lengths of "
                f"their own, and are padded and masked with {obstacle}, or take auto, cudnn or efficient"
            )


def _check_memory_options(config: Config, plan: GradientPlan | None, model: Traits | None = None) -> None:
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
    if plan is None:
        raise UserError(
            f"optimizer.release_gradients with method.name {config.method.name}: it is for reward gradients, whose "
            "update can be one backward pass; leave it out"
        )
    calls = plan.backward_calls(_is_guided(config, model), batched=config.speed.cfg == "batched")
    obstacles = {
        "smoothing.parameters null: there is no second pass": config.smoothing.parameters is None,
        f"data.accumulate {config.data.accumulate}; set it to 1": config.data.accumulate > 1,
        f"method {config.method.name}: {calls} backward passes an update, and it needs 1 (k=1, and guidance off, "
        "method.uncond=detached or speed.cfg=batched)": calls > 1,
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise UserError(f"optimizer.release_gradients with {obstacle}")


def _is_guided(config: Config, model: Traits | None = None) -> bool:
    """Whether a network call has two branches. A guidance scale alone does not say so: FLUX.1 embeds it."""
    sampler = config.sampler
    if sampler.guidance_scale == sampler.true_cfg_scale == 1:
        return False
    model = model or traits_of(config.backbone.path)
    return sampler.true_cfg_scale != 1 or not model.embeds_guidance


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
    """Refuse a backbone's path that is no folder, hub id, or Python code."""
    if is_own(path):
        return
    if path != PLAYGROUND and not os.path.exists(path) and not is_hub_id(path):
        raise UserError(f"{key}: there is no folder {path!r}, and it is not a hub id (owner/name)")
