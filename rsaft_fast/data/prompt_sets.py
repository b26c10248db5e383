"""Public prompt sets by name: where each is published, and what it is worth knowing before training on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rsaft_fast import hub
from rsaft_fast.data.pictures import natural_key
from rsaft_fast.errors import UserError

HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
_TABLES = ("*.csv", "*.tsv", "*.json", "*.jsonl", "*.txt", "data/*.parquet")


@dataclass(frozen=True)
class PromptSet:
    """Published prompt set.

    Attributes:
        files: patterns of its files below the repository, in the set's order; one file each.
        count: prompts in all, duplicates included.
        hub: id of the dataset on the Hugging Face hub; "" where it is not there.
        home: where it is published otherwise.
        column: of the prompt, where it has a name of its own; None for one of the usual.
        one_a_file: every file of the pattern is one prompt.
    """

    files: tuple[str, ...]
    count: int
    hub: str = ""
    home: str = ""
    column: str | None = None
    one_a_file: bool = False

    @property
    def place(self) -> str:
        """Say where to download the set by hand."""
        where = f"the dataset {self.hub} on the Hugging Face hub" if self.hub else self.home
        return f"{', '.join(self.files)} from {where}"


def _hpdv2(*styles: str) -> PromptSet:
    return PromptSet(tuple(f"benchmark/{style}.json" for style in styles), 800 * len(styles), hub="zhwang/HPDv2")


SETS = {
    "drawbench": PromptSet(_TABLES, 200, hub="sayakpaul/drawbench"),
    "hpdv2": _hpdv2(*HPDV2_STYLES),
    **{f"hpdv2-{style}": _hpdv2(style) for style in HPDV2_STYLES},
    # The prompts that the preference data set's own test split was rated on; FlowBP (arXiv 2606.11075) reports on them.
    "hpdv2-400": PromptSet(("test.json",), 400, hub="zhwang/HPDv2"),
    "partiprompts": PromptSet(("PartiPrompts.tsv",), 1632, hub="nateraw/parti-prompts"),
    "geneval": PromptSet(("prompts/evaluation_metadata.jsonl",), 553, home="github.com/djghosh13/geneval"),
    "geneval2": PromptSet(("geneval2_data.jsonl",), 800, home="github.com/facebookresearch/GenEval2"),
    "dpg-bench": PromptSet(("dpg_bench/prompts/*.txt",), 1065, home="github.com/TencentQQGYLab/ELLA", one_a_file=True),
    "unigenbench": PromptSet(
        ("data/test_prompts_en.csv",), 600, home="github.com/CodeGoat24/UniGenBench", column="prompt_en"
    ),
    "ocr": PromptSet(("dataset/ocr/test.txt",), 1018, home="github.com/yifan123/flow_grpo"),
    "pickapic": PromptSet(("data/test_unique-*.parquet",), 500, hub="yuvalkirstain/pickapic_v1_no_images"),
}


def named_set(source: str) -> tuple[str, str] | None:
    """Split `source`, NAME or NAME=PATH, into the set's name and the path ("" for none); None for anything else."""
    name, _, path = source.partition("=")
    return (name, path) if name in SETS else None


def set_files(name: str, path: str = "") -> list[Path]:
    """Find the files of a set: at `path` (a file, or a folder that holds them), else in the hub's cache or the hub.

    Raises:
        UserError: nothing there, or a hub that cannot be reached; it says which file to download from where.
    """
    wanted = SETS[name]
    if not path:
        return _found(name, _fetch(name, wanted), wanted)
    place = Path(path)
    if os.path.isfile(place):
        return [place]
    if not os.path.isdir(place):
        raise UserError(f"prompts {name}={path}: nothing is there; download {wanted.place}")
    return _found(name, place, wanted)


def _fetch(name: str, wanted: PromptSet) -> Path:
    if not wanted.hub:
        raise UserError(
            f"prompt set {name!r} is not on the Hugging Face hub: download {wanted.place} and give {name}=PATH"
        )
    try:
        return hub.dataset_snapshot(f"prompt set {name!r} at", wanted.hub, wanted.files)
    except UserError as error:
        raise UserError(f"{error}; or download {wanted.place} and give {name}=PATH") from error


def _found(name: str, folder: Path, wanted: PromptSet) -> list[Path]:
    """Find the set's files below a folder, or lying in it without their own folders."""
    if wanted.files == _TABLES:
        files = [file for pattern in _TABLES for file in sorted(folder.glob(pattern))]
        if len(files) != 1:
            listed = ", ".join(file.name for file in files[:6]) or "none"
            raise UserError(
                f"prompts {name}: {str(folder)!r} should hold one table of prompts and holds {listed}; give {name}=FILE"
            )
        return files
    found = []
    for pattern in wanted.files:
        matches = list(folder.glob(pattern)) or list(folder.glob(Path(pattern).name))
        if not matches or (len(matches) > 1 and not wanted.one_a_file):
            raise UserError(
                f"prompts {name}: {str(folder)!r} holds {len(matches)} files {pattern}; download {wanted.place}"
            )
        found += sorted(matches, key=lambda file: natural_key(file.name))
    return found


def prompt_notes(source: str, prompts: Sequence[str], training: bool = False) -> list[str]:
    """Say what the user of a set should know: a copy that is not whole, a set that leaks into its own evaluation."""
    named = named_set(source)
    if named is None:
        return []
    name, notes = named[0], []
    if len(prompts) != SETS[name].count:
        notes.append(f"prompts {name}: {len(prompts)} prompts, the published set has {SETS[name].count}: another copy")
    if training:
        notes.append(
            f"data.prompts is {name}, a set that results are reported on: they will not be comparable"
            + (
                "; AlignProp trains on the first 750 prompts of HPDv2-photo and keeps the last 50, so judge it by the "
                "other three styles"
                if name in ("hpdv2", "hpdv2-photo")
                else ""
            )
        )
    return notes


def overlap_note(training: Sequence[str], evaluation: Sequence[str], where: str) -> str | None:
    """Say how many prompts of an evaluation are trained on, word for word (case and spacing aside).

    None for none.
    """
    known = {_folded(prompt) for prompt in training}
    judged = {_folded(prompt) for prompt in evaluation}
    if not (shared := len(known & judged)):
        return None
    return (
        f"{shared} of the {len(judged)} different prompts of {where} are in data.prompts too: what is seen there says "
        "nothing about other prompts"
    )


def _folded(prompt: str) -> str:
    return " ".join(prompt.casefold().split())
