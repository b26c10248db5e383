"""Flow-GRPO: clipped policy gradient of the sampler's stochastic steps (Liu et al. 2025, arXiv 2505.05470)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from rsaft_fast.errors import UserError
from rsaft_fast.methods.base import Method
from rsaft_fast.methods.gardo import Gardo
from rsaft_fast.sampling.plan import Uncond
from rsaft_fast.settings import Settings

StepKind = Literal["sde", "cps", "ddim"]
NOISE_LEVELS: dict[StepKind, float] = {"sde": 0.7, "cps": 0.8, "ddim": 1.0}


class Window(Settings):
    """Flow-GRPO-Fast: noise and training in a few calls alone, the sampler's deterministic steps in all others.

    Attributes:
        size: calls of the window (2 or 3 in the released code).
        first: the earliest call that it may begin at.
        last: the latest call that it may begin at; null is the middle of the sampler's calls.
    """

    size: int = Field(default=2, ge=1, le=1000)
    first: int = Field(default=0, ge=0, le=1000)
    last: int | None = Field(default=None, ge=0, le=1000)


class FlowGRPO(Method):
    """Policy gradient: pictures of one prompt are compared, and the better ones' steps made more likely.

    It needs no gradient of the reward. Every step of the sampler that draws is a Gaussian around a mean that the
    network sets; DDIM models (SD1.5, SDXL) are trained by the same rule, which is DDPO's with a group's baseline.

    Attributes:
        step: sde draws by Flow-GRPO's stochastic equation, cps by coefficients-preserving steps (less noise in the
            picture), both for SD3 and FLUX.1; ddim is DDIM's ancestral noise, for SD1.5 and SDXL. null takes sde or
            ddim, as the model is.
        noise_level: how much is drawn: a of sde (0.7; FLUX.1 0.9), eta of cps (0.8, at most 1) and of ddim (1, at
            most 1); null takes those. sampler.eta is that of the sample grids alone.
        draws: all makes every step of a rollout draw, as the paper does; trained only those that are trained on.
        timestep_fraction: share of the calls that are trained on, from the first; the paper's 0.99 leaves out the last.
        window: trains a few calls in a row, others each iteration and the same for all pictures of it; null trains
            those of timestep_fraction.
        uncond: the unconditional branch of classifier-free guidance in rollouts and training: graded, detached, or
            none, which samples the training pictures without guidance. Sample grids keep sampler.guidance_scale.
        updates: optimizer updates of one iteration (the paper: 2). The first has ratio 1; later ones train on pictures
            that slightly older weights have drawn.
        clip: eps of the clip range of the ratio, 1 - eps to 1 + eps. null: 1e-4, or 1e-5 with log_prob_form squared.
            With log_prob sum ratios move as many times further as a latent has elements: choose another.
        log_prob: of a step, the mean over the latent's elements or their sum.
        log_prob_form: gaussian, or squared, the squared distance to the mean without its variance; null is squared
            for cps, as its authors have it, and else gaussian.
        advantage_std: what advantages are divided by: the standard deviation of each group (the paper), of the whole
            iteration (global, its released configurations), or none (GARDO).
        advantage_clip: largest advantage; null does not clip.
        drop_equal_groups: leaves out groups whose rewards are all equal, which have nothing to say.
        kl_weight: weight of the penalty that holds predictions to those of the first weights; 0 has none. The paper
            takes 0.04 for GenEval and OCR, 0.01 for PickScore. In velocity space about a hundredth of that.
        kl_space: where the penalty is taken: mean, the KL divergence of the two steps; velocity, the network's
            prediction; x0, the predicted clean latent.
        kl_dt: divides the divergence of mean by the step's whole variance, as the paper's equation does; false leaves
            its duration out, as the released code and its 0.04 do.
        ratio_norm: GRPO-Guard (arXiv 2510.22319): ratios are centred and scaled alike at all calls, and each call's
            loss divided by its duration. With a clip of 2e-6, and a smaller learning rate.
        most_divergence: Flow-DPPO (arXiv 2606.11025): in place of the clip range, a sample is cut off where its step
            has moved further than this from the old one and goes on moving away (1e-5); null clips.
        collect_batch: pictures that are sampled together; null takes data.batch_size. Sampling keeps no activations,
            so that many times more fit.
        gardo: gate, adaptive reference and diversity on top (GARDO), with a kl_weight and advantage_std of their own;
            null has none.
        offload_copies: keeps the copy of the first weights on the host; for full fine-tuning.
    """

    needs_gradient: ClassVar[bool] = False

    name: Literal["flow_grpo"] = "flow_grpo"
    step: StepKind | None = None
    noise_level: float | None = Field(default=None, gt=0, le=10)
    draws: Literal["all", "trained"] = "all"
    timestep_fraction: float = Field(default=0.99, gt=0, le=1)
    window: Window | None = None
    uncond: Uncond = "graded"
    updates: int = Field(default=1, ge=1, le=1000)
    clip: float | None = Field(default=None, gt=0, lt=1)
    log_prob: Literal["mean", "sum"] = "mean"
    log_prob_form: Literal["gaussian", "squared"] | None = None
    advantage_std: Literal["none", "group", "global"] = "group"
    advantage_clip: float | None = Field(default=5.0, gt=0)
    drop_equal_groups: bool = True
    kl_weight: float = Field(default=0.04, ge=0)
    kl_space: Literal["mean", "velocity", "x0"] = "mean"
    kl_dt: bool = False
    ratio_norm: bool = False
    most_divergence: float | None = Field(default=None, gt=0)
    collect_batch: int | None = Field(default=None, ge=1)
    gardo: Gardo | None = None
    offload_copies: bool = False

    @model_validator(mode="after")
    def _go_together(self) -> FlowGRPO:
        if self.log_prob == "sum" and self.clip is None:
            raise ValueError("log_prob is sum, whose ratios the usual clip range does not fit; give clip a value")
        plain = self.log_prob == "mean" and self.form(self.step or "sde") == "gaussian"
        if self.ratio_norm and not plain:
            raise ValueError("ratio_norm is for the mean of gaussian log-probabilities; leave it out")
        if self.ratio_norm and self.most_divergence is not None:
            raise ValueError("ratio_norm and most_divergence are two rules for the same ratio; leave one out")
        return self

    @property
    def updates_per_iteration(self) -> int:
        return self.updates

    def form(self, kind: StepKind) -> Literal["gaussian", "squared"]:
        """Return the form of log-probabilities for steps of that kind."""
        return self.log_prob_form or ("squared" if kind == "cps" else "gaussian")

    def clip_range(self, kind: StepKind) -> float:
        """Return eps of the clip range for steps of that kind."""
        if self.clip is not None:
            return self.clip
        return 1e-5 if self.form(kind) == "squared" else 1e-4

    def trained_calls(self, num_steps: int, num_drawing: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Draw the calls that one iteration trains on.

        Args:
            num_drawing: how many of the calls, from the first, can draw: all, but for the last of cps.

        Raises:
            UserError: there is no such call, or the window does not lie within them.
        """
        if self.window is None:
            calls = range(min(max(1, int(num_steps * self.timestep_fraction)), num_drawing))
            if not calls:
                raise UserError(f"method.step {self.step} draws in no call of sampler.steps {num_steps}; raise it")
            return tuple(calls)
        size, first = self.window.size, self.window.first
        last = min(num_steps // 2, num_drawing - size) if self.window.last is None else self.window.last
        if not first <= last <= num_drawing - size:
            raise UserError(
                f"method.window of {size} calls begins at call {first} to {last}, and of sampler.steps {num_steps} the "
                f"calls 0 to {num_drawing - 1} draw; make window smaller or raise sampler.steps"
            )
        begin = int(rng.integers(first, last + 1))
        return tuple(range(begin, begin + size))
