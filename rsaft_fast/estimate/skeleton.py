"""Pipelines on the meta device, from their config files: every shape, no weight."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from rsaft_fast.backbones import ADAPTERS, Backbone, Quantization, adapter_for
from rsaft_fast.backbones.casting import cast_network
from rsaft_fast.backbones.family import Family, Parts
from rsaft_fast.backbones.folder import INDEX, read_index, read_pipeline
from rsaft_fast.backbones.own import is_own, make_own
from rsaft_fast.backbones.pipeline import required_components
from rsaft_fast.backbones.published import KNOWN, published_pipeline
from rsaft_fast.errors import UserError
from rsaft_fast.hub import cached_file
from rsaft_fast.pretrained import library_errors, read_config
from rsaft_fast.rewards.text import LengthTokenizer


def skeleton_backbone(
    path: str,
    *,
    height: int | None,
    width: int | None,
    dtype: torch.dtype,
    offload_blocks: int = 0,
    quantize: Quantization | None = None,
) -> tuple[Backbone, list[str]]:
    """The backbone at a folder or hub id on the meta device, and what there is to say about where it came from.

    Raises:
        UserError: no pipeline there, and none published of that name that is known here.
    """
    how = {"height": height, "width": width, "dtype": dtype, "device": "meta"}
    how |= {"offload_blocks": offload_blocks, "quantize": quantize}
    if is_own(path):
        return make_own(path, **how), []
    family, parts, settings, notes = pipeline_parts(path)
    options = family.unused
    components = {**dict.fromkeys(required_components(family.pipeline_class)), **settings, **options}
    with quiet(), torch.device("meta"):
        for part, (library, kind, config) in parts.items():
            if part not in options and part in components:
                with library_errors(
                    f"{path}: no {kind} can be made of {part}'s config",
                    "it is damaged or of another class: download it anew",
                ):
                    components[part] = _component(part, library, kind, config, dtype)
        pipeline = family.pipeline_class(**components)
    return ADAPTERS[family.pipeline_class.__name__](pipeline, **how), notes


def _component(part: str, library: str, kind: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    if part.startswith("tokenizer"):
        return LengthTokenizer(min(int(config.get("model_max_length") or 77), 4096))
    if library == "diffusers":
        made = getattr(diffusers, kind)
        if part.startswith("scheduler"):
            with torch.device("cpu"):  # its tables are numbers that the schedule is made of
                return made.from_config(config)
        return cast_network(made.from_config(config), dtype).eval()
    made = getattr(transformers, kind)
    return made(made.config_class.from_dict(dict(config))).to(dtype).eval()


def pipeline_parts(path: str) -> tuple[Family, Parts, dict[str, Any], list[str]]:
    """Find the configs of the pipeline at a folder or hub id, and what there is to say about where they came from.

    Third are arguments of the pipeline's class beside its components, where a folder has some.

    Raises:
        UserError: no pipeline there, and none published of that name that is known here.
    """
    if path == "playground":
        from rsaft_fast.playground import pipeline_path

        path = str(pipeline_path())
    folder = Path(path)
    if not os.path.exists(folder):
        cached = cached_file(path, INDEX)
        folder = cached.parent if cached is not None else folder
    if os.path.exists(folder):
        family = adapter_for(folder, text=False).family
        return family, _parts_of_folder(folder), read_pipeline(folder, family, text=False).settings, []
    found = published_pipeline(path)
    if found is None:
        raise UserError(
            f"backbone.path {path!r} is neither a folder nor in the hub's cache here, and no published architecture is "
            f"known by that name (known: {', '.join(KNOWN)}); give a folder, or download the pipeline first"
        )
    family, parts = found
    name = family.pipeline_class.__name__
    return family, parts, {}, [f"{path} is not on this machine: shapes are those of the published {name} of that name"]


def _parts_of_folder(folder: Path) -> Parts:
    parts = {}
    for name, entry in read_index(folder, folder).items():
        if not isinstance(entry, list) or not all(isinstance(text, str) for text in entry) or len(entry) != 2:
            continue
        config = next(
            (
                folder / name / file
                for file in ("config.json", "scheduler_config.json", "tokenizer_config.json")
                if os.path.isfile(folder / name / file)
            ),
            None,
        )
        if config is not None:
            parts[name] = (*entry, read_config(config, f"{name}'s config"))
    return parts


@contextmanager
def quiet():
    """Without the remarks that libraries make on modules that are built by hand."""
    with ExitStack() as stack:
        for library in (diffusers, transformers):
            before = library.utils.logging.get_verbosity()
            library.utils.logging.set_verbosity_error()
            stack.callback(library.utils.logging.set_verbosity, before)
        yield
