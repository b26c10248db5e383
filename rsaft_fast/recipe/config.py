"""Every key of a recipe. The descriptions below are what `rsaft-fast train --help-config` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rsaft_fast.backbones.lora import LoRASettings
from rsaft_fast.backbones.quantized import Quantization
from rsaft_fast.dtypes import Dtype
from rsaft_fast.methods import AnyMethod
from rsaft_fast.methods.losses import Loss
from rsaft_fast.recipe.agreement import AgreementSettings
from rsaft_fast.recipe.evaluation import EvaluationSettings
from rsaft_fast.rewards import RewardSettings
from rsaft_fast.settings import Settings, UserPath, UserPlace
from rsaft_fast.smoothing.search import AUTO, RadiusSearch
from rsaft_fast.smoothing.settings import ImageSmoothing, Smoothing
from rsaft_fast.speed.settings import SpeedSettings

PLAYGROUND = "playground"
MOST_PICTURES = 2**16
"""Of an update: more is a typing error, and would be told by the machine's memory, slowly."""

LONGEST_SIDE = 2**14
"""Pixels; a picture of so many on each side has 3 GiB in fp32 before anything is computed."""


class BackboneSettings(Settings):
    """The diffusion model.

    Attributes:
        path: folder of a diffusers pipeline, a hub id, or "playground" for the tiny one that ships with the package;
            python:module:name for a model of your own, a subclass of rsaft_fast.sampling.protocol.Backbone.
        height: of the pictures, in pixels; null takes the size that the pipeline was made for.
        width: of the pictures, in pixels; null takes the size that the pipeline was made for.
        dtype: what the networks compute in. Latents, LoRA weights and the optimizer's masters stay in fp32.
        device: auto takes the GPU where there is one, else the CPU; or a torch device such as cuda:1.
        checkpoint: which networks recompute their activations in the backward pass: 36 to 78 % more time for the
            memory that decides whether a real model fits. The VAE decoder, not the reward, is the peak. decoder
            recomputes resnet by resnet, to the same bits: 4.9 GiB a picture of 1024x1024 in bf16. decoder-strips
            works in strips of rows, one picture of the batch at a time, to the same gradient but for rounding: 1.4 GiB
            whatever the batch, for 1.4 times the arithmetic of decoder (1.8 times for all pictures of a batch but one).
        keep_blocks: how many of the denoiser's blocks, counted from the last one, keep their activations although
            checkpoint has denoiser: the steps between checkpoint [denoiser] (0) and none. Each saves the time of its
            own recomputation. The first is free, for it would be recomputed beside nothing else; a further one costs
            about 0.06 GiB a picture of SDXL's 86, 0.27 of SD3.5-M's 24, 0.35 of FLUX.1's 57 (1024x1024, bf16, LoRA),
            0.015 of SD1.5's 37 (512x512).
        offload_blocks: how many of the denoiser's transformer blocks (of FLUX.1's 57, SD3's 24, SDXL's 70) keep their
            weights in pinned host memory and are copied to the device just before each use: saves all of them but
            two, costs their bytes over PCIe at every network call and again in its backward pass (FLUX.1 in bf16:
            0.4 GiB a block), hidden as far as computing takes longer. For LoRA, with checkpoint [denoiser].
        quantize: of the frozen base under LoRA, the linear layers of the denoiser's blocks: nf4 keeps a weight in 4.13
            bits (needs bitsandbytes), int8 and fp8 (e4m3) in 8. SDXL's UNet then takes 1.8 GiB with nf4 and 2.8 with
            the others instead of 4.8 in bf16, FLUX.1's transformer 5.8 and 11.2 instead of 22.2. Costs the time to
            make each layer's weight whole in every pass, and the model trained is the rounded one: weights are off by
            9 % (nf4), 2.6 % (fp8) or 0.9 % (int8) of their root mean square. null keeps all of it in dtype.
    """

    path: UserPlace
    height: int | None = Field(default=None, ge=1, le=LONGEST_SIDE)
    width: int | None = Field(default=None, ge=1, le=LONGEST_SIDE)
    dtype: Dtype = "fp32"
    device: str = "auto"
    checkpoint: tuple[Literal["denoiser", "decoder", "decoder-strips"], ...] = ()
    keep_blocks: int = Field(default=0, ge=0)
    offload_blocks: int = Field(default=0, ge=0)
    quantize: Quantization | None = None


