"""Models that `rsaft-fast eval` compares, and their pictures: drawn once, batch by batch."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections import Counter as Counts
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from rsaft_fast import hub
from rsaft_fast.backbones import Backbone, local_path
from rsaft_fast.commands.pictures import log
from rsaft_fast.commands.sample import (
    BEST,
    best_folder,
    load_trained,
    saved_weights,
    take_weights,
    usual_sampler,
    with_options,
)
from rsaft_fast.data.encoded import EncodedPrompts, negative_texts
from rsaft_fast.data.encodings import Encodings, free_memory, load_shapes, open_cache
from rsaft_fast.data.picture_lists import LISTING
from rsaft_fast.distributed import World
from rsaft_fast.dtypes import DTYPES
from rsaft_fast.errors import UserError
from rsaft_fast.figures.grids import save_png, to_picture
from rsaft_fast.files import sha256_of, write_atomically
from rsaft_fast.out_of_memory import oom_as_user_error
from rsaft_fast.progress import Counter, tell
from rsaft_fast.recipe.check import check_path, pick_device
from rsaft_fast.recipe.config import AUTO, BackboneSettings, Config, SamplerSettings
from rsaft_fast.recipe.load import load_config
from rsaft_fast.sampling.pictures import sample_images
from rsaft_fast.speed import SpeedSettings, apply_speed
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.loaders import prepare_backbone
from rsaft_fast.train.logging import CONFIG
from rsaft_fast.train.trainer import describe_software

LAST, ALL = "last", "all"
DRAWN = "drawn.json"
METHODS = {
    **{"refl": "ReFL", "draft": "DRaFT", "draft_lv": "DRaFT-LV", "alignprop": "AlignProp", "drtune": "DRTune"},
    **{"leapalign": "LeapAlign", "flowbp_sparse": "FlowBP-Sparse", "flowbp_bridge": "FlowBP-Bridge"},
    **{"flowbp_lagrange": "FlowBP-Lagrange", "flow_grpo": "Flow-GRPO", "nft": "DiffusionNFT"},
}


@dataclass(frozen=True)
class Wanted:
    """A picture that is to be drawn.

    Attributes:
        name: of its file.
        number: of its noise, from the prompt's text and how often that stood before: the same picture whichever other
            prompts there are.
        seed: of its noise.
    """

    name: str
    prompt: str
    number: int
    seed: int


@dataclass(frozen=True)
class Model:
    """A pipeline as it is, or a run of it at a checkpoint.

    Attributes:
        label: how tables call it; `place` is its folder below pictures/.
        settings: of the pipeline, with the size and dtype of the pictures.
        run: folder of the run, and its config; None of a pipeline as it is.
        step: a checkpoint's, or `BEST`; updates that were done are `updates`.
        weights: SHA-256 of what the run trained; "" without a run.
        shown: whether it has a row of its own in the table.
    """

    label: str
    place: str
    settings: BackboneSettings
    run: Path | None = None
    config: Config | None = None
    step: int | str | None = None
    updates: int | None = None
    weights: str = ""
    group: str = ""
    shown: bool = True


def find_models(arguments: argparse.Namespace) -> list[Model]:
    """Make the list of models: the runs' own pipeline first, then what was named, in order.

    Raises:
        UserError: something named that is neither a run nor a pipeline; runs of different pipelines; no checkpoint.
    """
    given = {"height": arguments.height, "width": arguments.width, "dtype": arguments.dtype}
    runs = [(Path(place), load_config(Path(place) / CONFIG)) for place in arguments.models if _is_run(place)]
    plain = [place for place in arguments.models if not _is_run(place)]
    if not runs and (arguments.checkpoint or LAST) != LAST:
        raise UserError(f"--checkpoint {arguments.checkpoint} is of runs, and none is named; leave it out")
    models = []
    if runs:
        settings = with_options(runs[0][1].backbone, given | {"checkpoint": ()})
        for folder, config in runs[1:]:
            own = with_options(config.backbone, given | {"checkpoint": ()})
            if _drawn_alike(own) != _drawn_alike(settings):
                raise UserError(
                    f"{folder} trained {own.path} at {own.width}x{own.height} in {own.dtype}, and {runs[0][0]} "
                    f"{settings.path} at {settings.width}x{settings.height} in {settings.dtype}: pictures of both do "
                    "not compare; evaluate them one by one, or give --height, --width and --dtype"
                )
        check_path("the run's backbone.path", settings.path)
        models.append(Model("base", "base", settings))
        for folder, config in runs:
            models += _of_run(folder, config, settings, arguments.checkpoint or LAST)
    for place in plain:
        check_path("RUN|MODEL", place)
        if not any(model.run is None and model.settings.path == place for model in models):
            settings = with_options(BackboneSettings(path=place), given)
            models.append(Model(Path(place).name or place, "", settings))
    return _told_apart(models)


def _is_run(place: str) -> bool:
    return os.path.isfile(Path(place) / CONFIG)


def _drawn_alike(settings: BackboneSettings) -> tuple[Any, ...]:
    path = os.path.realpath(settings.path) if os.path.exists(settings.path) else settings.path
    return path, settings.height, settings.width, settings.dtype


def method_label(config: Config) -> str:
    """Name a run as papers do: its method, and RSA-FT where it smooths."""
    method: Any = config.method
    name = METHODS.get(method.name, method.name)
    if method.name == "draft":
        name = f"{name}-{method.k}"
    if getattr(method, "gardo", None) is not None:
        name += " + GARDO"
    balls = [ball for ball in ("image", "parameters") if getattr(config.smoothing, ball) is not None]
    if balls:
        name += " + RSA-FT" if len(balls) == 2 else f" + RSA-FT ({balls[0]} alone)"
    return name


def _of_run(folder: Path, config: Config, settings: BackboneSettings, which: int | str) -> list[Model]:
    label = f"+ {method_label(config)}"
    if which == BEST:
        files = sorted(best_folder(config, folder).glob("*.safetensors"))
        return [Model(label, "", settings, folder, config, BEST, _best_step(folder), sha256_of(files), str(folder))]
    if which != ALL:
        path, _ = saved_weights(folder, which if isinstance(which, int) else None, "RUN")
        return [_at_checkpoint(label, settings, folder, config, path, True)]
    complete = []
    for path in sorted((folder / "checkpoints").glob("step_*"), key=lambda path: (len(path.name), path.name)):
        if (fault := checkpoints.find_fault(path)) is None:
            complete.append(path)
        else:
            log(f"{path} is passed over: {fault}")
    if not complete:
        raise UserError(f"{folder} has no complete checkpoint")
    return [_at_checkpoint(label, settings, folder, config, path, path == complete[-1]) for path in complete]


def _best_step(folder: Path) -> int | None:
    """Updates of a run's best checkpoint, as the run wrote them down beside it."""
    try:
        step = json.loads((folder / BEST / "evaluation.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _at_checkpoint(
    label: str, settings: BackboneSettings, folder: Path, config: Config, path: Path, shown: bool
) -> Model:
    step = int(path.name.removeprefix("step_"))
    weights = sha256_of(checkpoints.weight_files(path))
    return Model(label, "", settings, folder, config, step, step, weights, str(folder), shown)


def _told_apart(models: Sequence[Model]) -> list[Model]:
    """Give every model a label, a group's name and a folder of its own."""
    runs = Counts(label for label, _ in dict.fromkeys((model.label, model.run) for model in models))
    found, places = [], Counts[str]()
    for model in models:
        label = model.label
        if runs[label] > 1:
            label += f" ({model.run.name if model.run else model.settings.path})"
        group = label if model.run else ""
        slug = re.sub(r"[^a-z0-9.]+", "-", label.casefold()).strip("-.") or "model"
        if model.step is not None:
            slug += f"-{model.step}"
        places[slug] += 1
        if places[slug] > 1:
            slug += f"-{places[slug]}"
        # Another checkpoint is another set of pictures, whatever the run is called.
        if model.weights:
            slug += f"-{model.weights[:8]}"
        found.append(replace(model, label=label, place=slug, group=group))
    return found


def wanted_pictures(prompts: Sequence[str], pictures: int, seed: int) -> list[Wanted]:
    """List the pictures of all prompts, seed by seed."""
    before: Counts[str] = Counts()
    numbers = []
    for prompt in prompts:
        text = f"{before[prompt]} {prompt}"
        numbers.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]))
        before[prompt] += 1
    return [
        Wanted(f"{index:05d}_seed_{own}.png", prompt, number, own)
        for own in range(seed, seed + pictures)
        for index, (prompt, number) in enumerate(zip(prompts, numbers))
    ]


