"""`rsaft-fast eval`: models and runs compared on prompts, by every reward asked for, and how it was measured."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rsaft_fast.commands.eval_inputs import (
    THUMBNAIL,
    TruePreference,
    chosen_prompts,
    chosen_rewards,
    knows_truth,
    thumbnails,
)
from rsaft_fast.commands.eval_models import Drawing, Model, find_models, wanted_pictures
from rsaft_fast.commands.output import hold
from rsaft_fast.commands.pictures import FIXED, in_rounds, log, shared_journal
from rsaft_fast.commands.ranks import shared
from rsaft_fast.commands.score import score_pictures
from rsaft_fast.commands.score_journal import Followed, Journal, digest
from rsaft_fast.data.picture_lists import Picture, find_pictures
from rsaft_fast.data.pictures import read_picture
from rsaft_fast.data.prompt_sets import overlap_note
from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.distributed import World
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.distances import Estimate, frechet_distance, kernel_distance, spread, spread_within
from rsaft_fast.evaluation.known_preference import TRUTH
from rsaft_fast.evaluation.results import (
    DIVERSITY,
    FID,
    KID,
    S1,
    WITHIN,
    Results,
    Row,
    as_json,
    as_markdown,
    as_text,
)
from rsaft_fast.files import write_atomically
from rsaft_fast.out_of_memory import is_out_of_memory
from rsaft_fast.progress import Counter, tell
from rsaft_fast.recipe.check import check_device, check_path
from rsaft_fast.recipe.config import PLAYGROUND
from rsaft_fast.rewards import Combination, Reward, RewardSettings, load_reward
from rsaft_fast.rewards.base import RewardSpec, unit
from rsaft_fast.rewards.features import Features, load_features
from rsaft_fast.smoothing.sharpness import sharpness

FORMAT = "rsaft-fast evaluation 1"
JSON, CSV, PAGE = "evaluation.json", "scores.csv", "evaluation.md"
FEATURES_OF_THE_PLAYGROUND = "playground/fair"


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast eval`; under torchrun each process draws and scores its share."""
    return shared(arguments.device, lambda world: _run(arguments, world))


def _run(arguments: argparse.Namespace, world: World) -> int:
    evaluation = world.together(lambda: _evaluation(arguments, world))
    with ExitStack() as held:
        world.together(lambda: held.enter_context(hold(evaluation.output)) if world.is_first else None)
        return evaluation.run()


def _evaluation(arguments: argparse.Namespace, world: World) -> Evaluation:
    check_device(arguments.device, "--device")
    if not 0 <= arguments.s1 < math.inf:
        raise UserError(f"--s1 {arguments.s1:g}: the radius must be 0 (none) or larger, and finite")
    models = find_models(arguments)
    source, prompts, pictures, seed = chosen_prompts(arguments, models)
    rewards, trained = chosen_rewards(arguments, models)
    return Evaluation(arguments, models, rewards, trained, source, prompts, pictures, seed, world)