class ParameterSettings(Settings):
    """What is trained.

    Attributes:
        train: lora trains low-rank adapters in fp32 on a frozen base; full trains the whole denoiser.
        lora: of the adapters; unused by full.
    """

    train: Literal["lora", "full"] = "lora"
    lora: LoRASettings = LoRASettings()


class SamplerSettings(Settings):
    """How pictures are sampled, in training and in the sample grids.

    Attributes:
        steps: network calls of one picture. The paper takes 50 for SD1.5 and SDXL, 28 for SD3.
        eta: DDIM's ancestral noise, 0 (deterministic) to 1; flow models take 0.
        guidance_scale: w in f = f_u + w (f_c - f_u); 1 samples without guidance at half the cost. FLUX.1-dev has an
            embedding for it instead, which costs nothing; 3.5 is usual there, and 4 for FLUX.2-dev. What
            the pipelines of Z-Image and Krea-2 call guidance is w - 1. Distilled models (FLUX.2-klein without base)
            take 1.
        true_cfg_scale: w of FLUX.1 alone, on top of its embedded scale; 1, its usual setting, is without.
        negative_prompt: what guidance steers away from; empty is the model's own unconditional prompt.
    """

    steps: int = Field(default=50, ge=1, le=1000)
    eta: float = Field(default=0.0, ge=0.0, le=1.0)
    guidance_scale: float = Field(default=1.0, ge=0.0, le=1000.0)
    true_cfg_scale: float = Field(default=1.0, ge=0.0, le=1000.0)
    negative_prompt: str = ""


class DataSettings(Settings):
    """Prompts and batches. An update sees batch_size * accumulate pictures.

    Attributes:
        prompts: .txt file with one prompt a line, .csv, .tsv, .json, .jsonl or .parquet; a published set by name
            (drawbench, hpdv2, hpdv2-anime, -concept-art, -paintings, -photo, -400, partiprompts, geneval, geneval2,
            dpg-bench, unigenbench, ocr, pickapic) from the hub, or NAME=PATH where it lies here; or what ships with the
            package: "starter", 96 varied ones, "playground", the scenes of its pipeline, or "playground-counting",
            those of one or two objects. Each epoch is a new permutation of all of them, derived from the seed. Training
            on a set that results are reported on is said aloud.
        column: of a table or key of an object that holds the prompt; null finds prompt, text or caption.
        batch_size: pictures that go through the network together; of several GPUs each takes its share of the update's
            pictures, at most so many at a time.
        accumulate: micro-batches of one update; their gradients add up to that of the whole batch. The paper's batch
            is 32 pictures. batch_size * accumulate is the update's, on one GPU and on many.
        group_size: pictures of each prompt, which stay together: what a policy gradient compares. Flow-GRPO and GARDO
            take 24; with 12 or 6 Flow-GRPO's authors saw it collapse.
        prompts_per_iteration: prompts of one iteration, through all GPUs (48 in the papers); how many micro-batches
            that makes follows from group_size and batch_size, and accumulate stays 1. null: batch_size * accumulate
            pictures an iteration.
        group_noise: whether the pictures of a group start from different noise, or from the same one and differ by
            what the sampler draws on the way.
        plan_scope: batch draws the gradient plan (which calls carry gradient) once an update, as AlignProp does;
            micro-batch draws one for each, which averages over draws.
        encoding_cache: folder in which encodings of prompts are kept, for later runs too: when all are there, the text
            encoders are never loaded (T5-XXL of SD3 and FLUX.1 is 8.9 GiB). auto is rsaft_fast/encodings in the
            user's cache folder; null keeps them in memory, and encodes at every start. A prompt of SD1.5 or SDXL
            takes 0.1 or 0.3 MB there, of SD3 2.7, of FLUX.1 4.
    """

    prompts: UserPlace
    column: str | None = Field(default=None, min_length=1)
    batch_size: int = Field(default=4, ge=1, le=MOST_PICTURES)
    accumulate: int = Field(default=1, ge=1, le=MOST_PICTURES)
    group_size: int = Field(default=1, ge=1, le=MOST_PICTURES)
    prompts_per_iteration: int | None = Field(default=None, ge=1, le=MOST_PICTURES)
    group_noise: Literal["different", "same"] = "different"
    plan_scope: Literal["batch", "micro-batch"] = "batch"
    encoding_cache: UserPath | None = AUTO

    def groups(self) -> int:
        """Prompts of one iteration, of all ranks together."""
        if self.prompts_per_iteration is not None:
            return self.prompts_per_iteration
        return self.batch_size * self.accumulate // self.group_size


