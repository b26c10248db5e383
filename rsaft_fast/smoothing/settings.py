"""Settings of both perturbations: `smoothing` in a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rsaft_fast.errors import UserError
from rsaft_fast.settings import Settings
from rsaft_fast.smoothing.search import Radius, RadiusSearch

Space = Literal["pixel01", "pixel11", "latent", "reward_input"]
Schedule = Literal["constant", "linear", "cosine"]


class ImageSmoothing(Settings):
    """Ball around the picture.

    Attributes:
        radius: rho of eq. 15, per sample. The paper uses 1e-2. auto finds the one at which the smoothed gradient agrees
            best with the gradients of rewards that are not trained on, before the first update (and again, as
            smoothing.radius_search says); none agrees better than the plain gradient: then pictures are not smoothed.
        norm: "l2" is the ball's radius over the whole sample; "rms" is per element (an L2 of 0.01 on a 3x512x512
            picture is an RMS of 1.1e-5: almost nothing).
        space: where the ball lives: decoded pixels in [0, 1] or [-1, 1], the latent, or the reward network's input
            after resize and normalisation. The paper does not say; pixels in [0, 1] before its preprocessing is
            the reading that makes the sharpness S1 of eq. 10 a property of the picture.
        kind: worst goes against the gradient, as RSA-FT; gaussian is its baseline, which the paper leaves out for its
            cost: the reward's mean over random pictures at exactly the radius, each with its own direction.
        samples: of gaussian: pictures that the mean is over; each costs a forward and backward pass of the reward.
        steps: of worst: 1 is eq. 15. More look for a worse picture within the ball, by projected gradient descent on
            the reward (Madry et al. 2018, arXiv 1706.06083) whose step is halved where it does not descend; each
            further one costs a forward and backward pass of the reward (in latent, of the decoder too).
        lowpass: standard deviation, in pixels of the space, of a Gaussian that the gradient is filtered with before it
            is normalised: the perturbation is as long as before and has no finer detail. null does not filter.
        schedule: of the radius along the training: constant, linear to 0, or half a cosine to 0, at max_steps.
        per_sample: s1 scales each picture's perturbation by its sharpness S1 over the running mean of S1, between 1/2
            and 2: where the reward is sharp the ball is larger. One forward pass of the reward more. uncertainty scales
            it by 1 + U, 0 to 2: U is the picture's win rate by the reward less its mean win rate by the parts of weight
            0, among the pictures of the micro-batch (GARDO, arXiv 2512.24138): where the reward alone is pleased the
            ball is larger; the mean radius stays. null has one radius for all.
        only_where: perturb only pictures on which the parts of a combination disagree: whose win rates among the
            pictures of the micro-batch differ by at least this between two parts, 0 to 1 (GARDO's uncertainty, arXiv
            2512.24138). null perturbs all.
    """

    radius: Radius = 1e-2
    norm: Literal["l2", "rms"] = "l2"
    space: Space = "pixel01"
    kind: Literal["worst", "gaussian"] = "worst"
    samples: int = Field(default=1, ge=1, le=1024)
    steps: int = Field(default=1, ge=1, le=1000)
    lowpass: float | None = Field(default=None, gt=0, le=1e3)
    schedule: Schedule = "constant"
    per_sample: Literal["s1", "uncertainty"] | None = None
    only_where: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _agree(self) -> ImageSmoothing:
        if self.kind == "worst" and self.samples != 1:
            raise ValueError(
                f"samples is {self.samples}, and kind worst draws none; set kind=gaussian, or leave it out"
            )
        if self.kind == "gaussian" and self.space == "latent":
            raise ValueError("kind gaussian with space latent: it averages over pictures; take space pixel01")
        if self.kind == "gaussian" and (self.steps > 1 or self.per_sample):
            raise ValueError("kind gaussian with steps or per_sample: those are of kind worst; leave them out")
        return self

    @property
    def is_plain_ball(self) -> bool:
        """Whether it is radius, norm and space alone: what S1 can be measured at."""
        return self == ImageSmoothing(radius=self.radius, norm=self.norm, space=self.space)

    @property
    def number(self) -> float:
        """The radius, once it is one.

        Raises:
            UserError: it is still to be found.
        """
        if isinstance(self.radius, str):
            raise UserError(f"the radius is {self.radius!r} here, where nothing looks for one; give a number")
        return self.radius

    def of_radius(self, radius: float) -> ImageSmoothing:
        """Return the same ball with that radius."""
        return self.model_copy(update={"radius": radius})


class ParameterGroup(Settings):
    """Parameters whose name matches `match` (a regular expression, searched), with a radius of their own."""

    match: str
    rho: float = Field(gt=0, le=1e6)


class ParameterSmoothing(Settings):
    """Ball around the weights.

    Attributes:
        rho: rho_w of eq. 17: one global L2 norm over everything that is trained. The paper uses 1e-2.
        adaptive: ASAM (Kwon et al. 2021): the perturbation is scaled by the weights element by element.
        groups: radii for parts of the network; the direction is still that of the one global norm.
        direction: of eps. gradient is SAM's, of eq. 17: a first pass at theta. momentum is momentum-SAM's (arXiv
            2401.12033): the running mean of the updates' own gradients, with no first pass, so that an update costs
            what the plain method's does; the first update is not perturbed. friendly (Li et al. 2024, arXiv 2403.12350)
            takes sigma times the running mean of the first pass's gradients off the first pass's gradient. gsam (Zhuang
            et al. 2022, arXiv 2203.08065) has SAM's eps, and takes alpha times the part of the first pass's gradient
            that is orthogonal to the second's off the update's gradient. bi_lora (arXiv 2508.19564), of LoRA alone,
            holds eps in a second adapter of the same rank: each update's one pass moves it up the loss while the
            trained adapter goes down, and it is cut back to length rho, measured in the weight; its authors take 0.05.
            It is never saved as a model.
        reuse: updates that share one direction: it is renewed by a first pass every so many updates (LookSAM's
            interval, Liu et al. 2022, arXiv 2203.02714), and the others make the second pass alone: 1 + 1/reuse passes
            an update instead of 2. Without a first pass, pictures are observed and perturbed at theta + eps. Keeps one
            copy of the gradient.
        decay: of the running means of momentum and friendly, which keep one (fp32).
        sigma: of friendly.
        alpha: of gsam, which keeps the first pass's gradient during the second.
        auxiliary_lr: of bi_lora, the second adapter's learning rate; null takes the optimizer's, as its authors do.
        space: factor perturbs LoRA's factors A and B by their own gradient; full perturbs the weight W + s B A that
            they make: rho is then the norm of the change of W, and the direction is the steepest among all changes
            within A's rows, which a change of B alone makes: exact, linear and of no more rank. (What a change of A
            would add goes through B, which starts at 0.) Costs a product with an r x r inverse a layer. transferred is
            FMLoRA's (EFlat-LoRA, arXiv 2508.00522): W's gradient is estimated from both factors', as the mean of what
            each of them knows, and the perturbation of length rho along it is carried over to B, which holds the part
            of it within A's rows; A stays.
    """

    rho: float = Field(default=1e-2, gt=0, le=1e6)
    adaptive: bool = False
    groups: tuple[ParameterGroup, ...] = ()
    direction: Literal["gradient", "momentum", "friendly", "gsam", "bi_lora"] = "gradient"
    reuse: int = Field(default=1, ge=1, le=10_000)
    decay: float = Field(default=0.9, ge=0, lt=1)
    sigma: float = Field(default=1.0, gt=0, le=1e6)
    alpha: float = Field(default=0.1, gt=0, le=1e6)
    auxiliary_lr: float | None = Field(default=None, gt=0, le=100)
    space: Literal["factor", "full", "transferred"] = "factor"

    @model_validator(mode="after")
    def _agree(self) -> ParameterSmoothing:
        owners = {"decay": ("momentum", "friendly"), "sigma": ("friendly",), "alpha": ("gsam",)}
        owners["auxiliary_lr"] = ("bi_lora",)
        for key, directions in owners.items():
            if self.direction not in directions and getattr(self, key) != type(self).model_fields[key].default:
                owner = " or ".join(directions)
                raise ValueError(f"{key} is of direction {owner}, not of {self.direction}; leave it out")
        if self.reuse > 1 and self.direction in ("momentum", "gsam", "bi_lora"):
            why = "needs the first pass each time" if self.direction == "gsam" else "has no first pass to save"
            raise ValueError(f"reuse is {self.reuse}, and direction {self.direction} {why}; leave reuse out")
        if self.space != "factor" and self.adaptive:
            raise ValueError(f"space {self.space} with adaptive: ASAM scales by the factors' elements; leave one out")
        if self.space == "transferred" and self.reuse > 1:
            raise ValueError(
                f"reuse is {self.reuse}, and space transferred measures each direction by both factors' gradients; "
                "leave reuse out, or take space full"
            )
        if self.direction == "bi_lora" and (self.adaptive or self.groups or self.space != "factor"):
            raise ValueError(
                "direction bi_lora with adaptive, groups or space: its perturbation is an adapter's, measured in the "
                "weight; leave them out"
            )
        return self


class Smoothing(Settings):
    """Choice of balls, and of the answers to questions that the paper leaves open.

    Attributes:
        image, parameters: null turns one off; both off is the plain method.
        resample: "full" samples the whole trajectory again at theta + eps, as eq. 19 literally says; "graded_only"
            takes the calls before the first graded one from the first pass: cheaper, and the same parameter gradient
            path, but its latents do not see eps.
        delta_from: "first" perturbs the second pass's picture by the delta of the first (the order of Algorithm 1;
            one forward and backward gives both delta and eps); "perturbed" computes delta at the second picture, for
            one reward forward and backward more.
        radius_search: how image.radius auto is found; null takes what its keys say by themselves.
        ascend: eps follows the gradient of the mean "reward", or of the "loss". They differ where a hinge is
            saturated: there the loss has no gradient and the reward still has.
    """

    image: ImageSmoothing | None = ImageSmoothing()
    parameters: ParameterSmoothing | None = ParameterSmoothing()
    resample: Literal["full", "graded_only"] = "full"
    delta_from: Literal["first", "perturbed"] = "first"
    ascend: Literal["reward", "loss"] = "reward"
    radius_search: RadiusSearch | None = None

    @property
    def smallest_ball(self) -> ImageSmoothing | None:
        """The ball around the picture, with the smallest radius that may be found: rounding drowns that one first."""
        if self.image is None or not isinstance(self.image.radius, str):
            return self.image
        return self.image.of_radius((self.radius_search or RadiusSearch()).radii[0])
