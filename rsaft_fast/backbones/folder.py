"""A pipeline's folder, as diffusers saves it: read and checked by its small files before any weight is.

Nothing in it decides which code runs: classes are those that the pipeline class itself names, of diffusers and
transformers alone.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import SchedulerMixin
from transformers import PreTrainedTokenizerFast

from rsaft_fast import hub
from rsaft_fast.backbones.configs import check_keys, is_a
from rsaft_fast.backbones.family import Family
from rsaft_fast.backbones.parts import Part, config_name
from rsaft_fast.errors import UserError
from rsaft_fast.files import refuse_io_errors
from rsaft_fast.pretrained import DIFFUSERS, TRANSFORMERS, Weights, choose_weights, read_config
from rsaft_fast.reading import open_regular

INDEX = "model_index.json"
SMALL_FILES = (INDEX, "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")
# Safety checkers of the first releases name the module that diffusers had for them; they are never loaded.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
_CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


@dataclass(frozen=True)
class PipelineFolder:
    """What a pipeline's small files say.

    Attributes:
        path: as the user gave it.
        folder: where it lies; of a hub id, in the hub's cache.
        parts: by name, in the index's order.
        settings: arguments of the pipeline's class beside its components.
        notes: lines about keys that are left unread.
    """

    path: str
    folder: Path
    parts: dict[str, Part]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    def weights(self, names: Sequence[str]) -> dict[str, Weights]:
        """The weight files of these parts; of a hub id they are downloaded."""
        listed = _hub_files(self.path, self.folder) if hub.is_on_hub(self.path) else None
        chosen = {}
        for name in names:
            part = self.parts[name]
            bases = DIFFUSERS if part.made.__module__.startswith("diffusers.") else TRANSFORMERS
            files = _names(part.folder) if listed is None else _below(listed, name)
            chosen[name] = choose_weights(f"{self.path}/{name}", files, bases)
        if listed is not None:
            files = [f"{name}/{file}" for name, found in chosen.items() for file in found.files]
            hub.snapshot("pipeline", self.path, files, revision=self.folder.name)
        return chosen


def is_text_encoder(name: str) -> bool:
    """Whether a pipeline's component of that name is one."""
    return re.fullmatch(r"text_encoder(_\d+)?", name) is not None


def find_folder(path: str | Path) -> Path:
    """The folder of a pipeline: `path`, or the hub's cache with the small files of the repository of that id.

    Raises:
        UserError: neither, a single file, or a hub that does not give it.
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            return folder
        if folder.is_file():
            raise UserError(_about_file(folder))
        exists = folder.exists()
    except (OSError, ValueError) as error:
        raise UserError(f"no diffusers pipeline at {str(path)!r}: {error}") from error
    if exists:
        raise UserError(f"no diffusers pipeline at {path}: it is neither a folder nor a file")
    if not hub.is_hub_id(path):
        raise UserError(f"no diffusers pipeline at {path}: there is no such folder, and it is no hub id (owner/name)")
    return _hub_folder(str(path))


@lru_cache(maxsize=8)
def _hub_folder(repository: str) -> Path:
    """Once a process: a run has one commit, and asks once."""
    return hub.snapshot("pipeline", repository, SMALL_FILES)


@lru_cache(maxsize=8)
def _hub_files(repository: str, folder: Path) -> tuple[str, ...]:
    """The repository's files at the commit of `folder`; without a connection, those in the cache."""
    try:
        files = hub.reach(
            "pipeline", repository, lambda it: it.HfApi().list_repo_files(repository, revision=folder.name)
        )
    except UserError:
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return tuple(files)


def _below(files: Sequence[str], folder: str) -> list[str]:
    return [name for file in files for head, _, name in [file.rpartition("/")] if head == folder]


def _about_file(file: Path) -> str:
    """What to do with a single file in place of a pipeline's folder."""
    if file.suffix not in _CHECKPOINTS:
        return f"{file} is a file; give the folder of a diffusers pipeline, or its hub id"
    folder = file.with_suffix("")
    return (
        f"{file} is a single-file checkpoint (or a LoRA, which goes to --lora); make a folder of it once: python -c "
        f'"from diffusers import StableDiffusionPipeline as P; P.from_single_file({str(file)!r})'
        f'.save_pretrained({str(folder)!r})" (another kind has a class of its own), and give {folder}'
    )