class OptimizerSettings(Settings):
    """AdamW, fused with the weight perturbation.

    Attributes:
        lr: learning rate. The paper takes 2e-5 for all methods.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second mean.
        weight_decay: decoupled, a step multiplies weights by 1 - lr * weight_decay.
        max_grad_norm: the update's gradient is clipped to this global L2 norm; null does not clip. The gradient that
            the perturbation follows is never clipped: only its direction counts.
        schedule: of the learning rate after the warm-up: constant, linear to 0, or half a cosine to 0, at max_steps.
        warmup_steps: updates over which the learning rate rises linearly.
        state_bits: of AdamW's two moments. 8 saves 6 bytes a parameter, for full fine-tuning; an error of at most 0.7 %
            of a block's largest value.
        stochastic_rounding: trained bf16 weights are rounded so that small changes arrive in expectation, without the
            fp32 master: saves 2 bytes a parameter (4 for the master less 2 for the backup), costs noise.
        backup: where the weights wait while they are perturbed, if they have no master: own keeps 2 bytes a bf16
            parameter for it, gradient takes the memory of the first pass's gradient (logging.diagnostics keeps a copy
            of that gradient, and then nothing is saved).
        release_gradients: the update runs inside the second backward pass and frees each gradient as it arrives: saves
            the second pass's gradients, 2 bytes a bf16 parameter. Clipping then uses the first pass's norm, and the
            second's is not logged. One backward pass an update: accumulate 1, one graded call, guidance off or uncond
            detached.
        offload: state keeps the moments, and fp32 masters where there are any, in pinned host memory and streams them
            through the device at each update, to the same bits: saves 8 bytes a parameter (2 with state_bits 8, 4 more
            with masters) but for staging buffers of 0.2 GiB, or three times the largest tensor's state. Costs those
            bytes over PCIe in both directions: SDXL's in 8 bits 0.1 to 0.2 s an update at 50 GB/s, FLUX.1's 0.5 to
            1 s. For full fine-tuning.
    """

    lr: float = Field(default=2e-5, gt=0, le=100)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0, le=1)
    weight_decay: float = Field(default=1e-4, ge=0, le=1000)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    state_bits: Literal[32, 8] = 32
    stochastic_rounding: bool = False
    backup: Literal["own", "gradient"] = "own"
    release_gradients: bool = False
    offload: Literal["none", "state"] = "none"


class EMASettings(Settings):
    """A running mean of the trained weights, used by the sample grids and the final export.

    Attributes:
        decay: weight of the past. After n updates it is at most (1 + n) / (10 + n), so that early weights fade.
    """

    decay: float = Field(default=0.995, ge=0, lt=1)


class SampleSettings(Settings):
    """Grids of fixed prompts at fixed noise: what the log's numbers look like.

    Attributes:
        every: updates between two grids; 0 makes none. One is made before the first update and one after the last.
        prompts: a file or set like data.prompts, or "playground" for its held-out ones; null takes the first of
            data.prompts. How many of them are trained on is said.
        count: pictures in a grid.
        seed: of their noise; null takes the run's seed.
    """

    every: int = Field(default=50, ge=0)
    prompts: UserPlace | None = None
    count: int = Field(default=8, ge=1, le=64)
    seed: int | None = Field(default=None, ge=0)


