"""`rsaft-fast demo`: plain reward fine-tuning and RSA-FT from the same start, judged by a preference that is known."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rsaft_fast import playground
from rsaft_fast.commands.output import output_folder
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.known_preference import TRUTH as R_STAR
from rsaft_fast.evaluation.known_preference import score_of, sharpness_of, truth_of
from rsaft_fast.figures.curves import Curve, Panel, comparison_figure
from rsaft_fast.figures.tables import summary_table
from rsaft_fast.files import write_atomically
from rsaft_fast.recipe.config import Config, SampleSettings
from rsaft_fast.recipe.load import find_recipe, load_config
from rsaft_fast.report.page import REPORT, report_of
from rsaft_fast.report.sources import ERROR, HELD_OUT, REWARD, S1, add_evaluations, read_run
from rsaft_fast.train.loop import train
from rsaft_fast.train.run import Outcome
from rsaft_fast.train.trainer import Trainer

RECIPE = "playground.yaml"
BEFORE, PLAIN, SMOOTHED = "before", "plain", "RSA-FT"
EVALUATIONS = 6  # along each run, beside the one before it
SHOWN = 6  # prompts in the figure
PROXY, TRUTH, SHARPNESS = QUANTITIES = ("proxy reward", "true preference r*", "sharpness S1")
NAMES = {PROXY: REWARD, TRUTH: f"{HELD_OUT}{R_STAR}", SHARPNESS: S1}
"""Names of the same in a run's evaluations."""

TITLES = {
    PROXY: ("Proxy reward", "what both runs climb"),
    TRUTH: ("True preference r*", "how well the picture is what its prompt says, 0 to 1"),
    SHARPNESS: ("Sharpness S1", "what the proxy loses at the worst nearby picture"),
}
"""Of the figure's panels: the name, and what it is."""

LEGEND = f"""\
{PROXY}: what training climbs, a small network's guess of what people would like.
{TRUTH}: how well a picture is what its prompt says, 0 to 1, computed from its shapes and colours. Only a
  toy world has it, and training never sees it. Reward hacking is the proxy rising while r* falls.
{SHARPNESS}: how much the proxy falls at the worst picture within {{radius:g}} ({{norm}} norm) of the one drawn. Where
  it is high, changes that hardly show move the reward: it can be climbed there without a better picture."""


