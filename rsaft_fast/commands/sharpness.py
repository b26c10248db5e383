"""`rsaft-fast sharpness`: how sharp rewards are at pictures, by one step and by a search within the ball."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsaft_fast.commands.pictures import FIXED, Files, log, prompts_of, rewards_of_columns, scores_of, with_journal
from rsaft_fast.commands.score_journal import Journal, digest
from rsaft_fast.data.picture_lists import Picture, find_pictures
from rsaft_fast.data.pictures import read_picture
from rsaft_fast.errors import UserError
from rsaft_fast.figures.curves import Curve, Panel, curves_figure
from rsaft_fast.figures.tables import aligned
from rsaft_fast.files import refuse_io_errors, replace_file
from rsaft_fast.out_of_memory import is_out_of_memory
from rsaft_fast.progress import Counter
from rsaft_fast.recipe.check import check_device, check_path, pick_device
from rsaft_fast.recipe.config import BackboneSettings
from rsaft_fast.rewards import Reward, load_reward
from rsaft_fast.rewards.ensemble import win_rates
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.sharpness import searched_sharpness
from rsaft_fast.train.loaders import prepare_backbone

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ONE_STEP, SEARCH, SPREAD = "one step", "search", "spread of the reward"


@dataclass(frozen=True)
class Measured:
    """One reward at all pictures.

    Attributes:
        spec: what scored. scores: (N,) of the pictures themselves.
        one_step, search: radius to S1 of every picture, (N,).
    """

    spec: dict[str, Any]
    scores: list[float]
    one_step: dict[float, list[float]]
    search: dict[float, list[float]]

    def columns(self, label: str) -> dict[str, list[float]]:
        """The table's columns."""
        found = {label: self.scores}
        for radius in self.one_step:
            found[f"{label}/s1@{radius:g}"] = self.one_step[radius]
            found[f"{label}/s1_search@{radius:g}"] = self.search[radius]
        return found

    def summary(self) -> dict[str, Any]:
        """Means, quantiles, the gap between one step and the search, and S1 beside the reward's spread."""
        spread = _spread(self.scores)
        radii = []
        for radius, one_step in self.one_step.items():
            found = self.search[radius]
            gap = np.subtract(found, one_step)
            radii.append(
                {
                    "radius": radius,
                    "one_step": _figures(one_step),
                    "search": _figures(found),
                    "gap": {"mean": float(gap.mean()), "largest": float(gap.max())},
                    # What of the search's S1 one step finds; how S1 compares with what tells pictures apart.
                    "one_step_over_search": _ratio(np.mean(one_step), np.mean(found)),
                    "search_over_spread": _ratio(np.mean(found), spread),
                }
            )
        return {"spec": self.spec, "scores": _figures(self.scores), "radii": radii}


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast sharpness`."""
    check_device(arguments.device, "--device")
    settings = rewards_of_columns(arguments.reward)
    others = rewards_of_columns(arguments.with_reward, "--with-reward")
    radii = _radii(arguments.radius)
    _check_space(arguments)
    files = Files.of(arguments.output, None, figure=True)
    notes: list[str] = []
    pictures = find_pictures(arguments.pictures, notes.append)
    prompts = prompts_of(pictures, arguments.prompts, notes.append)
    device = pick_device(arguments.device)
    measured: dict[str, Measured] = {}
    beside: dict[str, list[float]] = {}

    def measure_and_write(journal: Journal) -> None:
        for note in notes:
            log(note)
        backbone = _backbone(arguments, pictures, device)
        for label, chosen in settings.items():
            reward = load_reward(chosen, device=device)
            key = [chosen.model_dump(), asdict(reward.spec)]
            measured[label] = _measure(
                reward, key, label, radii, pictures, prompts, arguments, journal, device, backbone
            )
        for label, chosen in others.items():
            beside[label] = _score(load_reward(chosen, device=device), label, pictures, prompts, device, arguments)
        _write(files, pictures, prompts, measured, beside, arguments)

    if code := with_journal(files, pictures, prompts, notes, measure_and_write):
        return code
    print(sharpness_table(measured))
    for line in correlation_lines(measured, beside):
        print(line)
    log(f"{len(pictures)} pictures in {files.output}; summary in {files.spec}; curves in {files.figure}")
    return 0


def _radii(given: Sequence[float]) -> list[float]:
    for radius in given:
        if not 0 < radius < math.inf:
            raise UserError(f"--radius {radius:g}: it must be positive and finite")
    return sorted(set(given))


def _check_space(arguments: argparse.Namespace) -> None:
    if (arguments.space == "latent") != (arguments.pipeline is not None):
        raise UserError(
            f"--space {arguments.space} with --pipeline {arguments.pipeline}: latents are those of a pipeline, which "
            "no other space needs; give both, or neither"
        )
    if arguments.pipeline is not None:
        check_path("--pipeline", arguments.pipeline)


def _backbone(arguments: argparse.Namespace, pictures: Sequence[Picture], device: torch.device) -> Backbone | None:
    if arguments.pipeline is None:
        return None
    sizes = {tuple(read_picture(picture.file).shape[2:]) for picture in pictures}
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:3])
        raise UserError(f"--space latent takes pictures of one size, and these have {shown}; make them one size")
    ((height, width),) = sizes
    return prepare_backbone(BackboneSettings(path=arguments.pipeline, height=height, width=width), device, text=False)


def _measure(
    reward: Reward,
    key: list[Any],
    label: str,
    radii: Sequence[float],
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    arguments: argparse.Namespace,
    journal: Journal,
    device: torch.device,
    backbone: Backbone | None,
) -> Measured:
    """`key`: what the reward is, by which the journal knows its figures."""
    ball = {name: getattr(arguments, name) for name in ("norm", "space", "steps", "restarts", "seed", "pipeline")}
    columns = {radius: (digest([*key, ball, radius]), "sharpness") for radius in radii}
    done = sum(len(journal.scores(column)) // 3 for column in columns.values())
    for note in reward.prompt_notes(prompts):
        log(note)
    with Counter(f"sharpness of {label}", len(pictures) * len(radii), "picture", done) as counter:
        for radius, column in columns.items():
            for first in range(len(journal.scores(column)) // 3, len(pictures), arguments.batch_size):
                part = slice(first, first + arguments.batch_size)
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always", UserWarning)
                    rows = _rows(reward, label, radius, pictures[part], prompts[part], arguments, device, backbone)
                if first == 0:
                    for warning in warned:
                        log(f"warning: {label}: {warning.message}")
                journal.add(column, [value for row in rows for value in row])
                counter.add(len(rows))
    found = {radius: np.reshape(journal.scores(column), (-1, 3)) for radius, column in columns.items()}
    scores = found[radii[0]][:, 0].tolist()
    one_step, search = ({radius: rows[:, i].tolist() for radius, rows in found.items()} for i in (1, 2))
    return Measured(asdict(reward.spec), scores, one_step, search)


def _rows(
    reward: Reward,
    label: str,
    radius: float,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    arguments: argparse.Namespace,
    device: torch.device,
    backbone: Backbone | None,
) -> list[tuple[float, float, float]]:
    """The reward, S1 by one step and S1 by the search of every picture; pictures of one size go together."""
    rows: list[tuple[float, float, float]] = []
    try:
        read = [read_picture(picture.file).to(device) for picture in pictures]
        for _, run_of in groupby(zip(pictures, read, prompts), key=lambda entry: entry[1].shape):
            same, images, texts = zip(*run_of)
            found = searched_sharpness(
                reward,
                torch.cat(images),
                texts,
                radius,
                arguments.norm,
                arguments.space,
                steps=arguments.steps,
                restarts=arguments.restarts,
                seed=arguments.seed,
                first=same[0].place,
                batch_size=len(same),
                backbone=backbone,
            )
            rows += zip(found.scores.tolist(), found.one_step.tolist(), found.search.tolist())
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory at {len(pictures)} pictures at a time with {label}; lower --batch-size"
        ) from error
    for picture, row in zip(pictures, rows):
        if not all(map(math.isfinite, row)):
            raise UserError(
                f"the gradient of reward {label} at {str(picture.file)!r} is not finite; leave the picture out, or "
                "take dtype=fp32"
            )
    return rows


def _score(
    reward: Reward,
    label: str,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    device: torch.device,
    arguments: argparse.Namespace,
) -> list[float]:
    scores: list[float] = []
    with Counter(f"scoring with {label}", len(pictures), "picture") as counter, torch.no_grad():
        for first in range(0, len(pictures), arguments.batch_size):
            part = slice(first, first + arguments.batch_size)
            read = [read_picture(picture.file).to(device) for picture in pictures[part]]
            scores += scores_of(reward, read, prompts[part])
            counter.add(len(read))
    return scores


def sharpness_table(measured: Mapping[str, Measured]) -> str:
    """Aligned plain text: a row for each reward and radius."""
    rows = [["reward", "radius", "S1 one step", "S1 search", "median", "90 % within", "found by one step", "S1/std"]]
    for label, own in measured.items():
        for entry in own.summary()["radii"]:
            search = entry["search"]
            rows.append(
                [
                    label,
                    f"{entry['radius']:g}",
                    f"{entry['one_step']['mean']:.4g}",
                    f"{search['mean']:.4g}",
                    f"{search['quantiles']['0.5']:.4g}",
                    f"{search['quantiles']['0.05']:.4g} to {search['quantiles']['0.95']:.4g}",
                    _shown(entry["one_step_over_search"], "{:.0%}"),
                    _shown(entry["search_over_spread"], "{:.3g}"),
                ]
            )
    legend = "(means over the pictures; S1/std: the search's S1 over the reward's standard deviation between pictures)"
    return "\n".join([*aligned(rows), legend])


def correlation_lines(measured: Mapping[str, Measured], beside: Mapping[str, Sequence[float]]) -> list[str]:
    """A line for each reward, radius and other reward: Spearman's correlation of S1 with that reward's scores."""
    return [
        f"rank correlation of S1 ({label}, radius {radius:g}, search) with {other}: {rank_correlation(s1, scores):+.3f}"
        for label, own in measured.items()
        for radius, s1 in own.search.items()
        for other, scores in beside.items()
    ]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation, ties sharing their ranks; NaN where one of the two does not vary."""
    ranks = win_rates(torch.tensor([list(first), list(second)], dtype=torch.float64))
    centred = ranks - ranks.mean(1, keepdim=True)
    lengths = centred.norm(dim=1)
    return float((centred[0] @ centred[1]) / (lengths[0] * lengths[1])) if (lengths > 0).all() else math.nan


def _write(
    files: Files,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    measured: Mapping[str, Measured],
    beside: Mapping[str, list[float]],
    arguments: argparse.Namespace,
) -> None:
    """Each file whole or not at all, the table last."""
    columns = {name: values for label, own in measured.items() for name, values in own.columns(label).items()}
    columns |= {f"with/{label}": scores for label, scores in beside.items()}
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow([*FIXED, *columns])
    for index, (picture, prompt) in enumerate(zip(pictures, prompts)):
        writer.writerow([picture.file, prompt, *(column[index] for column in columns.values())])
    names = ("norm", "space", "steps", "restarts", "seed", "pipeline")
    summary = {
        "pictures": len(pictures),
        "ball": {name: getattr(arguments, name) for name in names},
        "rewards": {label: own.summary() for label, own in measured.items()},
        "rank_correlations": [
            {"s1_of": label, "radius": radius, "with": other, "search": _number(rank_correlation(s1, scores))}
            for label, own in measured.items()
            for radius, s1 in own.search.items()
            for other, scores in beside.items()
        ],
    }
    if files.figure is not None:
        _draw(files.figure, measured, arguments)
    for path, content in (
        (files.spec, json.dumps(summary, indent=1, ensure_ascii=False, default=str) + "\n"),
        (files.output, table.getvalue()),
    ):
        with refuse_io_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content.encode("utf-8", "backslashreplace"))


def _draw(path: Path, measured: Mapping[str, Measured], arguments: argparse.Namespace) -> None:
    panels = []
    for label, own in measured.items():
        radii, spread = list(own.search), _spread(own.scores)
        curves = {
            name: Curve(radii, [float(np.mean(values)) for values in found.values()])
            for name, found in ((SEARCH, own.search), (ONE_STEP, own.one_step))
        }
        if spread > 0:
            curves[SPREAD] = Curve(radii, [spread] * len(radii))
        unit = f"mean S1 over {len(own.scores)} pictures; spread: the reward's standard deviation between them"
        panels.append(Panel(label, unit, curves))
    curves_figure(
        path,
        panels,
        axis=f"radius ({arguments.norm}, {arguments.space})",
        title="Sharpness S1 against the radius",
        subtitle=f"search: {arguments.steps} steps of projected gradient descent, {arguments.restarts} restarts",
        logarithmic=len(next(iter(measured.values())).search) > 1,
    )


def _figures(values: Sequence[float]) -> dict[str, Any]:
    quantiles = np.quantile(values, QUANTILES)
    return {
        "mean": float(np.mean(values)),
        "std": _spread(values),
        "quantiles": {f"{share:g}": float(value) for share, value in zip(QUANTILES, quantiles)},
    }


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _ratio(above: float, below: float) -> float | None:
    return float(above / below) if below > 0 else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
