"""One run of the experiment: the trainer as everybody has it, looked at on fixed pictures along the way."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from rsaft_fast import playground
from rsaft_fast.algorithms.copies import replaced
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.alarms import AGREEMENT, AGREEMENT_ERROR, IMAGE, drift_of, fall_of
from rsaft_fast.evaluation.image_statistics import image_statistics
from rsaft_fast.evaluation.known_preference import TRUTH, score_of, sharpness_of, truth_of
from rsaft_fast.experiments.counting import counting_values
from rsaft_fast.experiments.counting_table import FEATURES, CountingRow
from rsaft_fast.experiments.records import JUDGE, PROXY, S1, Evaluation, pipeline_hash, write_record
from rsaft_fast.experiments.row import Row, config_of
from rsaft_fast.files import remove_tree, replace_file
from rsaft_fast.recipe.evaluation import REWARD
from rsaft_fast.rewards import Reward, load_reward
from rsaft_fast.rewards.features import Features, load_features
from rsaft_fast.sampling.pictures import sample_images
from rsaft_fast.smoothing.settings import ImageSmoothing
from rsaft_fast.train.loaders import FileLoaders
from rsaft_fast.train.logging import read_metrics
from rsaft_fast.train.loop import train
from rsaft_fast.train.steering import RADIUS
from rsaft_fast.train.trainer import Trainer

RADII = (0.1, 0.3, 1.0)
"""At which the sharpness S1 of the proxy is measured, L2 in pixels of [0, 1]."""

NOISE_SEED = 2**20
"""Of the fixed pictures' noise; no run has it."""

_BATCH = 32
_AGREEMENTS = (AGREEMENT, AGREEMENT_ERROR)


class StoppedError(Exception):
    """A run was stopped by a signal before its end; it begins anew when it is asked for again."""


def run_row(row: Row, folder: Path, work: Path) -> Path:
    """Train and evaluate a row, and write its JSON file under `folder`; nothing of an unfinished run is kept.

    Args:
        work: a place for the run, which is deleted in the end, and for the start's pictures, which runs of one start
            share.

    Returns:
        the file.

    Raises:
        UserError: the row's recipe or a model cannot be used.
        StoppedError: a signal came.
    """
    started = time.perf_counter()
    observer = Observer(row, work / "starts")
    config = config_of(row, work / f"{row.set}-{row.name}")
    try:
        outcome = train(
            config,
            log=lambda line: None,
            on_samples=observer,
            loaders=lambda *given: _Loaders(*given, prompts=observer.prompts),
        )
        if outcome.stopped_by is not None:
            raise StoppedError(outcome.message)
        observer.finish(outcome.step)
        steered = _steered(config.run_folder)
    finally:
        remove_tree(config.run_folder)  # weights and state: a hundred runs would fill a disk
    seconds = {"whole": time.perf_counter() - started, "evaluating": observer.seconds}
    path = row.path(folder)
    write_record(path, row, observer.evaluations, seconds, steered)
    return path


def _steered(folder: Path) -> list[dict[str, float]]:
    """What a run's log says of held-out gradients; see `Run.steered`."""
    found = []
    for record in read_metrics(folder):
        own = {name: value for name, value in record.items() if name == RADIUS or name.startswith(_AGREEMENTS)}
        if own:
            found.append({"step": record["step"], **own})
    return found


class _Loaders(FileLoaders):
    """A recipe's own, of which the prompts of the fixed pictures are encoded with the rest."""

    def __init__(self, *given: Any, prompts: Sequence[str]):
        super().__init__(*given)
        self.prompts = list(prompts)

    def encodings(self, shapes, texts):
        return super().encodings(shapes, [*dict.fromkeys([*texts, *self.prompts])])


