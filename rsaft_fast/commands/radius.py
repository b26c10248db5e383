"""`rsaft-fast radius`: which image radius to smooth with, and whether to smooth at all."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rsaft_fast.algorithms.reward_gradient import RewardGradient
from rsaft_fast.commands.output import output_folder
from rsaft_fast.commands.reward_options import parse_judges
from rsaft_fast.commands.sample import saved_weights, take_weights
from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.agreement import FixedSet, measure
from rsaft_fast.evaluation.radius import RadiusReport, balls_of, draw_curve, find_radius
from rsaft_fast.files import write_atomically
from rsaft_fast.methods import GradientMethod, a_gradient_method
from rsaft_fast.out_of_memory import oom_as_user_error
from rsaft_fast.progress import tell, watched
from rsaft_fast.recipe.agreement import AgreementSettings
from rsaft_fast.recipe.check import check_keys, check_machine, check_model
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import load_config
from rsaft_fast.smoothing.search import LEAST_FIXED, MOST_FIXED, RadiusSearch
from rsaft_fast.smoothing.settings import ImageSmoothing
from rsaft_fast.train.assemble import Assembly, assemble
from rsaft_fast.train.inputs import Inputs
from rsaft_fast.train.loaders import FileLoaders

RESULT, CURVE = "radius.json", "radius.png"


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast radius`."""
    given = load_config(arguments.recipe, arguments.overrides)
    config, ball, search = _settle(given, arguments)
    plan = check_keys(config)
    check_machine(config)
    check_model(config, plan)
    for settings in (config.reward, *config.judges.values()):
        settings.check_files()
    weights = saved_weights(Path(arguments.checkpoint), option="--checkpoint") if arguments.checkpoint else None
    prompts = load_prompts(config.data.prompts, config.data.column)
    with output_folder(arguments.output, "radius") as output:
        started = time.monotonic()
        stage = lambda what: tell(f"[{time.monotonic() - started:4.0f} s] {what}")  # noqa: E731
        inputs = Inputs(prompts=prompts, sample_prompts=[], images=[], checkpoint=None, notes=[])
        made = assemble(config, inputs, FileLoaders(config, tell, stage), log=tell)
        if weights is not None:
            take_weights(made.backbone, *weights, given.backbone.path)
        report = _find(made, ball, search)
        return _tell(report, config, ball, search, output, time.monotonic() - started)


def _settle(config: Config, arguments: argparse.Namespace) -> tuple[Config, ImageSmoothing, RadiusSearch]:
    """The recipe as a measurement of its own, the ball without its radius, and what is tried.

    Raises:
        UserError: no judge, a method without reward gradient, or options out of their limits.
    """
    if not isinstance(config.method, GradientMethod):
        raise UserError(
            f"method.name is {config.method.name}, which follows no reward gradient; radius compares those of "
            f"{a_gradient_method()}"
        )
    judges = parse_judges(arguments.judges) if arguments.judges is not None else config.judges
    if not judges:
        raise UserError(
            "radius needs judges, rewards that are not trained on: --judges NAME=PATH ..., or agreement.judges in the "
            "recipe"
        )
    ball = config.smoothing.image or ImageSmoothing()
    search = config.smoothing.radius_search or RadiusSearch()
    pictures = search.pictures if arguments.pictures is None else arguments.pictures
    if not LEAST_FIXED <= pictures <= MOST_FIXED:
        raise UserError(f"--pictures is {pictures}; it must be from {LEAST_FIXED} to {MOST_FIXED}")
    chosen = search.model_copy(
        update={
            "judges": {},
            "radii": arguments.radii or search.radii,
            "pictures": pictures,
            "space": arguments.gradients or search.space,
        }
    )
    kind = ImageSmoothing(radius=1.0, norm=arguments.norm or ball.norm, space=arguments.space or ball.space)
    smoothing = config.smoothing.model_copy(update={"image": kind, "radius_search": None})
    measured = config.model_copy(
        update={
            "agreement": AgreementSettings(judges=judges, pictures=pictures),
            "smoothing": smoothing,
            "max_steps": 1,
            "denoising": None,
            "optimizer": config.optimizer.model_copy(update={"release_gradients": False, "warmup_steps": 0}),
        }
    )
    return measured, kind, chosen


def _find(made: Assembly, ball: ImageSmoothing, search: RadiusSearch) -> RadiusReport:
    config, algorithm = made.config, made.algorithm
    assert isinstance(algorithm, RewardGradient)
    samples = FixedSet(algorithm, made.encoded, made.fixed, config.seed, config.data.batch_size)
    with oom_as_user_error("comparing gradients"):
        found = measure(
            algorithm,
            made.judges,
            samples,
            balls_of(ball, search.radii),
            search.space,
            watch=lambda batches: watched(batches, "comparing gradients", len(batches), "batch"),
        )
    return find_radius(found)


def _tell(
    report: RadiusReport, config: Config, ball: ImageSmoothing, search: RadiusSearch, output: Path, seconds: float
) -> int:
    for warning in report.warnings:
        print(f"rsaft-fast: warning: {warning}", file=sys.stderr)
    what = {"parameter": "the trained weights", "latent": "the latent", "image": "the pixels"}[search.space]
    print(
        f"cosine of the gradient of {config.reward.shown}, smoothed in {ball.space} ({ball.norm}), with each judge's: "
        f"gradients of {what}, {report.pictures} pictures, +- one standard error\n"
    )
    for line in report.lines():
        print(line)
    content = report.as_dict() | {
        "reward": config.reward.shown,
        "judge_rewards": {name: judge.model_dump(mode="json") for name, judge in config.judges.items()},
        "norm": ball.norm,
        "ball_space": ball.space,
        "gradients": search.space,
        "method": config.method.model_dump(mode="json"),
        "seed": config.seed,
        "seconds": round(seconds, 1),
    }
    write_atomically(output / RESULT, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    curve = draw_curve(
        output / CURVE,
        report,
        f"Agreement of {config.reward.shown} with held-out rewards",
        f"radius ({ball.norm}, {ball.space})",
    )
    print(f"rsaft-fast: {curve} and {output / RESULT} ({seconds:.0f} s)")
    return 0
