"""Identity of a pipeline's text encoders and tokenizers, from their files, without loading them."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from rsaft_fast.backbones import is_text_encoder
from rsaft_fast.backbones.folder import INDEX, is_setting, read_index
from rsaft_fast.files import replace_file
from rsaft_fast.hub import cached_file

WEIGHTS = (".safetensors", ".bin")

WINDOWS, WINDOW = 16, 2**16
"""Of a weight file, this many pieces of so many bytes are read."""


class TextFiles:
    """Files of a pipeline's text encoders and tokenizers.

    A pipeline of the hub is its commit, which names the content of every file. One in a folder is the content of its
    tokenizers and configs, and of each weight file the size, the time of its last change and a megabyte spread over it,
    the safetensors header included: to hash the 10 GB of T5-XXL at every start takes longer than to encode a hundred
    prompts. Every program that changes a file sets its time; one that is put in its place with an old time, of the same
    size and architecture, differs in the megabyte, as fine-tuning changes weights everywhere.

    Where weights have been deleted, the identity is the one seen when they were last there (`remember`), provided that
    what is left of the encoder is the same.
    """

    def __init__(self, path: str | Path, memory: Path | None):
        """`path`: folder or hub id. `memory`: the cache's folder; None remembers nothing."""
        self.path, self.memory = str(path), memory
        self.folder = Path(path)
        self.is_local = os.path.isdir(self.folder)

    def identity(self) -> dict[str, str] | None:
        """Give the identity of each component; None where it cannot be told (yet)."""
        if not self.is_local:
            index = cached_file(self.path, INDEX)
            return {"hub": f"{self.path}@{index.parent.name}"} if index is not None else None
        found = {name: self._of_component(name) for name in self.components}
        known = {name: digest for name, digest in found.items() if digest is not None}
        return known | self._settings if len(known) == len(found) else None

    @cached_property
    def components(self) -> list[str]:
        """List the names of the text encoders and tokenizers of a folder's index."""
        index = read_index(self.path, self.folder)
        parts = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
        return [name for name in parts if is_text_encoder(name) or name.startswith("tokenizer")]

    @property
    def _settings(self) -> dict[str, str]:
        """What the index itself says of the text: which layers of the encoder are taken."""
        index = read_index(self.path, self.folder)
        return {name: json.dumps(entry) for name, entry in index.items() if is_setting(entry)}

    def without_weights(self) -> list[str]:
        """List the text encoders of a folder that cannot be loaded."""
        if not self.is_local:
            return []
        return [name for name in self.components if is_text_encoder(name) and not self._weights(name)]

    def remember(self) -> None:
        """Write down the identity for the day on which weights are deleted."""
        if self.memory is None or not self.is_local or self.without_weights():
            return
        noted = {
            name: {"identity": self._of_component(name), "rest": self._rest(name)}
            for name in self.components
            if is_text_encoder(name)
        }
        note = json.dumps({"folder": str(self.folder.resolve()), "encoders": noted}, indent=1)
        place = self._note(self.memory)
        with suppress(OSError):  # it saves an encoding one day, and is no reason to end a run
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(place, note.encode())

    def _note(self, memory: Path) -> Path:
        name = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()
        return memory / "pipelines" / f"{name}.json"

    def _of_component(self, name: str) -> str | None:
        if not is_text_encoder(name) or self._weights(name):
            return _digest(self.folder / name)
        if self.memory is None:
            return None
        try:
            noted = json.loads(self._note(self.memory).read_text(encoding="utf-8"))["encoders"][name]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        same = not os.path.exists(self.folder / name) or noted["rest"] == self._rest(name)
        return noted["identity"] if same else None

    def _weights(self, name: str) -> list[Path]:
        return [path for path in (self.folder / name).rglob("*") if path.suffix in WEIGHTS and path.is_file()]

    def _rest(self, name: str) -> str:
        return _digest(self.folder / name, weights=False)


def _digest(folder: Path, weights: bool = True) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        is_weights = path.suffix in WEIGHTS
        if is_weights and not weights:
            continue
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        if not is_weights:
            digest.update(path.read_bytes())
            continue
        digest.update(str(path.stat().st_mtime_ns).encode())
        for piece in _pieces(path):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path):
    """Choose pieces evenly spread over the file, its first and last bytes among them."""
    last = max(path.stat().st_size - WINDOW, 0)
    with path.open("rb") as stream:
        for index in range(WINDOWS):
            stream.seek(last * index // (WINDOWS - 1))
            yield stream.read(WINDOW)
