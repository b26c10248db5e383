"""Models as diffusers and transformers save them: a folder with a config and weights, read so that nothing is missed.

Both libraries go on where a file does not fit its config, draw what is missing and mention it in a log. Here that is an
error. A stranger's file can be damaged in any way; whatever a library raises becomes one line that names the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rsaft_fast.errors import UserError, describe_error, first_line
from rsaft_fast.files import refuse_io_errors
from rsaft_fast.reading import open_regular, read_text

LFS_POINTER = "version https://git-lfs"

_CONFIG_BYTES = 2**22
_MOST_LAYERS, _LARGEST = 1000, 2**20
"""Networks of a thousand layers, or with a side of a million, would be built for minutes before they fail."""
# SD3's table of positions has this side squared, and is computed before any weight is read.
_SIDES, _LONGEST_SIDE = ("pos_embed_max_size",), 1024
_LAYERS = re.compile(r"(^|_)(layers|blocks)(_|$)")
# -Infinity in every config of diffusers' DPM-Solver, as it is saved.
_MAY_BE_INFINITE = ("lambda_min_clipped",)

_WEIGHTS = re.compile(
    r"(?P<base>diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?"
    r"(?:\.(?P<late>\w+))?\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<of>\w+))?\.json)?"
)
# How the names of weight files begin, by format.
DIFFUSERS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
TRANSFORMERS = {"safetensors": "model", "bin": "pytorch_model"}


def read_config(path: Path, what: str) -> dict[str, Any]:
    """Read the JSON object in a config file of a model.

    Args:
        what: how messages call the file, such as "config".

    Raises:
        UserError: not there, no JSON object, NaN or infinity in it, or numbers that no model has.
    """
    text = read_text(path, what, _CONFIG_BYTES)
    if text.startswith(LFS_POINTER):
        raise UserError(f"{what} {str(path)!r} is a Git LFS pointer, not the file; fetch it with git lfs pull")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {str(path)!r} is not JSON ({first_line(error)}); download it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {str(path)!r} holds a {type(content).__name__}, not a JSON object; download it anew")
    for key, value in content.items():
        if fault := _fault(key, value):
            raise UserError(f"{what} {str(path)!r}: {key} {fault}; it is damaged or no model's: download it anew")
    return content


def _fault(key: str, value: Any) -> str | None:
    """Say what makes a value impossible in a model's config, or None."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (list, dict)):
            waiting += item.values() if isinstance(item, dict) else item
        elif isinstance(item, float) and not math.isfinite(item) and key not in _MAY_BE_INFINITE:
            return f"is {item}, which is not finite"
        # Tokenizers without a limit have 1e30 here.
        elif isinstance(item, int) and abs(item) > _LARGEST and key != "model_max_length":
            return f"is {_shown(item)}; the limit is {_LARGEST}"
        elif isinstance(item, (int, float)) and item < 0 and key.startswith("num_"):
            return f"is {_shown(item)}; no count is below 0"
        elif isinstance(item, (int, float)) and (_LAYERS.search(key) or key in _SIDES):
            limit = _LONGEST_SIDE if key in _SIDES else _MOST_LAYERS
            if item > limit:
                return f"is {_shown(item)}; the limit is {limit}"
    return None


def _shown(number: float) -> str:
    return f"{float(number):.3g}" if abs(number) < 1e300 else "more than 1e300"


@dataclass(frozen=True)
class Weights:
    """Weight files of one model.

    Attributes:
        files: names within its folder; of shards, their index is among them.
        variant: what diffusers and transformers call the middle of such names ("fp16"); None without.
        format: "safetensors" or "bin".
    """

    files: tuple[str, ...]
    variant: str | None
    format: str

    @property
    def options(self) -> dict[str, Any]:
        """Give the keywords for `from_pretrained`."""
        return {"variant": self.variant, "use_safetensors": self.format == "safetensors"}


