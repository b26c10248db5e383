"""Settings of a build: every number that the shipped assets depend on."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Vae:
    """Settings of the autoencoder and its training."""

    seed: int = 10
    steps: int = 2500
    batch: int = 32
    lr: float = 2e-3
    latent_channels: int = 4
    channels: tuple[int, ...] = (16, 32)  # two levels: latents are 16 x 16
    kl_weight: float = 1e-4
    edge_weight: float = 0.5  # on the error of finite differences: edges stay sharp


@dataclass(frozen=True)
class Text:
    """Settings of each of the two CLIP text encoders, and T5's length."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    length: int = 16  # tokens; the longest prompt has 12
    t5_length: int = 12  # of the T5 encoder in the third place, whose embeddings are all zero


@dataclass(frozen=True)
class Denoiser:
    """Settings of the denoiser and one phase of its training."""

    seed: int = 20
    steps: int = 4000
    batch: int = 48
    matrix_lr: float = 0.02  # Muon's, for the matrices between layers
    lr: float = 1.5e-3  # AdamW's, for the rest
    warmup: int = 50
    ema: float = 0.998
    width: int = 160
    layers: int = 4
    heads: int = 4
    pool: int = 65536  # scenes encoded once
    uncond: float = 0.1  # share of samples with the empty prompt
    # The number of T5's zero embeddings varies: at most null_tokens, now and then diffusers' default.
    null_tokens: int = 12
    long_null_tokens: int = 256
    long_every: int = 20
    # Noise levels trained on: none below what a sampler asks for, more of the high ones, where the layout is decided.
    sigma_low: float = 0.08
    sigma_shift: float = 1.3
    references: int = 0  # further scenes of the prompt, over which the target is a posterior mean
    # Euler steps end at this sigma, then at 0: what a reward gradient through the last step alone can move.
    last_sigma: float = 0.1
    # Weight w of the model's own guidance, prediction − unconditional prediction, in its target. The fixed point is
    # classifier-free guidance at the scale 1 / (1 − w), without a second branch when sampling (arXiv 2502.12154).
    guidance: float = 0.0


@dataclass(frozen=True)
class Defect:
    """Settings of the training images' visible fault, lost contrast, which a reward can repair."""

    share: float = 0.75
    contrast: tuple[float, float] = (0.45, 0.75)
    grey: float = 0.5


@dataclass(frozen=True)
class Pairs:
    """Settings of the pairs that the proxies learn from."""

    seed: int = 40
    train: int = 1024
    held_out: int = 512
    match: int = 300  # samples of the pipeline, at which ∇r* is matched
    steps: tuple[int, ...] = (10, 4)  # Euler steps of the generators, good and poor


@dataclass(frozen=True)
class Proxy:
    """Settings of one proxy reward: a small CLIP model trained on pairs, and on ∇r* where `match` > 0."""

    seed: int = 30
    steps: int = 400
    batch: int = 32  # pairs
    lr: float = 1e-3
    weight_decay: float = 0.05
    width: int = 96
    heads: int = 4
    layers: int = 3
    text_layers: int = 2
    patch: int = 8
    mixed_quality: bool = True  # learns from spoilt renders and samples too, not from exact renders alone
    sharpness: float = 20.0  # preference = sigmoid(sharpness · difference of r*)
    match: float = 1.0  # weight of 1 − cos(∇ proxy, ∇ r*)
    match_batch: int = 16


@dataclass(frozen=True)
class FineTune:
    """Settings of DRaFT-1 fine-tuning: ascent on the mean reward with AdamW on all parameters of the denoiser."""

    lr: float = 5e-5
    steps: int = 60
    batch: int = 8
    sampler_steps: int = 10
    image_radius: float = 0.0  # L2 norm of each image's perturbation, pixels in [0, 1]; 0: none
    rho: float = 0.0  # L2 norm of the parameters' perturbation; 0: none
    seed: int = 0
    eval_every: int = 10
    s1_radius: float = 1.0


@dataclass(frozen=True)
class Admission:
    """Limits from which a proxy counts as fair."""

    least_cosine: float = 0.3
    gradient_prompts: int = 64
    gradient_seed: int = 50
    seeds: tuple[int, ...] = (0, 1, 2)
    plain: FineTune = field(default_factory=FineTune)
    # Variants measured beside the plain run on the fair proxy: (image radius, rho).
    smoothed: tuple[tuple[float, float], ...] = ((1.0, 0.0), (0.0, 0.05), (1.0, 0.05))


@dataclass(frozen=True)
class Settings:
    """Settings of all stages."""

    vae: Vae = field(default_factory=Vae)
    text: Text = field(default_factory=Text)
    denoiser: Denoiser = field(default_factory=Denoiser)
    layout: Denoiser = field(
        default_factory=lambda: Denoiser(seed=22, matrix_lr=0.015, lr=1.2e-3, sigma_shift=2.5, references=8)
    )
    guidance: Denoiser = field(
        default_factory=lambda: Denoiser(
            seed=21, steps=2000, matrix_lr=0.01, lr=7.5e-4, sigma_shift=2.0, references=8, guidance=0.6
        )
    )
    defect: Defect = field(default_factory=Defect)
    pairs: Pairs = field(default_factory=Pairs)
    fair: Proxy = field(default_factory=Proxy)
    brittle: Proxy = field(default_factory=lambda: Proxy(seed=31, match=0.0, mixed_quality=False))
    admission: Admission = field(default_factory=Admission)
    # Sums depend on the number of threads, so it is part of what makes two builds alike.
    threads: dict[str, int] = field(
        default_factory=lambda: dict(vae=2, denoiser=1, layout=1, guidance=1, proxies=1, admission=1)
    )
