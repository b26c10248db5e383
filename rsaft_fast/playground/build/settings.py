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
class Attack:
    """Settings of what finds a proxy's weaknesses between its rounds of training: pictures that it likes too much.

    Each of `pictures` samples of the pipeline is climbed by projected gradient ascent, and is drawn again by a pipeline
    that DRaFT-1 has fine-tuned on the proxy.
    """

    rounds: int = 4
    pictures: int = 128
    steps: int = 200  # of training, after each round
    climb_steps: int = 10
    radius: tuple[float, float] = (0.2, 3.0)  # of the ball that is climbed in, L2 over pixels in [0, 1]
    updates: int = 30
    lr: float = 1e-4  # of AdamW on all parameters of the denoiser
    batch: int = 8


@dataclass(frozen=True)
class Proxy:
    """Settings of one proxy reward: a small CLIP model trained on pairs of pictures that r* has compared.

    Its pairs are drawn from `seed`, so proxies of different seeds have no picture in common.
    """

    seed: int
    pairs: int = 1024
    mixed_quality: bool = True  # learns from spoilt renders and samples too, not from exact renders alone
    steps: int = 400
    batch: int = 32  # pairs
    lr: float = 1e-3
    weight_decay: float = 0.05
    width: int = 64
    heads: int = 4
    layers: int = 2
    text_layers: int = 1
    patch: int = 8
    sharpness: float = 20.0  # preference = sigmoid(sharpness · difference of r*)
    match: float = 0.0  # weight of 1 − cos(∇ proxy, ∇ r*)
    match_images: int = 300  # samples of the pipeline
    match_batch: int = 16
    attack: Attack | None = None


@dataclass(frozen=True)
class Examination:
    """Settings of what a proxy's card is measured on; no proxy has learned from any of it."""

    seed: int = 90
    pairs: int = 512  # of each kind
    pictures: int = 256  # samples of the pipeline for the evaluation prompts
    gradient_pictures: int = 64  # of the parameter gradient
    radii: tuple[float, ...] = (0.1, 0.3, 1.0)  # of S1, L2 over pixels in [0, 1]


def _proxies() -> dict[str, Proxy]:
    return {
        "fair": Proxy(seed=30, match=1.0),
        "brittle": Proxy(seed=31, mixed_quality=False),
        "mixed": Proxy(seed=32),
        "mixed-long": Proxy(seed=33, pairs=2048, steps=1200),
        "adversarial": Proxy(seed=34, attack=Attack()),
        "ensemble-0": Proxy(seed=35),
        "ensemble-1": Proxy(seed=36),
        "ensemble-2": Proxy(seed=37),
    }


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
    # Euler steps of the samples among the pairs, good and poor; the first are those that fine-tuning takes.
    sampler_steps: tuple[int, ...] = (10, 4)
    proxies: dict[str, Proxy] = field(default_factory=_proxies)
    examination: Examination = field(default_factory=Examination)
    # Sums depend on the number of threads, so it is part of what makes two builds alike.
    threads: dict[str, int] = field(default_factory=lambda: dict(vae=2, denoiser=1, layout=1, guidance=1, proxies=1))
