"""Encodings of prompts, made once: on disk, and by text encoders that are loaded for the missing ones alone.

An encoding is kept under a hash of all that its bits depend on: the text encoders and tokenizers (see `identity`), the
denoiser's own shapes for it, the dtype, the device that encodes, the libraries' versions, and the prompt. What is cheap
and not of the text (time ids, an embedded guidance scale) is added when a batch is made, and no part of it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from rsaft_fast.backbones import Backbone, adapter_for, load_backbone, local_path
from rsaft_fast.backbones.turns import encode_in_turns
from rsaft_fast.data.text_files import TextFiles
from rsaft_fast.errors import UserError
from rsaft_fast.files import refuse_io_errors, replace_file
from rsaft_fast.progress import watched
from rsaft_fast.recipe.config import AUTO, BackboneSettings

FORMAT = 1
PACKAGES = ("torch", "transformers", "tokenizers", "diffusers")

Row = dict[str, torch.Tensor]
"""One prompt's tensors, each (1, ...), on the host."""


class EncodingCache:
    """Folder of encodings, one safetensors file a prompt.

    A file is complete or not there, and its bytes are checked whenever it is read. Runs may share a folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> Row | None:
        """Read the encoding, or None where there is none.

        Raises:
            DamagedEncodingError: the file is not what was written.
        """
        path = self.path(key)
        with refuse_io_errors(f"data.encoding_cache: {path}", "read", "give another folder, or set it to null"):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                return None
        try:
            header, payload = _split(content)
            if int(header["__metadata__"]["crc32"]) != zlib.crc32(payload):
                raise ValueError("its bytes have changed")
            return load(content)
        except Exception as error:  # safetensors, JSON and the header's own fields fail in many ways
            raise DamagedEncodingError(path) from error

    def write(self, key: str, row: Row) -> None:
        """Write an encoding.

        Raises:
            UserError: the folder cannot be written, or is full.
        """
        header, payload = _split(save(row))
        header["__metadata__"] = {"format": "pt", "crc32": str(zlib.crc32(payload))}
        path = self.path(key)
        otherwise = "give another folder, or set it to null, which encodes all prompts at every start"
        with refuse_io_errors(f"data.encoding_cache: {path}", or_else=otherwise):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, _join(header, payload))


class DamagedEncodingError(Exception):
    """A file of the cache differs from what was written."""


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into header and payload."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _join(header: dict[str, Any], payload: bytes) -> bytes:
    """Make a safetensors file of header and payload."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + payload