class Drawing:
    """Draws the pictures of models that are not there yet, each pipeline loaded once for all that need it."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        models: Sequence[Model],
        wanted: Sequence[Wanted],
        output: Path,
        world: World | None = None,
    ):
        """`world`: whose ranks share the batches; the first one writes down what they are of."""
        self.world = world or World()
        self.arguments, self.models, self.wanted = arguments, models, wanted
        self.output = output
        self.device = pick_device(arguments.device)
        self.samplers: dict[str, SamplerSettings] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self._pipelines: dict[str, str] = {}

    def folder(self, model: Model) -> Path:
        """Where a model's pictures lie."""
        return self.output / "pictures" / model.place

    def missing(self, model: Model) -> list[list[Wanted]]:
        """List the batches of which some picture is not there: a batch is drawn again whole, to the same bits."""
        folder = self.folder(model)
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        return [batch for batch in self._batches() if any(picture.name not in there for picture in batch)]

    def _batches(self) -> list[list[Wanted]]:
        """Split the pictures: a batch has one seed, so that none reaches from one to the next."""
        size = self.arguments.batch_size
        found = []
        for _, same in groupby(self.wanted, key=lambda picture: picture.seed):
            own = list(same)
            found += [own[first : first + size] for first in range(0, len(own), size)]
        return found

    def count(self) -> int:
        """Count the pictures that are there, of all models."""
        return len(self.models) * len(self.wanted) - sum(
            len(batch) for model in self.models for batch in self.missing(model)
        )

    def run(self) -> None:
        """Draw what is missing, pipeline by pipeline, the pipeline itself before its runs.

        Raises:
            UserError: a folder holds pictures of something else; a pipeline, checkpoint or disk is at fault.
        """
        for path in dict.fromkeys(model.settings.path for model in self.models):
            own = [model for model in self.models if model.settings.path == path]
            self._pipeline(own)

    def _pipeline(self, models: Sequence[Model]) -> None:
        first = models[0]
        config = next((model.config for model in models if model.config is not None), None)
        shapes = load_shapes(first.settings, DTYPES[first.settings.dtype], self.device)
        sampler = self._sampler(config, shapes, first.settings.path)
        for model in {model.run: model for model in models if model.config is not None}.values():
            if model.config is not None and config is not None and model.config.sampler != config.sampler:
                log(f"{model.run} was trained with another sampler than the first run, whose all are drawn with here")
        for model in models:
            self._describe(model, sampler, shapes)
        self.world.together(lambda: [self._identify(model) for model in models] if self.world.is_first else None)
        todo = self.world.of_first([place for place, model in enumerate(models) if self.missing(model)])
        todo = [models[place] for place in todo]
        if not todo:
            return
        texts = list(dict.fromkeys(picture.prompt for picture in self.wanted)) + negative_texts(shapes, sampler)
        cache = open_cache(config.data.encoding_cache if config else AUTO, tell)
        with self.world.first_of_machine(f"encodings {first.settings.path}"):
            encodings = Encodings(shapes, first.settings, texts, cache, tell)  # of what the first process has made
            encodings.complete(tell)
        schedule = shapes.schedule(sampler.steps, sampler.eta)
        backbone: Backbone | None = None
        loaded: Path | None = None
        for model in todo:
            with oom_as_user_error("drawing"):
                if backbone is None or loaded != model.run or model.step == BEST:
                    backbone = None
                    free_memory(self.device)
                    tell(f"loading {model.settings.path}" + (f" and {model.run}" if model.run else ""))
                    backbone = self._load(model, shapes)
                    loaded = model.run
                else:
                    self._exchange(backbone, model)
                self._draw(model, backbone, schedule, EncodedPrompts(backbone, encodings, sampler))

    def _load(self, model: Model, shapes: Backbone) -> Backbone:
        made = shapes
        if shapes.is_whole:  # a model of the user's own, which an earlier run's weights may be in
            made = load_shapes(model.settings, DTYPES[model.settings.dtype], self.device)
        backbone = prepare_backbone(model.settings, self.device, text=False, made=made)
        if model.config is not None and model.run is not None:
            load_trained(backbone, model.config, model.run, model.step)
        apply_speed(backbone, model.config.speed.portable() if model.config else SpeedSettings())
        return backbone

    def _exchange(self, backbone: Backbone, model: Model) -> None:
        """Put another checkpoint of the run that is loaded into it."""
        assert model.run is not None and isinstance(model.step, int)
        path, weights = saved_weights(model.run, model.step)
        take_weights(backbone, path, weights, model.settings.path)

    @torch.no_grad()
    def _draw(self, model: Model, backbone: Backbone, schedule: Any, encoded: EncodedPrompts) -> None:
        folder, world = self.folder(model), self.world
        batches = world.of_first(self.missing(model))
        done = len(self.wanted) - sum(map(len, batches))
        with Counter(f"drawing {model.label}", len(self.wanted), "picture", done) as counter:
            for batch in batches[world.rank :: world.size]:
                conditioning = encoded([picture.prompt for picture in batch])
                numbers = [picture.number for picture in batch]
                images = sample_images(backbone, schedule, conditioning, batch[0].seed, len(batch), samples=numbers)
                assert images is not None  # nothing stops it
                for picture, image in zip(batch, images):
                    save_png(to_picture(image), folder / picture.name)
                if world.is_first:
                    self._list(folder)
                counter.add(world.size * len(batch))
        world.gathered(None)  # until all are there
        if world.is_first and world.size > 1:
            self._list(folder)
        world.gathered(None)

    def _list(self, folder: Path) -> None:
        there = set(os.listdir(folder))
        listed = [
            {"file": picture.name, "prompt": picture.prompt, "seed": picture.seed}
            for picture in self.wanted
            if picture.name in there
        ]
        write_atomically(folder / LISTING, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")

    def _describe(self, model: Model, sampler: SamplerSettings, shapes: Backbone) -> None:
        """Note everything that a model's pictures depend on."""
        settings = model.settings
        if settings.path not in self._pipelines:
            self._pipelines[settings.path] = pipeline_identity(settings.path)
        about = {
            "pipeline": settings.path,
            "pipeline_weights": self._pipelines[settings.path],
            "run": str(model.run) if model.run else None,
            "checkpoint": model.step,
            "trained_weights": model.weights,
            "sampler": sampler.model_dump(mode="json"),
            "width": shapes.width,
            "height": shapes.height,
            "dtype": settings.dtype,
            "quantize": settings.quantize,
            "device": self.device.type,
            "software": describe_software(),
        }
        self.about[model.place] = about

    def _identify(self, model: Model) -> None:
        """Write down what the pictures are of, or check that those that lie there are of the same."""
        about = self.about[model.place]
        # Where it lies is not what it is.
        same = {key: value for key, value in about.items() if key not in ("pipeline", "run")}
        same["pictures"] = _digest([[p.name, p.prompt, p.number, p.seed] for p in self.wanted])
        place = self.folder(model) / DRAWN
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
        except FileNotFoundError:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps(same, indent=1) + "\n")
            return
        except (ValueError, OSError) as error:
            raise UserError(f"{place} cannot be read ({error}); give another --output") from error
        differing = [key for key in same if found.get(key) != same[key]]
        if differing:
            raise UserError(
                f"{place.parent} holds pictures that were drawn otherwise ({', '.join(differing)}); give another "
                "--output, or remove that folder"
            )

    def _sampler(self, config: Config | None, shapes: Backbone, path: str) -> SamplerSettings:
        """The options over the first run's settings, over those that are usual for the model."""
        options = self.arguments
        given = {"steps": options.steps, "eta": options.eta, "guidance_scale": options.guidance}
        self.samplers[path] = with_options(usual_sampler(config, shapes, path), given)
        return self.samplers[path]


def pipeline_identity(path: str) -> str:
    """Say which weights a pipeline has: the hub's commit, or the SHA-256 of a folder's weight files."""
    place = Path(local_path(path))
    if not place.is_dir():
        cached = hub.cached_file(path, "model_index.json") if hub.is_hub_id(path) else None
        return f"commit {cached.parent.name}" if cached else ""
    files = sorted(file for ending in ("safetensors", "bin") for file in place.glob(f"*/*.{ending}"))
    tell(f"hashing the weights of {path}")
    return f"sha256 {sha256_of(files)}"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