def choose_weights(where: str, names: Iterable[str], bases: Mapping[str, str]) -> Weights:
    """Choose a folder's weight files: safetensors before pickles, and the plain ones before variants.

    Args:
        where: the folder, for messages.
        names: of the files in it.
        bases: how their names begin: `DIFFUSERS` or `TRANSFORMERS`.

    Raises:
        UserError: none there, or several variants and nothing plain.
    """
    found: dict[tuple[str | None, str], list[str]] = {}
    for name in sorted(names):
        match = _WEIGHTS.fullmatch(name)
        if match is None or match["base"] != bases[match["format"]]:
            continue
        variant = match["variant"] or match["late"] or match["of"]
        found.setdefault((variant, match["format"]), []).append(name)
    plain = [kind for kind in bases if (None, kind) in found]
    if plain:
        return Weights(tuple(found[None, plain[0]]), None, plain[0])
    for kind in bases:
        variants = [key for key in found if key[1] == kind]
        if len(variants) > 1:
            files = ", ".join(name for key in variants for name in found[key] if "-of-" not in name)
            raise UserError(
                f"{where} holds weights in several variants and none without ({files}); name the one that you want "
                f"{bases[kind]}.{kind}"
            )
        if variants:
            return Weights(tuple(found[variants[0]]), *variants[0])
    raise UserError(f"{where} holds no weights; expected {bases['safetensors']}.safetensors: download it anew, whole")


def check_weights(folder: Path, weights: Weights) -> list[Path]:
    """Check weight files without reading them: there, whole, and what their names say.

    Returns:
        The files that hold weights, without indices.

    Raises:
        UserError: one is missing, empty, cut short, or a Git LFS pointer.
    """
    names = [name for name in weights.files if not name.endswith(".json")]
    indices = [name for name in weights.files if name.endswith(".json")]
    for index in indices:
        names += _shards(folder / index)
    if not indices and all("-of-" in name for name in names):
        raise UserError(f"{str(folder)!r} holds {names[0]} without the index that says what is in it; download it too")
    files = [folder / name for name in dict.fromkeys(names)]
    for file in files:
        check_file(file)
    return files


def _shards(index: Path) -> list[str]:
    """List the files that an index names."""
    placed = read_config(index, "index of weights").get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise UserError(f"index of weights {str(index)!r} has no weight_map; download it anew")
    shards = sorted(set(placed.values()))
    if odd := [name for name in shards if Path(name).name != name]:
        raise UserError(f"index of weights {str(index)!r} names {odd[0]!r}, which is no file beside it")
    return shards


def check_file(path: Path) -> None:
    """Check one weight file without reading it; errors as `check_weights`."""
    with refuse_io_errors(f"weight file {str(path)!r}", "read"), open_regular(path, "weight file") as stream:
        start = stream.read(len(LFS_POINTER))
    if not start:
        raise UserError(f"weight file {str(path)!r} is empty; download it anew")
    if start == LFS_POINTER.encode():
        raise UserError(f"weight file {str(path)!r} is a Git LFS pointer, not weights; fetch them with git lfs pull")
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"weight file {str(path)!r} is cut short or damaged ({first_line(error)}); download it anew"
        ) from error


@contextmanager
def library_errors(what: str, mend: str) -> Iterator[None]:
    """Turn whatever a library raises at a stranger's files into a `UserError` of one line: what, why and the mend.

    JSON, safetensors, pickle, validation of configs and checks of shapes each raise their own kinds. A `UserError`, and
    a device's memory that ran out, stay as they are.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what} ({describe_error(error)}); {mend}") from error


def load_model(
    model_class: type,
    folder: Path,
    weights: Weights | None = None,
    unread: str | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Load a model of diffusers or transformers from its folder, every weight of it from the file.

    Args:
        weights: what `choose_weights` said; None leaves it to the library.
        unread: regular expression of weights in the file that the model may leave unread; None refuses all.
        options: of `from_pretrained`, such as dtype.

    Raises:
        UserError: it does not load, a weight is missing, of another shape, or would be left unread.
    """
    if weights is not None:
        check_weights(folder, weights)
        options |= weights.options
    with library_errors(
        f"{str(folder)!r} could not be loaded as a {model_class.__name__}",
        "its files are damaged or do not belong together: download them anew",
    ):
        model, info = model_class.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True, **options
        )
    missing, unknown, other = (
        sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    if unread is not None:
        unknown = [name for name in unknown if not re.search(unread, name)]
    for names, meaning in (
        (missing, "the file lacks"),
        (unknown, "the config has no place for"),
        (other, "the config has another shape for"),
    ):
        if names:
            raise UserError(
                f"{str(folder / 'config.json')!r} does not match its weights: {meaning} {len(names)} of them, "
                f"{names[0]} first; a {model_class.__name__} with drawn or dropped weights would be another model"
            )
    return model