def read_index(path: str | Path, folder: Path) -> dict[str, Any]:
    """The content of a pipeline's model_index.json.

    Raises:
        UserError: not there, damaged, or with a library that is not diffusers or transformers.
    """
    if not os.path.lexists(folder / INDEX):
        raise UserError(f"{path} has no {INDEX}; give the folder of a diffusers pipeline, or its hub id")
    index = read_config(folder / INDEX, "pipeline index")
    for name, entry in index.items():
        if not isinstance(entry, list) or name == "_class_name" or entry == [None, None] or is_setting(entry):
            continue
        if len(entry) != 2 or not all(isinstance(text, str) for text in entry):
            raise UserError(f"{path}: {INDEX} has {name}: {entry}; expected [library, class]: download it anew")
        if entry[0] not in LIBRARIES:
            raise UserError(
                f"{path}: {INDEX} takes {name} from {entry[0]!r}; only classes of diffusers and transformers are "
                "loaded, for another library's code would run"
            )
    return index


def read_pipeline(path: str | Path, family: Family, text: bool = True) -> PipelineFolder:
    """Read and check all small files of a pipeline of that family.

    Args:
        text: whether the text encoders must be there.

    Raises:
        UserError: a file or folder is missing or damaged, a class or a key that its adapter cannot do justice to.
    """
    folder = find_folder(path)
    index = read_index(path, folder)
    expected = typing.get_type_hints(family.pipeline_class.__init__)
    unused = [name for name, value in family.unused.items() if value is None]
    notes, parts, settings = [], {}, {}
    for name, entry in index.items():
        if name.startswith("_") or name in unused:
            continue
        if entry is not None and _takes_numbers(expected.get(name)):
            settings[name] = _checked_setting(path, family, name, entry, expected[name])
        elif not isinstance(entry, list):
            if entry not in (None, False):
                notes.append(f"{path}: {INDEX} has {name}: {entry}, left unread")
        elif is_setting(entry):
            raise UserError(f"{path}: {INDEX} has {name}: {entry}; expected [library, class]: download it anew")
        elif name not in expected:
            raise UserError(
                f"{path}: {INDEX} names {name}, which a {family.pipeline_class.__name__} does not have; its pictures "
                "would be others: give a pipeline without"
            )
        elif any(entry) and (text or not is_text_encoder(name)):
            parts[name] = _read_part(path, folder, name, entry, expected[name], family)
    _require(path, family, parts, text)
    for part in parts.values():
        notes += check_keys(str(path), part, family)
    return PipelineFolder(str(path), folder, parts, settings, tuple(notes))


def is_setting(entry: Any) -> bool:
    """Tell whether an entry of the index is a list of numbers (layers of a text encoder), and names no component."""
    return isinstance(entry, list) and bool(entry) and all(type(item) is int for item in entry)


def _takes_numbers(expected: Any) -> bool:
    """Whether an argument of a pipeline's constructor is a number or several, and no component."""
    inner = typing.get_args(expected)
    if typing.get_origin(expected) in (tuple, list):
        return set(inner) <= {int, float, Ellipsis}
    return expected in (bool, int, float) or any(_takes_numbers(one) for one in inner)


def _checked_setting(path: str | Path, family: Family, name: str, entry: Any, expected: Any) -> Any:
    """An argument of the pipeline's constructor that is no component; of another kind it would mean another picture."""
    if is_a(entry, expected):
        return entry
    raise UserError(
        f"{path}: {INDEX} has {name}: {entry!r}; {family.pipeline_class.__name__} takes {expected}: mend it"
    )


def _require(path: str | Path, family: Family, parts: dict[str, Part], text: bool) -> None:
    """Parts without which nothing runs."""
    for name in (family.denoiser_name, "vae", "scheduler"):
        if name not in parts:
            raise UserError(f"{path} names no {name} in its {INDEX}; nothing can be drawn without: download it anew")
    for name in family.text_encoders if text else ():
        if name not in parts:
            raise UserError(f"{path} names no {name} in its {INDEX}; prompts cannot be encoded without")
    for name in parts:
        tokenizer = name.replace("text_encoder", "tokenizer")
        if tokenizer != name and tokenizer not in parts:
            raise UserError(f"{path} names no {tokenizer} in its {INDEX}; prompts cannot be encoded without")


