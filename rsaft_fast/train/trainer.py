"""A recipe's objects, loaded and ready: an update, a sample grid, a checkpoint, an export."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rsaft_fast import __version__
from rsaft_fast.algorithms.copies import EMA
from rsaft_fast.algorithms.denoising import DenoisingLoss, captions
from rsaft_fast.algorithms.reward_gradient import StepReport, rsaft_step
from rsaft_fast.backbones import PipelineBackbone, add_lora, load_backbone, save_lora
from rsaft_fast.data.batches import PromptBatches
from rsaft_fast.data.encoded import EncodedPrompts, negative_texts
from rsaft_fast.data.encodings import Encodings, Watched, free_memory, load_shapes, open_cache
from rsaft_fast.errors import UserError
from rsaft_fast.files import io_errors_of, remove_tree, replace_folder
from rsaft_fast.memory import checkpoint_networks
from rsaft_fast.out_of_memory import naming_the_phase
from rsaft_fast.progress import watched
from rsaft_fast.recipe.check import DTYPES, pick_device
from rsaft_fast.recipe.config import BackboneSettings, Config
from rsaft_fast.rewards import Reward, RewardSettings, load_reward
from rsaft_fast.sampling import derive_rng
from rsaft_fast.sampling.linear import Schedule
from rsaft_fast.sampling.pictures import sample_images
from rsaft_fast.smoothing.precision import check_precision
from rsaft_fast.speed import apply_speed
from rsaft_fast.train.checkpoint import Checkpoint
from rsaft_fast.train.inputs import Inputs
from rsaft_fast.train.model_card import describe_export
from rsaft_fast.train.optimizer import build_optimizer, check_state, learning_rate, load_state

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


class Trainer:
    """Everything that a run needs in memory.

    It comes to the device in turns, so that no part stands beside one that will leave: each text encoder (none, where
    all prompts are in the cache), then the reward, whose text tower leaves when it has seen the prompts, then the
    denoiser and the VAE.

    Attributes:
        backbone, reward, optimizer, ema: as the recipe asks for.
        step: updates done.
        advise: what lowers the memory that a phase needs, for the message when there is too little; None if unknown.
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        say: Callable[[str], None] = lambda line: None,
        stage: Callable[[str], None] = lambda line: None,
    ):
        """
        Args:
            say: takes what the user should know.
            stage: takes a line about what begins now and may take long.
        """
        self.config = config
        self.device = pick_device(config.backbone.device)
        self.batches = PromptBatches(config.data, inputs.prompts, config.method, config.sampler.steps, config.seed)
        self.sample_prompts = inputs.sample_prompts
        stage(f"looking for the prompts' encodings ({config.backbone.path})")
        encodings = self._find_encodings(inputs, say)
        self.schedule = _training_schedule(config, encodings.shapes)
        # On the host, before what takes long: one that cannot be loaded is known at once, and takes no memory yet.
        stage(f"loading the reward {_named(config.reward)}")
        reward = load_reward(config.reward)
        for note in reward.prompt_notes(self.scored_prompts):
            say(note)
        with naming_the_phase("preparing the run"):
            encodings.complete(stage)
            stage("the reward takes in the prompts")
            self.reward = self._keep_prompts(reward)
            stage(f"loading the denoiser and the VAE of {config.backbone.path}")
            self.backbone = prepare_backbone(config.backbone, self.device, text=False)
        for note in dict.fromkeys(self.backbone.notes):
            if note not in encodings.shapes.notes:
                say(note)
        self.encoded = EncodedPrompts(self.backbone, encodings, config.sampler)
        if config.parameters.train == "lora":
            add_lora(self.backbone, config.parameters.lora, config.seed)
        else:
            self.backbone.train_all_parameters()
        apply_speed(self.backbone, config.speed)
        self.parameters = self.backbone.trainable_parameters
        self.optimizer = build_optimizer(self.parameters, config.optimizer, config.smoothing.parameters, config.seed)
        self.ema = EMA(self.parameters, config.ema.decay) if config.ema else None
        self.step = 0
        self.denoising = None
        if config.denoising is not None:
            self.denoising = DenoisingLoss(self.backbone, config.denoising, inputs.images, config.seed)
        self.advise: Callable[[str], str | None] = lambda phase: None

    @property
    def scored_prompts(self) -> list[str]:
        """Every prompt whose pictures the run will score."""
        return list(dict.fromkeys(self.batches.visited(range(self.config.max_steps)) + self.sample_prompts))

    def _find_encodings(self, inputs: Inputs, say: Callable[[str], None]) -> Encodings:
        """Of every text that the run will see: which are there, and which are to be made."""
        config = self.config
        cache = open_cache(config.data.encoding_cache, say)
        shapes = load_shapes(config.backbone, DTYPES[config.backbone.dtype], self.device)
        texts = self.scored_prompts + negative_texts(shapes, config.sampler)
        if config.denoising is not None:
            texts += captions(inputs.images)
        return Encodings(shapes, config.backbone, texts, cache, say)

    def _keep_prompts(self, reward: Reward) -> Reward:
        """The reward on the device, without what it needs for other prompts than the run's."""
        reward = reward.to(self.device)
        reward.keep_prompts(Watched(self.scored_prompts, "prompts for the reward"))
        free_memory(self.device)
        return reward

    def check_reward(self, images: torch.Tensor | None) -> None:
        """Refuse a reward in low precision whose S1 is mostly rounding, at the radii that the recipe works with.

        Args:
            images: the first sample grid, (N, 3, H, W); None draws a few pictures where there is need.

        Raises:
            UserError: its S1 differs from that in float32 by more than a tenth.
        """
        balls = [ball for ball in (self.config.sharpness, self.config.smoothing.image) if ball is not None]
        prompts = self.sample_prompts if images is not None else self.scored_prompts
        with naming_the_phase("checking the reward"):
            check_precision(
                self.reward, balls, prompts, lambda some: self._draw(some) if images is None else images[: len(some)]
            )
        free_memory(self.device)  # the float32 copy refers to itself

    def update(self) -> dict[str, Any]:
        """The next update; its record for metrics.jsonl.

        Raises:
            NonFiniteRewardError, UserError: a NaN reward, no memory left; weights are those before the update, or the
                error and `optimizer.half_stepped` say that a released update broke off.
        """
        config, step, started = self.config, self.step, time.perf_counter()
        lr = learning_rate(config.optimizer, step, config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with naming_the_phase(f"update {step + 1}", lambda: self.optimizer.half_stepped, self.advise):
            report = rsaft_step(
                self.backbone,
                self.reward,
                self.schedule,
                self.batches(self.backbone, self.encoded, step),
                self.optimizer,
                smoothing=config.smoothing,
                loss=config.training_loss,
                probe=config.sharpness,
                compare_gradients=config.logging.diagnostics and not config.optimizer.release_gradients,
            )
            denoising_loss = self.denoising and self.denoising.update(self.encoded, self.optimizer, step)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        record = {"step": self.step, **self._figures(report), "lr": lr}
        if self.denoising is not None:
            record["denoising_loss"] = denoising_loss
        return record | {"seconds": round(time.perf_counter() - started, 4)}

    def _figures(self, report: StepReport) -> dict[str, Any]:
        """A report under the names of metrics.jsonl; `grad_norm` is that of the update's gradient, before clipping."""
        stats = dict(report.optimizer)
        perturbs = self.config.smoothing.parameters is not None
        figures = {
            "reward": report.reward,
            **{f"reward/{name}": value for name, value in report.parts.items()},
            "loss": report.loss,
            "s1": report.s1,
            "eps_norm": stats.pop("eps_norm") if perturbs else 0.0,
            "projection": stats.pop("projection") if perturbs else None,
            # Released gradients are gone before anybody could take their norm.
            "grad_norm": None if math.isnan(stats["second_grad_norm"]) else stats["second_grad_norm"],
            "skipped": stats.pop("skipped"),
            "smoothed_reward": report.smoothed_reward,
            "realised_drop": report.realised_drop,
        }
        if not (perturbs and self.config.logging.diagnostics):
            return figures
        del stats["second_grad_norm"]
        return figures | {"first_grad_norm": stats.pop("grad_norm"), **stats}

    def sample(self, stop: Callable[[], bool] = lambda: False) -> torch.Tensor | None:
        """Pictures of the fixed prompts at the fixed noise, (N, 3, H, W) on the host, by the mean weights where there
        are any."""
        with self.final_weights(), naming_the_phase("the sample grid"):
            return self._draw(self.sample_prompts, stop)

    def _draw(self, prompts: list[str], stop: Callable[[], bool] = lambda: False) -> torch.Tensor | None:
        seed = self.config.seed if self.config.samples.seed is None else self.config.samples.seed
        batch_size = self.config.data.batch_size
        watch = lambda firsts: watched(firsts, "batches of the grid", len(firsts), "batch")  # noqa: E731
        return sample_images(self.backbone, self.schedule, self.encoded(prompts), seed, batch_size, stop, watch=watch)

    @torch.no_grad()
    def grid_reward(self, images: torch.Tensor) -> float:
        """The reward's mean over a sample grid's pictures, (N, 3, H, W).

        Raises:
            UserError: no memory left.
        """
        size = self.config.data.batch_size
        with naming_the_phase("scoring the sample grid"):
            parts = [slice(first, first + size) for first in range(0, len(images), size)]
            scores = [self.reward.score(images[part].to(self.device), self.sample_prompts[part]) for part in parts]
        return float(torch.cat(scores).double().mean())

    def final_weights(self):
        """A context in which the model has the weights that a user would take away."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def checkpoint(self) -> Checkpoint:
        """What `load` needs to go on bit for bit."""
        return Checkpoint(
            step=self.step,
            weights={name: p.detach() for name, p in self.parameters.items()},
            optimizer=self.optimizer.state_dict(),
            ema=self.ema.means if self.ema is not None else None,
            info=describe_software()
            | {"seed": self.config.seed, "reward": self.reward.spec.sha256, "optimizer": self._ordered_names()},
        )

    def check_fit(self, saved: Checkpoint) -> None:
        """Raise `UserError` if a checkpoint is another model's, or its optimizer state another optimizer's."""
        self._check_tensors("weights", saved.weights)
        if (saved.ema is None) != (self.ema is None):
            raise UserError("resume: the checkpoint and the recipe disagree on ema; set it as the run had it")
        if saved.ema is not None:
            self._check_tensors("ema", saved.ema)
        check_state(self.optimizer, self._ordered_names(), saved.optimizer, saved.info.get("optimizer"))

    def _check_tensors(self, what: str, tensors: Mapping[str, torch.Tensor]) -> None:
        wanted = {name: tuple(p.shape) for name, p in self.parameters.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wanted != found:
            odd = next(name for name in wanted | found if wanted.get(name) != found.get(name))
            raise UserError(
                f"resume: the checkpoint's {what} do not fit this recipe: {odd} is {found.get(odd, 'missing')} there "
                f"and {wanted.get(odd, 'missing')} here; resume with the run's own backbone and parameters"
            )

    def _ordered_names(self) -> list[str]:
        """Names of the parameters in the optimizer's order, which its state dict counts by."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def load(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint, bit for bit."""
        self.check_fit(saved)
        for name, parameter in self.parameters.items():
            parameter.copy_(saved.weights[name])
        load_state(self.optimizer, saved.optimizer)
        if self.ema is not None:
            self.ema.load(saved.ema)
        self.step = saved.step

    def export(self, folder: Path) -> Path:
        """Write what other programs load: `<folder>/lora`, or the denoiser as `<folder>/unet` or `/transformer`."""
        lora = self.config.parameters.train == "lora"
        final = folder / ("lora" if lora else self.backbone.denoiser_name)
        temporary = folder / f".{final.name}.tmp"
        remove_tree(temporary)
        try:
            with self.final_weights(), io_errors_of(temporary):
                self._save(temporary)
                describe_export(temporary, final.name, self.config, self.backbone, self.step, self.reward.spec)
            replace_folder(temporary, final)
        except BaseException:
            remove_tree(temporary)
            raise
        return final

    def export_lora(self, folder: Path) -> None:
        """Write `<folder>/lora`; a checkpoint is not complete, and not readable by others, without it."""
        if self.config.parameters.train == "lora":
            with self.final_weights():
                self._save(folder / "lora")

    def _save(self, folder: Path) -> None:
        with io_errors_of(folder):
            if self.config.parameters.train == "lora":
                save_lora(self.backbone, folder, self.config.parameters.lora)
            else:
                self.backbone.denoiser.save_pretrained(folder)


def _training_schedule(config: Config, shapes: PipelineBackbone) -> Schedule:
    """The sampler's steps.

    Raises:
        UserError: the scheduler does not give them, or the calls that would be trained have no part in the picture.
    """
    schedule = shapes.schedule(config.sampler.steps, config.sampler.eta)
    plan = config.method.draw(config.sampler.steps, derive_rng(config.seed, 0, "plan"))
    graded = [schedule[index] for index in plan.graded]
    # DDIM's step from the first timestep to an alpha that is the same: x' = x, rounding apart.
    if plan.finish == "sampler" and not plan.renoise and all(abs(step.b) < 1e-9 for step in graded):
        raise UserError(
            f"method {config.method.name} would train nothing: {len(graded)} of sampler.steps {len(schedule)} carry a "
            f"gradient, and this scheduler's last step, at timestep {schedule[plan.last].t:g}, leaves the picture as "
            "it is; raise method.k and sampler.steps, or set timestep_spacing to trailing in scheduler_config.json"
        )
    return schedule


def prepare_backbone(settings: BackboneSettings, device: torch.device, text: bool = True) -> PipelineBackbone:
    """Load the pipeline that a recipe names, with the checkpointing it asks for; `text`: with its text encoders."""
    backbone = load_backbone(
        settings.path,
        height=settings.height,
        width=settings.width,
        dtype=DTYPES[settings.dtype],
        device=device,
        offload_blocks=settings.offload_blocks,
        quantize=settings.quantize,
        text=text,
    )
    checkpoint_networks(backbone.denoiser, backbone.pipeline.vae, settings.checkpoint, settings.keep_blocks)
    return backbone


def _named(reward: RewardSettings) -> str:
    """A reward as a recipe names it; a combination by its parts."""
    parts = " and ".join(part.shown for part in reward.parts)
    return f"{reward.name} of {parts}" if parts else f"{reward.name} ({reward.path})"


def describe_software() -> dict[str, str]:
    """Versions of what the bits depend on."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"rsaft_fast": __version__} | packages | {"python": platform.python_version()}