@dataclass
class Measured:
    """One run's figures on the held-out prompts, at fixed noise.

    Attributes:
        steps: updates before each evaluation.
        scores: quantity to its values of every picture, (N,), at each evaluation.
        images: pictures of each evaluation, (N, 3, H, W); all but the first and last are dropped.
    """

    steps: list[int] = field(default_factory=list)
    scores: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    images: list[torch.Tensor] = field(default_factory=list)

    def evaluate(self, trainer: Trainer, images: torch.Tensor, step: int) -> None:
        """Score a sample grid's pictures."""
        prompts, ball = trainer.sample_prompts, trainer.config.sharpness
        self.scores[PROXY].append(score_of(trainer.reward, images, prompts))
        self.scores[TRUTH].append(truth_of(images, prompts)[R_STAR])
        self.scores[SHARPNESS].append(sharpness_of(trainer.reward, images, prompts, ball))
        self.steps.append(step)
        self.images = [*self.images[:1], images]

    def evaluations(self) -> dict[int, dict[str, float]]:
        """The same as a run's evaluations.jsonl has it: updates to means and their standard errors."""
        found: dict[int, dict[str, float]] = {}
        for index, step in enumerate(self.steps):
            found[step] = {}
            for name, key in NAMES.items():
                values = self.scores[name][index]
                found[step] |= {key: float(values.mean()), key + ERROR: float(values.std()) / len(values) ** 0.5}
        return found

    def curve(self, name: str) -> list[float]:
        """The mean over pictures at each evaluation."""
        return [float(values.mean()) for values in self.scores[name]]


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast demo`."""
    _require_assets(arguments.proxy)
    with output_folder(arguments.output, os.path.join("runs", "demo")) as output:
        return _compare(arguments, output)


def _compare(arguments: argparse.Namespace, output: Path) -> int:
    started = time.perf_counter()
    config = _config(arguments)
    pictures = len(playground.eval_prompts())
    print(
        f"{config.max_steps} updates of DRaFT-{config.method.k} on the {arguments.proxy} proxy, plain and with RSA-FT, "
        f"both from seed {config.seed}; judged on {pictures} prompts that neither trains on",
        flush=True,
    )
    runs: dict[str, Measured] = {}
    for label, smoothing in ((PLAIN, None), (SMOOTHED, config.smoothing)):
        runs[label], outcome = _train(config, label, smoothing, output / label.lower())
        if outcome.stopped_by is not None:
            print(f"rsaft-fast: {outcome.message}", file=sys.stderr)
            return outcome.exit_code
    changes = {
        label: {name: (measured.curve(name)[0], measured.curve(name)[-1]) for name in QUANTITIES}
        for label, measured in runs.items()
    }
    ball = config.sharpness
    print("\n" + LEGEND.format(radius=ball.number, norm=ball.norm.upper()) + "\n")
    print(summary_table(changes) + "\n")
    for line in _verdict(runs):
        print(line)
    _record(output / "comparison.json", config, runs)
    figure = _draw(output / "comparison.png", config, runs)
    page = _report(output / REPORT, config, runs)
    print(f"rsaft-fast: {figure} ({time.perf_counter() - started:.0f} s; the two runs are beside it)")
    print(f"rsaft-fast: all of it on one page, with a slider over the updates: {page}")
    return 0


def _require_assets(proxy: str) -> None:
    try:
        playground.pipeline_path()
        playground.reward_path(proxy)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def _config(arguments: argparse.Namespace) -> Config:
    """The playground's recipe; its sample grids are the evaluations, its only checkpoint the last."""
    overrides = [f"seed={arguments.seed}", f"reward.path=playground/{arguments.proxy}", "logging.tensorboard=false"]
    overrides.append(f"max_steps={arguments.steps}")
    config = load_config(find_recipe(RECIPE), overrides)
    grids = SampleSettings(
        every=max(1, config.max_steps // EVALUATIONS), prompts="playground", count=len(playground.eval_prompts())
    )
    return config.model_copy(update={"samples": grids, "checkpoint_every": config.max_steps})


def _train(config: Config, label: str, smoothing, folder: Path) -> tuple[Measured, Outcome]:
    smoothing = smoothing or config.smoothing.model_copy(update={"image": None, "parameters": None})
    measured = Measured()
    outcome = train(
        config.model_copy(update={"output_dir": str(folder), "smoothing": smoothing}),
        on_samples=measured.evaluate,
        title=label.ljust(len(SMOOTHED)),
    )
    return measured, outcome


def _verdict(runs: dict[str, Measured]) -> list[str]:
    """What was measured, in words; nothing here assumes an outcome."""
    lines = []
    for label, measured in runs.items():
        truth = measured.curve(TRUTH)
        peak = max(range(len(truth)), key=truth.__getitem__)
        lines.append(
            f"{label}: r* starts at {truth[0]:.4f}, is highest at {truth[peak]:.4f} after {measured.steps[peak]} "
            f"updates, ends at {truth[-1]:.4f}"
        )
    differences = {name: _difference(runs, name) for name in QUANTITIES}
    for name, (mean, half) in differences.items():
        lines.append(
            f"RSA-FT minus plain, {name}: {mean:+.4f} (95 % interval over the pictures of this one seed: +-{half:.4f})"
        )
    return [*lines, "", *_conclusion(runs, differences)]


def _difference(runs: dict[str, Measured], name: str) -> tuple[float, float]:
    """RSA-FT minus plain after the last update, and half the width of its 95 % interval.

    The same prompts and noise: pictures are compared one by one.
    """
    difference = runs[SMOOTHED].scores[name][-1] - runs[PLAIN].scores[name][-1]
    return float(difference.mean()), 1.96 * float(difference.std()) / len(difference) ** 0.5


def _conclusion(runs: dict[str, Measured], differences: dict[str, tuple[float, float]]) -> list[str]:
    """What follows from these two runs, whichever came out better."""
    lines = []
    for label, measured in runs.items():
        proxy, truth = measured.curve(PROXY), measured.curve(TRUTH)
        if proxy[-1] <= proxy[0]:
            words = "its proxy did not rise: it has not learned yet, or too large a step undid it"
        elif truth[-1] < truth[0]:
            words = "its proxy rose and the true preference ended below where it began: that is reward hacking"
        elif truth[-1] < max(truth):
            words = "its proxy rose, and the true preference ended above where it began, but below its best"
        else:
            words = "proxy and true preference both rose to the end: nothing was hacked so far"
        lines.append(f"{label}: {words}")
    mean, half = differences[TRUTH]
    if abs(mean) <= half:
        lines.append("true preference: no difference between the two that this many pictures show")
    else:
        words = "higher than plain" if mean > 0 else "lower than plain: it did not help here"
        lines.append(f"true preference: RSA-FT ends {words}")
    mean, half = differences[SHARPNESS]
    if abs(mean) <= half:
        lines.append("sharpness: no difference that this many pictures show")
    elif mean < 0:
        lines.append("sharpness: RSA-FT ends where the proxy is flatter, as it is meant to")
    else:
        lines.append("sharpness: RSA-FT ends where the proxy is sharper, which it is meant to avoid")
    lines.append("One seed of a toy world: --seed 1, --proxy fair and --steps show how far it holds.")
    return lines


def _record(path: Path, config: Config, runs: dict[str, Measured]) -> None:
    curves = {
        label: {"steps": measured.steps} | {name: measured.curve(name) for name in QUANTITIES}
        for label, measured in runs.items()
    }
    content = {"seed": config.seed, "reward": config.reward.path, "runs": curves}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _draw(path: Path, config: Config, runs: dict[str, Measured]) -> Path:
    prompts = playground.eval_prompts()[:SHOWN]
    columns = {BEFORE: runs[PLAIN].images[0][:SHOWN]}
    captions = {BEFORE: _captions(runs[PLAIN], 0)}
    for label, measured in runs.items():
        columns[label], captions[label] = measured.images[-1][:SHOWN], _captions(measured, -1)
    panels = [
        Panel(title, unit, {label: Curve(measured.steps, measured.curve(name)) for label, measured in runs.items()})
        for name, (title, unit) in TITLES.items()
    ]
    return comparison_figure(
        path,
        prompts,
        columns,
        panels,
        captions,
        title=f"Plain reward fine-tuning and RSA-FT on the {config.reward.path} proxy",
        subtitle=f"seed {config.seed}; curves: means over {len(runs[PLAIN].images[0])} held-out prompts, same noise",
    )


def _report(path: Path, config: Config, runs: dict[str, Measured]) -> Path:
    """Write the page of both runs; what only a toy world has, r*, goes with the runs' own evaluations."""
    for label, measured in runs.items():
        add_evaluations(path.parent / label.lower(), measured.evaluations())
    sources = [read_run(path.parent / label.lower(), label) for label in runs]
    title = f"Plain reward fine-tuning and RSA-FT on the {config.reward.path} proxy"
    write_atomically(path, report_of(sources, title, [line for line in _verdict(runs) if line]))
    return path


def _captions(measured: Measured, index: int) -> list[str]:
    return [f"r* {float(value):.3f}" for value in measured.scores[QUANTITIES[1]][index][:SHOWN]]