def _read_part(path: str | Path, folder: Path, name: str, entry: list[str], expected: Any, family: Family) -> Part:
    """A component's config, and the class that it becomes."""
    place = folder / name
    if not os.path.lexists(place):
        raise UserError(f"{path} is incomplete: its {INDEX} names {name}, and there is no such folder")
    made = _class_of(path, name, entry, expected, family.component_classes.get(name))
    file = place / config_name(name)
    present = _names(place)
    config = {}
    if file.name in present or not name.startswith("tokenizer"):
        config = read_config(file, f"{name}'s config")
    part = Part(name, place, made, config)
    if name.startswith("tokenizer"):
        _check_tokenizer(path, part, present)
    elif part.is_network:
        _check_network(path, part, family)
    return part


def _class_of(path: str | Path, name: str, entry: list[str], expected: Any, known: Mapping[str, type] | None) -> type:
    """The class that an entry of the index names, provided that the pipeline takes it.

    Args:
        expected: what the pipeline's constructor says that it takes.
        known: by the names that the index may have, what they become, where the constructor does not say it.
    """
    library, kind = entry
    if known is not None:
        if library == "transformers" and (made := known.get(kind.removesuffix("Fast"))) is not None:
            return made
        raise UserError(
            f"{path}: {INDEX} has {library}.{kind} for {name}; this pipeline's is transformers' {' or '.join(known)}"
        )
    if name == "scheduler" and not (isinstance(expected, type) and issubclass(expected, SchedulerMixin)):
        made = getattr(diffusers, kind, None) if library == "diffusers" else None
        if not (isinstance(made, type) and issubclass(made, SchedulerMixin)):
            raise UserError(f"{path}: {INDEX} has the scheduler {library}.{kind}, which diffusers does not have")
        return made
    # The two names of a tokenizer's class mean the same since transformers 5.
    wanted = expected.__name__
    if kind.removesuffix("Fast") != wanted.removesuffix("Fast") or not expected.__module__.startswith(f"{library}."):
        raise UserError(f"{path}: {INDEX} has {library}.{kind} for {name}; this pipeline's is a {wanted}")
    return getattr(transformers, kind, expected) if library == "transformers" else expected


def _check_network(path: str | Path, part: Part, family: Family) -> None:
    """A config of another class may load, with parts of both; weights that are stored quantised cannot be read."""
    named, wanted = part.config.get("_class_name", part.made.__name__), part.made.__name__
    if part.made.__module__.startswith("transformers."):
        wanted = part.made.config_class.model_type
        named = part.config.get("model_type", wanted)
        if named == "clip" and wanted == "clip_text_model":
            named = wanted  # the config of both towers, of which this is one
    if named != wanted:
        raise UserError(f"{path}: {part.name}/{part.config_file.name} is of a {named}, and {INDEX} says {wanted}")
    if method := part.config.get("quantization_config"):
        how = method.get("quant_method") if isinstance(method, dict) else method
        mend = ", and set backbone.quantize to nf4, int8 or fp8" if part.name == family.denoiser_name else ""
        raise UserError(
            f"{path}: {part.name} is stored quantised (quant_method {how}); give the pipeline with whole weights{mend}"
        )


def _check_tokenizer(path: str | Path, part: Part, present: Sequence[str]) -> None:
    """transformers makes a tokenizer without words where their files are missing."""
    named = part.config.get("tokenizer_class")
    if (
        isinstance(named, str)
        and part.made is not PreTrainedTokenizerFast
        and named.removesuffix("Fast") != part.made.__name__.removesuffix("Fast")
    ):
        raise UserError(
            f"{path}: {part.name}/{part.config_file.name} is of a {named}, and {INDEX} says {part.made.__name__}"
        )
    pairs = "CLIP" in part.made.__name__ or "Qwen2" in part.made.__name__
    own = ("vocab.json", "merges.txt") if pairs else ("spiece.model",)
    words = ("tokenizer.json",) if "tokenizer.json" in present else own
    if not set(words) <= set(present):
        raise UserError(f"{path}: {part.name} holds neither tokenizer.json nor {' and '.join(own)}; download it anew")
    for name in words:
        with open_regular(part.folder / name, f"{part.name}'s file"):
            pass  # what is no regular file, transformers takes to be missing


def _names(folder: Path) -> list[str]:
    with refuse_io_errors(repr(str(folder)), "read", "give the folder of a model"):
        return sorted(os.listdir(folder))