class DenoisingSettings(Settings):
    """The pre-training loss on pictures of your own, beside the reward (ReFL's paper alternates the two).

    Attributes:
        images: folder of pictures with captions, as <name>.txt beside each or in one metadata.jsonl
            (file_name, text), the layout of Hugging Face's imagefolder.
        weight: factor on the loss. Adam hides a factor that never changes; here it is relative to the reward's.
        batch_size: pictures of one denoising update.
        every: updates by reward between two denoising updates.
        drop_caption: share of pictures seen without their caption, which keeps guidance working.
        levels: number of noise levels, spread over the schedule as the sampler spreads its steps.
    """

    images: UserPath
    weight: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=4, ge=1, le=MOST_PICTURES)
    every: int = Field(default=1, ge=1)
    drop_caption: float = Field(default=0.1, ge=0, le=1)
    levels: int = Field(default=250, ge=1, le=1000)


class RegularizeSettings(Settings):
    """What holds the trained model near the one that it began as, beside the reward.

    Attributes:
        kl_to_base: weight of the mean squared difference between the graded calls' predictions and those that the
            model made before any training, at the same latents: up to a factor of each step, the Kullback-Leibler
            divergence of the sampler's steps. Costs, for each graded call, one more forward and backward pass and a
            forward pass of the base, and a copy of what is trained.
    """

    kl_to_base: float = Field(gt=0, le=1e6)


Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"]
"""What accelerate.tracking speaks to."""


class LogSettings(Settings):
    """metrics.jsonl is always written.

    Attributes:
        tensorboard: write event files, with the sample grids, under <output_dir>/tensorboard.
        trackers: where figures and sample grids go beside that, through accelerate.tracking: a list of tensorboard,
            wandb, trackio, comet_ml, aim, mlflow, clearml, dvclive and swanlab. Each needs its package, and most an
            account, which their own variables name (WANDB_MODE=offline writes to the disk alone). Their project is
            called rsaft_fast.
        diagnostics: log every figure that the optimizer reports, not only the norms, and how far the second pass's
            gradient turned from the first's: one more copy of the gradient, which only full fine-tuning feels.
    """

    tensorboard: bool = True
    trackers: tuple[Tracker, ...] = ()
    diagnostics: bool = True


class DistributedSettings(Settings):
    """Several processes, one a GPU, that make the same run together: `torchrun --nproc-per-node 8 -m rsaft_fast train`.

    Everything else in a recipe means the same on one GPU and on many, and nothing here changes what is computed.

    Attributes:
        strategy: replicate keeps all weights on every GPU and sums gradients. shard keeps a part of the trained
            denoiser on each, with its gradients and the optimizer's state, and gathers a block's weights when they are
            computed with (FSDP2). auto replicates with LoRA, and shards where all parameters are trained.
        reward: own gives every GPU the frozen rewards whole: the trained one, held-out ones and judges, and the network
            of features that diversity is measured in. shared keeps a part of them on each, and gathers a block's
            weights when one of them computes with it: a reward of 15 GiB takes 2 on each of 8. Scores and gradients
            are the same bits. A reward without such blocks (remote, ocr, counting, geneval, most of one's own) stays
            whole, and a line says so.
        timeout: seconds that a process waits for another, at a sum or while models load, before it counts as gone.
    """

    strategy: Literal["auto", "replicate", "shard"] = "auto"
    reward: Literal["own", "shared"] = "own"
    timeout: float = Field(default=1800.0, ge=1, le=10**6)


def _unsmoothed(value: Any) -> Any:
    return {"image": None, "parameters": None} if value is None else value


