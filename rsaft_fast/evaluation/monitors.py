"""Monitors of a run: the same held-out prompts at the same noise, from before the first update on.

What an evaluation measures is its record; alarms, the best evaluation and an early stop follow from the records alone,
so that a run that goes on from a checkpoint needs nothing but the lines of evaluations.jsonl up to it.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch.nn.functional import interpolate

from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.distributed import World
from rsaft_fast.evaluation.alarms import DIVERSITY, IMAGE, change, find_alarms
from rsaft_fast.evaluation.image_statistics import image_statistics
from rsaft_fast.evaluation.known_preference import score_of, sharpness_of
from rsaft_fast.phases import EVALUATING, phase
from rsaft_fast.progress import watched
from rsaft_fast.recipe.evaluation import ALARM, HELD_OUT, REWARD, EvaluationSettings
from rsaft_fast.rewards import ClipReward, Reward
from rsaft_fast.rewards.base import unit
from rsaft_fast.rewards.features import Features, cosine_distances
from rsaft_fast.sampling.linear import Schedule
from rsaft_fast.sampling.pictures import sample_images
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.objective import ImageSmoothing

S1, PREDICTION, LORA = "s1", "prediction_norm", "lora_norm"
BASE, ERROR = "_base", "_se"
"""Behind a value's name: the untrained model's, and the standard error of its mean over the pictures."""

_COARSE = 32  # pixels on each side of what stands for a picture where there is no feature

Embed = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Drawn:
    """Pictures of an evaluation.

    Attributes:
        images: (N, 3, H, W), on the host.
        predictions: (N,), root mean square of what the denoiser predicted on the way to each.
    """

    images: torch.Tensor
    predictions: torch.Tensor


class Monitors:
    """Draws and measures the fixed pictures, and tells what they say of the run.

    Attributes:
        history: the records of the run so far, by rising step.
        identity: of the pictures' prompts and noise; only records of one identity are compared.
        features: what diversity is measured in.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        backbone: Backbone,
        schedule: Schedule,
        reward: Reward,
        rewards: Mapping[str, Reward],
        encoded: EncodedPrompts,
        prompts: Sequence[str],
        *,
        seed: int,
        batch_size: int,
        ball: ImageSmoothing | None = None,
        adapters: Mapping[str, torch.Tensor] | None = None,
        lora_scale: float = 1.0,
        world: World | None = None,
        features: Features | None = None,
    ):
        """
        Args:
            reward: the trained one.
            rewards: the held-out ones, by name.
            prompts: one a picture.
            seed: of the noise.
            ball: at which the trained reward's S1 is measured; None leaves it out.
            adapters: the trained LoRA weights by name, None of full fine-tuning; and the factor alpha / rank.
            world: whose ranks share the pictures, each to draw and to score; all have what came out.
            features: the network of `settings.features`, in which diversity is measured; None takes what is there.
        """
        self.world = world or World()
        self.settings, self.backbone, self.schedule = settings, backbone, schedule
        self.reward, self.rewards, self.encoded = reward, dict(rewards), encoded
        self.prompts, self.seed, self.batch_size = list(prompts), seed, batch_size
        self.ball = ball if reward.differentiable else None
        self.adapters, self.lora_scale = adapters, lora_scale
        self.history: list[dict[str, Any]] = []
        self.identity = hashlib.sha256(json.dumps([self.seed, self.prompts]).encode()).hexdigest()[:16]
        self.features, self.embed = _features(features, reward)

    @property
    def notes(self) -> list[str]:
        """What the figures rest on, in lines for the user."""
        held_out = ", ".join(self.rewards) or "no reward"
        return [
            f"evaluation: {len(self.prompts)} pictures every {self.settings.every} updates, held out: {held_out}; "
            f"diversity is measured in {self.features}"
        ]

    @phase(EVALUATING)
    def draw(self, stop: Callable[[], bool] = lambda: False) -> Drawn | None:
        """Draw the pictures with the weights as they are, each rank its share; None when `stop` says so."""
        own = self.world.share(len(self.prompts))
        drawn = self.world.gathered(self._draw(own, stop) if own else Drawn(torch.empty(0), torch.empty(0)))
        there = [part for part in drawn if part is not None]
        if len(there) < len(drawn):
            return None
        some = [part for part in there if len(part.images)]
        return Drawn(torch.cat([part.images for part in some]), torch.cat([part.predictions for part in some]))

    def _draw(self, only: range, stop: Callable[[], bool]) -> Drawn | None:
        squares: list[torch.Tensor] = []
        images = sample_images(
            self.backbone,
            self.schedule,
            self.encoded(self.prompts),
            self.seed,
            self.batch_size,
            stop,
            watch=lambda firsts: watched(firsts, "batches of the evaluation", len(firsts), "batch"),
            seen=lambda f: squares.append(f.float().square().flatten(1).mean(1)),
            only=only,
        )
        if images is None:
            return None
        calls = len(self.schedule)
        batches = [torch.stack(squares[i : i + calls]).mean(0) for i in range(0, len(squares), calls)]
        return Drawn(images, torch.cat(batches).sqrt().cpu())

    @phase(EVALUATING)
    def measure(self, drawn: Drawn, step: int, beside: Mapping[str, float | None] = {}) -> dict[str, Any]:  # noqa: B006
        """Measure pictures, and return the record, which is in `history` from then on.

        Args:
            step: updates before them.
            beside: further values of the record: the latest agreement of gradients. Rank 0's count for all.
        """
        beside = self.world.of_first(beside)
        pictures = {name: [_plain(v) for v in own.double().tolist()] for name, own in self._by_picture(drawn).items()}
        values: dict[str, float | None] = {}
        for name, own in pictures.items():
            known = [value for value in own if value is not None]
            values[name] = _plain(fmean(known)) if known else None
            if name == REWARD or name.startswith(HELD_OUT):
                values[name + ERROR] = _plain(stdev(known) / math.sqrt(len(known))) if len(known) > 1 else None
        if self.adapters is not None:
            values[LORA] = _plain(lora_norm(self.adapters, self.lora_scale))
        base = self.history[0] if self.history and self.history[0]["step"] < step else None
        if base is not None or step == 0:
            values[PREDICTION + BASE] = base["values"].get(PREDICTION) if base is not None else values[PREDICTION]
        values |= {name: None if value is None else _plain(value) for name, value in beside.items()}
        record: dict[str, Any] = {"step": step, "set": self.identity, "values": values, "pictures": pictures}
        earlier = [one for one in self.history if one["step"] < step]
        record["alarms"] = find_alarms(earlier, record, self.settings.alarm_errors, self.settings.alarm_drift)
        insort(self.history, record, key=lambda one: one["step"])
        return record

    def _by_picture(self, drawn: Drawn) -> dict[str, torch.Tensor]:
        images, size = drawn.images, self.batch_size
        scores = {REWARD: self.reward} | {f"{HELD_OUT}{name}": reward for name, reward in self.rewards.items()}
        found = {
            name: self._over_ranks(lambda rows, reward=reward: score_of(reward, images[rows], self.prompts[rows], size))
            for name, reward in scores.items()
        }
        if (ball := self.ball) is not None:
            found[S1] = self._over_ranks(
                lambda rows: sharpness_of(self.reward, images[rows], self.prompts[rows], ball, size)
            )
        found |= {IMAGE + name: own for name, own in image_statistics(images).items()}
        with torch.no_grad():
            features = self._over_ranks(
                lambda rows: torch.cat(
                    [self.embed(part.to(self.backbone.device)).cpu() for part in images[rows].split(size)]
                )
            )
        distances = cosine_distances(features.double())
        found[DIVERSITY] = distances.sum(1) / (len(distances) - 1)
        found[PREDICTION] = drawn.predictions
        return found

    def _over_ranks(self, find: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """What is found of all pictures, each rank finding it of its share."""
        own = self.world.share(len(self.prompts))
        parts = self.world.gathered(find(slice(own.start, own.stop)) if own else None)
        return torch.cat([part for part in parts if part is not None])

    @phase(EVALUATING)
    def rehearse(self) -> None:
        """Walk one batch of what a measurement does, for who counts the memory; pictures are drawn like a grid's."""
        prompts = self.prompts[: self.batch_size]
        shape = (len(prompts), 3, self.backbone.height, self.backbone.width)
        images = torch.empty(shape, device=self.backbone.device, dtype=self.backbone.latent_dtype)
        with torch.no_grad():
            for reward in (self.reward, *self.rewards.values()):
                reward.score(images, prompts)
            self.embed(images)
        if self.ball is not None:
            leaf = images.requires_grad_(True)
            torch.autograd.grad(self.reward.score(leaf, prompts).sum(), leaf)

    @property
    def halted(self) -> str | None:
        """Why the run is to end after the last evaluation, in words; None where it goes on."""
        stop, latest = self.settings.stop_on, self.history[-1] if self.history else None
        if stop is None or latest is None or latest["step"] == 0:
            return None
        if stop == ALARM:
            told = "evaluation.stop_on alarm; evaluation.stop_on=null goes on"
            return f"{latest['alarms'][0]} ({told})" if latest["alarms"] else None
        known = [record for record in self.history if record["values"].get(stop) is not None]
        best = best_of(known, stop)
        if best is None or (waited := len(known) - 1 - known.index(best)) < self.settings.patience:
            return None
        return (
            f"{stop} was highest after update {best['step']}, and has not risen above it at {waited} evaluations in a "
            f"row (evaluation.patience {self.settings.patience}); evaluation.stop_on=null goes on"
        )

    def summary(self) -> list[str]:
        """Put the whole run into lines: the scores before and after, and the first alarm of each kind."""
        if len(self.history) < 2:
            return []
        first, last = self.history[0]["values"], self.history[-1]["values"]
        names = [REWARD, *(f"{HELD_OUT}{name}" for name in self.rewards)]
        known = [name for name in names if None not in (first.get(name), last.get(name))]
        scores = ", ".join(f"{name} {first[name]:.4g} before, {last[name]:.4g} after" for name in known)
        alarms: dict[str, str] = {}
        for record in self.history:
            for line in record["alarms"]:
                alarms.setdefault(_subject(line), f"alarm after update {record['step']}: {line}")
        return [f"{len(self.prompts)} held-out pictures: {scores}", *alarms.values()]

    def told(self, record: dict[str, Any]) -> list[str]:
        """Put an evaluation into lines for the user: the scores, each alarm that the evaluation before did not have."""
        place = self.history.index(record)
        base, before = self.history[0], self.history[place - 1] if place else None
        parts = []
        for name, own in record["pictures"].items():
            if not (name in (REWARD, S1) or name.startswith(HELD_OUT)) or record["values"][name] is None:
                continue
            moved = change(base["pictures"].get(name, ()), own) if record is not base else None
            since = f" ({moved.mean:+.3g} +- {moved.error:.2g})" if moved is not None else ""
            parts.append(f"{name} {record['values'][name]:.4g}{since}")
        said = "; behind each the change since update 0" if record is not base else ""
        lines = [f"evaluation after update {record['step']}: {', '.join(parts)}{said}"]
        known = {_subject(line) for line in before["alarms"]} if before is not None else set()
        new = [line for line in record["alarms"] if _subject(line) not in known]
        return lines + [f"alarm after update {record['step']}: {line}" for line in new]


def _subject(line: str) -> str:
    return line.partition(":")[0]


def best_of(records: Sequence[Mapping[str, Any]], score: str) -> Any:
    """Return the record with the highest score, the first of equal ones; None of no record that has it."""
    known = [record for record in records if record["values"].get(score) is not None]
    return max(known, key=lambda record: record["values"][score]) if known else None


def lora_norm(adapters: Mapping[str, torch.Tensor], scale: float) -> float:
    """Compute the Frobenius norm of scale * B A over all adapters together, by the small products A A' and B' B.

    Args:
        adapters: the weights A (rank, ...) and B (..., rank, 1, ...) under peft's names.
    """
    total = 0.0
    for name, a in adapters.items():
        if ".lora_A." in name:
            b = adapters[name.replace(".lora_A.", ".lora_B.")].detach().double().flatten(1)
            a = a.detach().double().flatten(1)
            total += float(((b.T @ b) * (a @ a.T)).sum())
    return abs(scale) * math.sqrt(max(0.0, total))


def _features(network: Features | None, reward: Reward) -> tuple[str, Embed]:
    """Return what diversity is measured in: its name, and images (B, 3, H, W) to unit features (B, D)."""
    if network is not None:
        return f"features of {network.spec.source} ({network.spec.name})", network
    if isinstance(reward, ClipReward):
        return "the image tower of the trained reward", lambda images: reward.embed_images(reward.preprocess(images))
    return f"pixels ({_COARSE}x{_COARSE}), for the trained reward has no image tower of CLIP's kind", _pixels


def _pixels(images: torch.Tensor) -> torch.Tensor:
    coarse = interpolate(images.float().clamp(0, 1), (_COARSE, _COARSE), mode="area")
    return unit(coarse.flatten(1) - 0.5)


def _plain(value: float) -> float | None:
    """Six digits, as JSON has them: alarms come out the same from a file that is read again."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