def default_folder() -> Path:
    """Give the folder `rsaft_fast/encodings` in the user's cache (XDG base directories).

    Raises:
        RuntimeError: nothing says where that is: no XDG_CACHE_HOME, no HOME, and a user id without an entry.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsaft_fast" / "encodings"


def open_cache(setting: str | None, log: Callable[[str], None]) -> EncodingCache | None:
    """Open the cache that `data.encoding_cache` names.

    Raises:
        UserError: a folder of the user's own cannot be made.
    """
    if setting is None:
        return None
    try:
        folder = default_folder() if setting == AUTO else Path(setting)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("you may not write to it")
    except (OSError, RuntimeError) as error:
        if setting != AUTO:
            raise UserError(f"data.encoding_cache {setting} cannot be made: {error}; give another folder") from error
        log(f"encodings of prompts are not kept: {error}; data.encoding_cache names another folder")
        return None
    return EncodingCache(folder)


class Encodings(Mapping[str, Row]):
    """Encodings of the prompts that a run will see; "" is the unconditional prompt.

    Made, it knows which are missing; `complete` makes those. With a cache, rows are read from the disk when they are
    asked for (2.7 MB each of SD3, 4 MB of FLUX.1); without one they are held in memory.

    Attributes:
        shapes: the backbone without a weight; or one that is whole, which then encodes by itself, at every start.
        missing: prompts that are still to be encoded.
    """

    def __init__(
        self,
        shapes: Backbone,
        settings: BackboneSettings,
        texts: Sequence[str],
        cache: EncodingCache | None,
        log: Callable[[str], None] = lambda line: None,
    ):
        """Find which encodings are there, and check that the others can be made.

        Raises:
            UserError: some are missing, and so is a text encoder.
        """
        if shapes.is_whole:
            cache = None  # nothing is known of what its encodings depend on
        self.shapes, self.settings, self.cache, self.log = shapes, settings, cache, log
        self.texts = list(dict.fromkeys(texts))
        self.files = TextFiles(local_path(settings.path), None if cache is None else cache.folder)
        self._rows: dict[str, Row] = {}
        self._keys: dict[str, str] = {}
        self._find()
        if self.missing and not shapes.is_whole:
            self._require_text_encoders()
        for note in shapes.notes + tuple(shapes.cut_prompts(self.texts)):
            log(note)

    def __getitem__(self, text: str) -> Row:
        if text in self._rows:
            return self._rows[text]
        if self.cache is None or text not in self._keys or text in self.missing:
            raise KeyError(text)
        try:
            row = self.cache.read(self._keys[text])
        except DamagedEncodingError:
            row = None
        if row is None:
            raise UserError(
                f"the encoding of {text!r} in {self.cache.folder} was there at the start, and is gone or damaged now; "
                "resume=auto encodes it again"
            )
        return row

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def complete(self, stage: Callable[[str], None] = lambda line: None) -> None:
        """Encode what is missing; the text encoders, one at a time on the device, are loaded for it and freed.

        Args:
            stage: takes a line about what begins now.

        Raises:
            UserError: they cannot be loaded, or do not fit the denoiser.
        """
        if not self.missing:
            stage(f"encodings of all {len(self.texts)} prompts are there: no text encoder is loaded")
            return
        stage(f"loading the text encoders: {len(self.missing)} of {len(self.texts)} prompts are to be encoded")
        backbone = self.shapes if self.shapes.is_whole else load_text_encoders(self.settings, self.shapes)
        texts = list(self.missing)
        stage(f"encoding {len(texts)} prompts")
        rows = encode_in_turns(backbone, [text or None for text in texts])
        for text, row in zip(texts, watched(rows, "encoding prompts", len(texts))):
            self._keep(text, row)
        self.files.remember()
        del backbone, rows
        free_memory(self.shapes.device)

    def _keep(self, text: str, row: Row) -> None:
        if self.cache is None:
            self._rows[text] = row
        else:
            self.cache.write(self._keys[text], row)
        del self.missing[text]

    def _find(self) -> None:
        """Find the encodings that are there, complete."""
        identity = self.files.identity() if self.cache is not None else None
        self.missing = dict.fromkeys(self.texts)
        if self.cache is None or identity is None:
            return
        common = hashlib.sha256(json.dumps(self._determinants(identity), sort_keys=True).encode()).hexdigest()
        self._keys = {text: hashlib.sha256(f"{common} {text}".encode()).hexdigest() for text in self.texts}
        for text in watched(self.texts, "reading encodings", len(self.texts)):
            try:
                row = self.cache.read(self._keys[text])
            except DamagedEncodingError as error:
                self.log(f"{error.args[0]} is damaged: its prompt is encoded again")
                continue
            if row is not None:
                del self.missing[text]

    def _determinants(self, identity: dict[str, str]) -> dict[str, Any]:
        """List all that an encoding's bits depend on, but for the prompt."""
        shapes, device = self.shapes, self.shapes.device
        return {
            "format": FORMAT,
            "encoders": identity,
            "pipeline": type(shapes.pipeline).__name__,  # pyrefly: ignore[missing-attribute]
            "zeros": bool(shapes.pipeline.config.get("force_zeros_for_empty_prompt", False)),  # pyrefly: ignore[missing-attribute]
            "shapes": {name: list(shape) for name, shape in shapes.embedding_shapes.items()},
            "dtype": str(shapes.compute_dtype),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "matmul": torch.get_float32_matmul_precision(),
            "software": {name: metadata.version(name) for name in PACKAGES},
        }

    def _require_text_encoders(self) -> None:
        absent = self.files.without_weights()
        if absent:
            where = "data.encoding_cache is null" if self.cache is None else f"not in {self.cache.folder}"
            raise UserError(
                f"{len(self.missing)} of {len(self.texts)} prompts must be encoded ({where}), and "
                f"{self.settings.path} has no weights of {' and '.join(absent)}; put them back, or name the folder "
                "that holds the encodings"
            )
        adapter_for(self.settings.path)


def load_shapes(settings: BackboneSettings, dtype: torch.dtype, device: torch.device) -> Backbone:
    """Load the recipe's backbone without a weight: seconds and megabytes. One of the user's own is whole."""
    size = {"height": settings.height, "width": settings.width}
    return load_backbone(settings.path, **size, dtype=dtype, device=device, text=False, networks=False)


def load_text_encoders(settings: BackboneSettings, shapes: Backbone) -> Backbone:
    """Load the recipe's backbone with its text encoders alone, on the host."""
    size = {"height": shapes.height, "width": shapes.width}
    return load_backbone(settings.path, **size, dtype=shapes.compute_dtype, device=shapes.device, networks=False)


class Watched(list):
    """Prompts, with a bar beside whoever goes through them."""

    def __init__(self, prompts: Iterable[str], what: str):
        super().__init__(prompts)
        self.what = what

    def __iter__(self) -> Iterator[str]:
        return iter(watched(super().__iter__(), self.what, len(self)))


def free_memory(device: torch.device) -> None:
    """Give the device back what nothing refers to any more.

    The host's memory can wait for Python's own collections.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