class Observer:
    """Evaluates a run: what `train` calls with each sample grid.

    Attributes:
        prompts: of the fixed pictures.
        evaluations: made so far.
        seconds: spent on them.
    """

    def __init__(self, row: Row, starts: Path):
        self.row, self.starts = row, starts
        self.prompts = row.prompts
        self.evaluations: list[Evaluation] = []
        self.seconds = 0.0
        self._trainer: Trainer | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._pictures = torch.empty(0)
        self._rewards: dict[str, Reward] = {}  # by the quantity, the proxy first
        self._features: Features | None = None  # of pictures, where the task measures their diversity
        self._watched: list[dict[str, Any]] = []

    def __call__(self, trainer: Trainer, images: torch.Tensor, step: int) -> None:
        """Evaluate the present weights.

        Raises:
            StoppedError: whoever wanted the run has gone.
        """
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # nobody waits for the run
            raise StoppedError("the experiment that started this run has ended")
        started = time.perf_counter()
        if step == 0:
            self._begin(trainer)
            self._evaluate(self._pictures, step, 1.0, 0.0)
        else:
            self._evaluate(self._draw(trainer), step, 1.0, self._distance(trainer))
        self.seconds += time.perf_counter() - started

    def finish(self, step: int) -> None:
        """Evaluate the last weights, of a run that ended between two evaluations, and those on the way back.

        Args:
            step: updates done.
        """
        if (trainer := self._trainer) is None:
            raise ValueError("a run that was never evaluated cannot be finished")
        started = time.perf_counter()
        if self.evaluations[-1].step != step:
            self._evaluate(self._draw(trainer), step, 1.0, self._distance(trainer))
        for scale in self.row.scales:
            with replaced(trainer.parameters, _scaled(trainer.parameters, self._weights, scale)):
                self._evaluate(self._draw(trainer), step, scale, self._distance(trainer))
        self.seconds += time.perf_counter() - started

    def _begin(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._weights = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        self._rewards = {PROXY: load_reward(*self.row.proxy_reward, device=trainer.device)}
        for name in playground.REWARDS:
            if name != self.row.proxy:
                self._rewards[JUDGE + name] = load_reward("clip", f"playground/{name}", device=trainer.device)
        for reward in self._rewards.values():
            reward.keep_prompts(self.prompts)
        if isinstance(self.row, CountingRow):
            self._features = load_features(FEATURES, device=trainer.device)
        self._pictures = _kept(self.starts, self._start_key(trainer), lambda: self._draw(trainer))

    def _start_key(self, trainer: Trainer) -> str:
        """What the untrained model's pictures follow from; adapters of every seed begin as no change at all."""
        config = trainer.config
        settings = [part.model_dump(mode="json") for part in (config.backbone, config.sampler, config.parameters)]
        content = [pipeline_hash(), settings, self.prompts, NOISE_SEED, str(trainer.device)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _draw(self, trainer: Trainer) -> torch.Tensor:
        with trainer.final_weights():
            encoded = trainer.encoded(self.prompts)
            images = sample_images(trainer.backbone, trainer.schedule, encoded, NOISE_SEED, _BATCH)
        assert images is not None  # nothing stops it
        return images

    def _distance(self, trainer: Trainer) -> float:
        squares = [
            (p.detach().double() - self._weights[name].double()).square().sum()
            for name, p in trainer.parameters.items()
        ]
        return float(torch.stack(squares).sum().sqrt())

    def _evaluate(self, images: torch.Tensor, step: int, scale: float, weights_distance: float) -> None:
        values = truth_of(images, self.prompts)
        if self._features is not None:
            values |= counting_values(images, self.prompts, values[TRUTH], self._features)
        for name, reward in self._rewards.items():
            values[name] = score_of(reward, images, self.prompts)
        for radius in RADII:
            ball = ImageSmoothing(radius=radius)
            values[f"{S1}{radius:g}"] = sharpness_of(self._rewards[PROXY], images, self.prompts, ball)
        moved = float((images.double() - self._pictures.double()).square().mean())
        watched = self._watch(step, values, image_statistics(images)) if scale == 1 else {}
        self.evaluations.append(Evaluation(step, scale, weights_distance, moved, values, watched))

    def _watch(
        self, step: int, values: Mapping[str, torch.Tensor], statistics: Mapping[str, torch.Tensor]
    ) -> dict[str, float | None]:
        """What the monitors of a run would say of these pictures; see `Evaluation.watched`."""
        judges = {name: own for name, own in values.items() if name.startswith(JUDGE)}
        pictures = {REWARD: values[PROXY], **judges, **{IMAGE + name: own for name, own in statistics.items()}}
        now = {
            "step": step,
            "values": {name: float(own.mean()) for name, own in pictures.items()},
            "pictures": {name: own.tolist() for name, own in pictures.items()},
        }
        falls = {name: fall_of(self._watched, now, name) for name in judges}
        watched = {name: fall.own.errors if fall is not None else None for name, fall in falls.items()}
        if self._watched:
            watched |= {IMAGE + name: drift_of(self._watched[0], now, IMAGE + name) for name in statistics}
        self._watched.append(now)
        return watched


def _kept(folder: Path, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Read what was made of this key before, or make and keep it."""
    path = folder / f"{key}.safetensors"
    if path.is_file():
        return load_file(path)["pictures"]
    made = make()
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, save({"pictures": made.contiguous()}))
    return made


def _scaled(
    parameters: Mapping[str, torch.nn.Parameter], start: Mapping[str, torch.Tensor], scale: float
) -> dict[str, torch.Tensor]:
    """Compute the weights at a share of the way from the start; of adapters, B alone changes.

    W + s B A is what a loader's LoRA scale s gives.
    """
    adapters = any(".lora_B." in name for name in parameters)
    moved = {name: p.detach() for name, p in parameters.items() if not adapters or ".lora_B." in name}
    return {name: start[name] + scale * (p - start[name]) for name, p in moved.items()}


def require_rows(rows: Sequence[Row]) -> None:
    """Read every row's recipe, so that a key that is not there is found before the first hour.

    Raises:
        UserError: the first row that cannot be used, and why.
    """
    for row in rows:
        try:
            config_of(row, Path("run"))
        except UserError as error:
            raise UserError(f"{row.set}/{row.name}: {error}") from error