class Config(Settings):
    """A recipe.

    Attributes:
        seed: noise, gradient plans, prompt order and LoRA initialisation come from it and from nothing else.
        output_dir: the run folder: metrics.jsonl, config.yaml, samples/, tensorboard/, checkpoints/, and in the end
            lora/ (or the whole denoiser).
        max_steps: updates in all, those before a resume included.
        resume: null starts a new run; auto goes on from output_dir's newest complete checkpoint, or starts; a run
            folder goes on from that one, in place unless output_dir on the command line names another.
        checkpoint_every: updates between two checkpoints; one is always written at the end and on SIGTERM or Ctrl-C.
        keep_checkpoints: how many of the newest stay; null keeps all.
        backbone: the diffusion model.
        speed: what makes an update faster.
        parameters: what is trained.
        sampler: how pictures are sampled.
        method: which calls of the sampler carry the reward's gradient, a policy gradient, or an algorithm of your own.
        loss: from reward to loss; null takes what the method's authors train with.
        smoothing: RSA-FT's two balls; null is the plain method.
        sharpness: the ball at which the sharpness S1 is logged, in a pixel space; null does not log it.
        agreement: rewards that are not trained on, whose gradients the update's is compared with: a monitor of reward
            hacking, and its controls; null has none.
        evaluation: what is measured on fixed held-out pictures while the run trains, into evaluations.jsonl, with
            held-out rewards and alarms; null measures nothing.
        reward: what is maximised.
        data: prompts and batches.
        optimizer: AdamW's learning rate, decay and clipping.
        ema: running mean of the weights; null keeps none.
        samples: grids of fixed prompts.
        denoising: the pre-training loss on pictures of your own; null trains by reward alone.
        regularize: what holds the model near the one that it began as; null leaves it free.
        logging: what is logged beside metrics.jsonl.
        report: whether the finished run is shown in one page, <output_dir>/report.html.
        distributed: how several GPUs share the run.
    """

    seed: int = Field(default=0, ge=0, lt=2**63)
    output_dir: UserPath
    max_steps: int = Field(ge=1, le=2**32 - 2)
    resume: UserPath | None = None
    checkpoint_every: int = Field(default=50, ge=1)
    keep_checkpoints: int | None = Field(default=2, ge=1)
    backbone: BackboneSettings
    speed: SpeedSettings = SpeedSettings()
    parameters: ParameterSettings = ParameterSettings()
    sampler: SamplerSettings = SamplerSettings()
    method: AnyMethod
    loss: Loss | None = None
    smoothing: Annotated[Smoothing, BeforeValidator(_unsmoothed)] = Smoothing()
    sharpness: ImageSmoothing | None = ImageSmoothing()
    agreement: AgreementSettings | None = None
    evaluation: EvaluationSettings | None = None
    reward: RewardSettings
    data: DataSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    ema: EMASettings | None = None
    samples: SampleSettings = SampleSettings()
    denoising: DenoisingSettings | None = None
    regularize: RegularizeSettings | None = None
    logging: LogSettings = LogSettings()
    report: bool = True
    distributed: DistributedSettings = DistributedSettings()

    def shards(self, processes: int) -> bool:
        """Whether the trained weights are parted among so many processes."""
        strategy = self.distributed.strategy
        full = strategy == "auto" and self.parameters.train == "full"
        return processes > 1 and (strategy == "shard" or full)

    def shares_rewards(self, processes: int) -> bool:
        """Whether frozen rewards are parted among so many processes."""
        return processes > 1 and self.distributed.reward == "shared"

    @property
    def training_loss(self) -> Loss:
        return self.loss or self.method.default_loss

    @property
    def pictures_per_update(self) -> int:
        return self.pictures_per_iteration // self.method.updates_per_iteration

    @property
    def pictures_per_iteration(self) -> int:
        return self.data.groups() * self.data.group_size

    @property
    def judges(self) -> dict[str, RewardSettings]:
        """Every reward whose gradient the trained one's is compared with, by its name."""
        search = self.smoothing.radius_search
        return {**(self.agreement.judges if self.agreement else {}), **(search.judges if search else {})}

    @property
    def held_out(self) -> dict[str, RewardSettings]:
        """Every reward that is loaded without being trained on, by its name."""
        return {**(self.evaluation.rewards if self.evaluation else {}), **self.judges}

    @property
    def fixed_pictures(self) -> int:
        """How many fixed pictures gradients are compared on: the most that a measurement takes, 0 without any."""
        image, agreement = self.smoothing.image, self.agreement
        search = self.smoothing.radius_search or RadiusSearch()
        searched = search.pictures if image is not None and image.radius == AUTO else 0
        watched = agreement.pictures if agreement is not None and agreement.pictures_of == "fixed" else 0
        return max(searched, watched)

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir)
