"""Admission of a proxy reward as fair: its gradient agrees with r*, and fine-tuning on it helps before it harms."""

import statistics
from dataclasses import asdict, replace
from pathlib import Path

from rsaft_fast.playground import train_prompts
from rsaft_fast.playground.build.denoiser import load
from rsaft_fast.playground.build.finetune import finetune, gradient_cosine
from rsaft_fast.playground.build.generator import Sampler
from rsaft_fast.playground.build.reward import ClipReward
from rsaft_fast.playground.build.settings import FineTune, Settings

STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 % quantile, by number of seeds

Curve = list[dict[str, float]]


def generators(settings: Settings, assets: Path) -> list[Sampler]:
    """Give the shipped pipeline at the step counts that the pairs are drawn from."""
    pipeline = load(assets / "pipeline")
    return [Sampler(pipeline, steps) for steps in settings.pairs.steps]


def judge(settings: Settings, assets: Path) -> dict[str, object]:
    """Measure gradient cosine, plain curves over the seeds and the verdict for both proxies.

    Smoothed runs for the fair one.
    """
    own = settings.admission
    generator = Sampler(load(assets / "pipeline"), own.plain.sampler_steps)
    verdicts = {}
    for name in ("fair", "brittle"):
        reward = ClipReward.load(assets / "rewards" / name)
        prompts = train_prompts()[: own.gradient_prompts]
        cosine = gradient_cosine(generator, reward, prompts, own.gradient_seed)
        curves = _curves(generator, reward, own.plain, own.seeds)
        shape = rise_and_fall(curves)
        admitted = cosine >= own.least_cosine and shape["rises"] and shape["falls"]
        verdicts[name] = {"gradient_cosine": round(cosine, 4), "admitted": admitted, "plain": shape, "curves": curves}
    fair = ClipReward.load(assets / "rewards" / "fair")
    for radius, rho in own.smoothed:
        curves = _curves(generator, fair, replace(own.plain, image_radius=radius, rho=rho), own.seeds)
        verdicts["fair"][f"image_radius={radius} rho={rho}"] = rise_and_fall(curves) | {"curves": curves}
    return verdicts | {"settings": asdict(own)}


def _curves(generator: Sampler, reward: ClipReward, settings: FineTune, seeds: tuple[int, ...]) -> list[Curve]:
    return [finetune(generator, reward, replace(settings, seed=seed)) for seed in seeds]


def rise_and_fall(curves: list[Curve]) -> dict[str, object]:
    """Find start, peak and end of the mean r* curve.

    And whether rise and fall exceed their 95 % interval over seeds.
    """
    truth = [[row["truth"] for row in curve] for curve in curves]
    mean = [statistics.fmean(column) for column in zip(*truth)]
    top = max(range(len(mean)), key=mean.__getitem__)
    rise, rise_interval = _interval([curve[top] - curve[0] for curve in truth])
    fall, fall_interval = _interval([curve[top] - curve[-1] for curve in truth])
    return {
        "start": round(mean[0], 4),
        "peak": round(mean[top], 4),
        "peak_step": curves[0][top]["step"],
        "end": round(mean[-1], 4),
        "rise_interval": round(rise_interval, 4),
        "fall_interval": round(fall_interval, 4),
        "rises": rise > rise_interval,
        "falls": fall > fall_interval,
        "proxy": [round(statistics.fmean(curve[i]["proxy"] for curve in curves), 4) for i in (0, -1)],
        "s1": [round(statistics.fmean(curve[i]["s1"] for curve in curves), 4) for i in (0, -1)],
    }


def _interval(differences: list[float]) -> tuple[float, float]:
    """Compute the mean and the half-width of its 95 % interval."""
    n = len(differences)
    half = STUDENT_T[n] * statistics.stdev(differences) / n**0.5 if n > 1 else 0.0
    return statistics.fmean(differences), half