class Evaluation:
    """One evaluation: pictures are drawn, then scored reward by reward; whatever is done stays on the disk."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        models: Sequence[Model],
        rewards: Mapping[str, RewardSettings],
        trained: Mapping[str, RewardSettings],
        source: str,
        prompts: Sequence[str],
        pictures: int,
        seed: int,
        world: World | None = None,
    ):
        self.world = world or World()
        self.arguments, self.models, self.rewards, self.trained = arguments, models, rewards, trained
        self.source, self.prompts, self.pictures, self.seed = source, prompts, pictures, seed
        self.wanted = wanted_pictures(prompts, pictures, seed)
        first = next((model.run for model in models if model.run is not None), None)
        name = Path(source.partition("=")[0]).stem or "prompts"
        default = (first / "evaluation" if first else Path("evaluation")) / name
        self.output = Path(arguments.output or default)
        self.drawing = Drawing(arguments, models, self.wanted, self.output, self.world)
        self.device = self.drawing.device
        self.columns: dict[str, dict[str, list[float]]] = {model.place: {} for model in models}
        self.distances: dict[str, dict[str, Estimate | float]] = {model.place: {} for model in models}
        self.specs: dict[str, dict[str, Any]] = {}
        self.in_domain: list[str] = []
        self.features = ""
        self.truth = knows_truth(models, prompts)
        self.missing = [*rewards, *([TRUTH] if self.truth else []), "distances"]

    def run(self) -> int:
        """Draw, score and write; 0, or the code of the signal that stopped it.

        Raises:
            UserError: something is wrong; it says what is safe.
        """
        try:
            self.world.together(self._look_ahead)
            self._note_overlap()
            self.drawing.run()
            self._score()
            self._measure_distances()
        except UserError as error:
            raise UserError(f"{error}; {self._safe()}") from error
        except KeyboardInterrupt as interrupt:
            print(f"rsaft-fast: interrupted; {self._safe()}", file=sys.stderr)
            return 128 + getattr(interrupt, "signal", signal.SIGINT)
        results = self._write()
        if not self.world.is_first:
            return 0
        print(as_text(results))
        log(
            f"table in {self.output / PAGE}, scores of every picture in {self.output / CSV}, all of it in "
            f"{self.output / JSON}; pictures below {self.output / 'pictures'}"
        )
        return 0

    def _safe(self) -> str:
        drawn = self.drawing.count()
        if not drawn:
            return "nothing was drawn"
        scored = sum(len(values) for columns in self.columns.values() for values in columns.values())
        partial = f" and {scored} scores, marked partial," if scored else ""
        if scored:
            with suppress(OSError):  # the disk may be what stopped it
                self._write()
        whole = len(self.models) * len(self.wanted)
        return f"{drawn} of {whole} pictures{partial} are safe in {self.output}; the same command goes on from there"

    def _look_ahead(self) -> None:
        """Find what is wrong with a reward before hours of drawing."""
        if self.arguments.features:
            check_path("--features", self.arguments.features)
        if not any(self.drawing.missing(model) for model in self.models):
            return
        for settings in self.rewards.values():
            settings.check_files()
            load_reward(settings, device="cpu")

    def _note_overlap(self) -> None:
        trained_on = {(m.config.data.prompts, m.config.data.column) for m in self.models if m.config is not None}
        for place, column in sorted(trained_on, key=str):
            try:
                training = load_prompts(place, column)
            except UserError:
                continue  # its prompts have gone since; nothing depends on them
            if note := overlap_note(training, self.prompts, self.source):
                log(f"warning: {note}")

    def _score(self) -> None:
        pictures = {model.place: find_pictures([str(self.drawing.folder(model))], log) for model in self.models}
        for label, settings in self.rewards.items():
            reward = self.world.together(lambda settings=settings: load_reward(settings, device=self.device))
            for note in reward.prompt_notes(self.prompts):
                log(note)
            key = [settings.model_dump(), asdict(reward.spec)]
            for model in self.models:
                self._score_model(model, pictures[model.place], reward, key, label)
            self._describe(label, reward, settings)
            self.missing.remove(label)
            self._write()
            del reward
        if self.truth:
            for model in self.models:
                self._score_model(model, pictures[model.place], TruePreference(), [TRUTH], TRUTH)
            self.specs[TRUTH] = asdict(TruePreference().spec)
            self.missing.remove(TRUTH)
            self._write()

    def _score_model(
        self, model: Model, pictures: Sequence[Picture], reward: Reward, key: Sequence[Any], label: str
    ) -> None:
        prompts = [picture.prompt or "" for picture in pictures]
        files = [picture.file for picture in pictures]
        place = self.output / "scores" / f"{model.place}.journal"
        with closing(shared_journal(self.world, lambda: Journal(place, _identity(files, prompts), tell))) as journal:
            size = self.arguments.batch_size
            # As `rsaft-fast score` scores the folder: the same batches, the same bits.
            columns = score_pictures(
                *(
                    reward,
                    files,
                    prompts,
                    self.device,
                    size,
                    journal,
                    digest(key),
                    f"{label}, {model.label}",
                    self.world,
                )
            )
            for part, values in columns.items():
                self.columns[model.place][f"{label}/{part}" if part else label] = values
            if self.arguments.s1 > 0 and reward.differentiable:
                name = f"{S1}{label}@{self.arguments.s1:g}"
                self.columns[model.place][name] = self._sharpness(reward, key, files, prompts, journal, label, model)

    def _sharpness(
        self,
        reward: Reward,
        key: Sequence[Any],
        files: Sequence[Path],
        prompts: Sequence[str],
        journal: Journal | Followed,
        label: str,
        model: Model,
    ) -> list[float]:
        radius, size = self.arguments.s1, self.arguments.batch_size
        column = (digest([*key, "S1", radius]), "one step")

        def measure(batch: range) -> list[float]:
            images = torch.cat([read_picture(files[place]) for place in batch]).to(self.device)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", UserWarning)
                try:
                    values = sharpness(reward, images, prompts[batch.start : batch.stop], radius, batch_size=size)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise UserError(
                        f"out of memory while S1 of {label} was measured at {size} pictures at a time; lower "
                        "--batch-size, or leave S1 out by --s1 0"
                    ) from error
            for warning in warned if batch.start == 0 else ():
                log(f"warning: {label}: {warning.message}")
            if not torch.isfinite(values).all():
                raise UserError(
                    f"the gradient of {label} at a picture of {files[batch.start].parent} is not finite; leave S1 out "
                    "by --s1 0, or take dtype=fp32"
                )
            return values.tolist()

        done = len(journal.scores(column))
        with Counter(f"S1 of {label}, {model.label}", len(files), "picture", done) as counter:
            for values in in_rounds(self.world, done, len(files), size, measure):
                journal.add(column, values)
                counter.add(len(values))
        return journal.scores(column)

    def _describe(self, label: str, reward: Reward, settings: RewardSettings) -> None:
        self.specs[label] = asdict(reward.spec) | {"settings": settings.model_dump(mode="json")}
        if label in self.trained:
            self.in_domain.append(label)
            if isinstance(reward, Combination):
                self.in_domain += [f"{label}/{part.name}" for part in reward.parts if part.weight != 0]
        if self.arguments.s1 > 0 and not reward.differentiable:
            log(f"{label} has no gradient, so no S1")

    def _measure_distances(self) -> None:
        embed, spec = self._features()
        self.features = f"{spec.name} ({spec.source})" if spec.source else spec.name
        self.specs["features"] = asdict(spec)
        prompts = [picture.prompt for picture in self.wanted]
        groups = list(zip(prompts, self._occurrences(prompts)))
        first: torch.Tensor | None = None
        for model in self.models:
            features = self._embed(embed, model)
            found = self.distances[model.place]
            if first is None:
                first = features
            elif len(features) > 1:
                found[FID] = frechet_distance(first, features)
                found[KID] = _times(kernel_distance(first, features, groups), 1000)
            if len(features) > 1:
                unit_length = unit(features)
                found[DIVERSITY] = _times(spread(unit_length, groups), 100)
                if (within := spread_within(unit_length, groups)) is not None:
                    found[WITHIN] = _times(within, 100)
        self.missing.remove("distances")

    def _occurrences(self, prompts: Sequence[str]) -> list[int]:
        """Which of its set's equal prompts a picture's is: two places of one text are two prompts."""
        per_seed = len(self.prompts)
        seen: dict[str, int] = {}
        places = []
        for prompt in self.prompts:
            places.append(seen.get(prompt, 0))
            seen[prompt] = places[-1] + 1
        return [places[index % per_seed] for index in range(len(prompts))]

    def _features(self) -> tuple[Any, RewardSpec]:
        """What distances are measured in: the named network, the playground's, or the pictures made small."""
        path = self.arguments.features
        if path is None and all(model.settings.path == PLAYGROUND for model in self.models):
            path = FEATURES_OF_THE_PLAYGROUND
        if path is None:
            log(
                f"no --features: FID, KID and diversity are measured in {THUMBNAIL.name}s, which see colour and layout "
                "alone; give --features facebook/dinov2-large"
            )
            return thumbnails, THUMBNAIL
        network: Features = load_features(path, device=self.device, checkpoint=False)
        return network.raw, network.spec

    @torch.no_grad()
    def _embed(self, embed: Any, model: Model) -> torch.Tensor:
        folder, size, parts = self.drawing.folder(model), self.arguments.batch_size, []
        with Counter(f"features of {model.label}", len(self.wanted), "picture") as counter:
            for first in range(0, len(self.wanted), size):
                own = self.wanted[first : first + size]
                images = torch.cat([read_picture(folder / picture.name) for picture in own]).to(self.device)
                parts.append(embed(images).double().cpu())
                counter.add(len(own))
        return torch.cat(parts)

    def _results(self) -> Results:
        rows = [
            Row(
                model.label if model.shown else f"{model.label} @{model.step}",
                model.group,
                model.updates,
                self.columns[model.place],
                self.distances[model.place],
                model.shown,
            )
            for model in self.models
        ]
        # Runs that climbed different rewards are at no common level.
        climbed = next(iter(self.trained)) if len(self.trained) == 1 else ""
        return Results(rows, [picture.prompt for picture in self.wanted], self.in_domain, climbed, self.missing)

    def _write(self) -> Results:
        """Write what there is, marked as partial as long as something is missing; the first rank does."""
        results = self._results()
        if not self.world.is_first:
            return results
        about = self._about()
        write_atomically(self.output / CSV, self._csv())
        write_atomically(self.output / PAGE, as_markdown(results, self._lines(about)))
        content = {"format": FORMAT, **as_json(results), "protocol": about, "specs": self.specs}
        write_atomically(self.output / JSON, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return results

    def _about(self) -> dict[str, Any]:
        """Every choice that a figure depends on."""
        text = "\n".join(self.prompts)
        return {
            "prompts": self.source,
            "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "count": len(self.prompts),
            "pictures_of_a_prompt": self.pictures,
            "seeds": list(range(self.seed, self.seed + self.pictures)),
            "noise": "of (seed, the prompt's text)",
            "batch_size": self.arguments.batch_size,
            "s1": {"radius": self.arguments.s1, "norm": "l2", "space": "pixel01", "steps": 1},
            "features": self.features,
            "protocol": self.arguments.protocol,
            "models": [
                {"label": model.label, "pictures": f"pictures/{model.place}", "updates": model.updates}
                | self.drawing.about.get(model.place, {})
                for model in self.models
            ],
        }

    def _lines(self, about: Mapping[str, Any]) -> list[str]:
        """The protocol in words, for the page."""
        lines = [
            f"{about['count']} prompts of {self.source} (SHA-256 {about['prompts_sha256'][:16]}), "
            f"{about['pictures_of_a_prompt']} pictures of each, from seeds {about['seeds'][0]} to {about['seeds'][-1]}",
            f"FID, KID (to the first row) and diversity in features of {self.features or 'nothing yet'}"
            + ("; they do not compare with figures of Inception" if self.features else ""),
            f"S1: what a reward falls by, one step against its gradient, L2 {self.arguments.s1:g} in pixels 0 to 1",
        ]
        for path, sampler in self.drawing.samplers.items():
            own = next(model for model in self.models if model.settings.path == path)
            facts = self.drawing.about[own.place]
            lines.append(
                f"{path}: {facts['width']}x{facts['height']} in {facts['dtype']}, {sampler.steps} steps, guidance "
                f"{sampler.guidance_scale:g}, eta {sampler.eta:g}"
            )
        for label, spec in self.specs.items():
            if spec["sha256"]:
                lines.append(f"{label}: {spec['name']} of {spec['source']}, SHA-256 {spec['sha256'][:16]}")
        return lines

    def _csv(self) -> str:
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        names = list(dict.fromkeys(name for columns in self.columns.values() for name in columns))
        writer.writerow(["model", "updates", *FIXED, "seed", *names])
        for model in self.models:
            columns = self.columns[model.place]
            for index, picture in enumerate(self.wanted):
                scores = [columns[name][index] if name in columns else "" for name in names]
                file = os.path.join("pictures", model.place, picture.name)
                writer.writerow([model.label, model.updates, file, picture.prompt, picture.seed, *scores])
        return table.getvalue()


def _identity(files: Sequence[Path], prompts: Sequence[str]) -> str:
    """A digest of pictures by name and length, wherever the folder lies; what they are of is in its drawn.json."""
    return digest([[file.name, file.stat().st_size, prompt] for file, prompt in zip(files, prompts)])


def _times(found: Estimate, factor: float) -> Estimate:
    return Estimate(found.value * factor, found.low * factor, found.high * factor)
