"""`rsaft-fast push`: what a run trained, onto the Hugging Face hub, with a model card."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsaft_fast import hub
from rsaft_fast.commands.eval import FORMAT, JSON
from rsaft_fast.commands.pictures import log
from rsaft_fast.commands.sample import BEST, best_folder
from rsaft_fast.errors import UserError
from rsaft_fast.figures.tables import markdown
from rsaft_fast.files import sha256_of
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import load_config
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.logging import CONFIG
from rsaft_fast.train.model_card import CARD, LICENCES, public_name, published_card


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast push`."""
    if not hub.is_hub_id(arguments.repo):
        raise UserError(f"--repo {arguments.repo!r} is no name of a repository; give OWNER/NAME")
    folder = Path(arguments.run)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{arguments.run} is not a run folder: it has no {CONFIG}")
    config = load_config(folder / CONFIG)
    export = best_folder(config, folder) if arguments.checkpoint == BEST else _last_export(config, folder)
    files: dict[str, Path | bytes] = {
        path.relative_to(export).as_posix(): path
        for path in sorted(export.rglob("*"))
        if path.is_file() and path.name != CARD and not path.name.startswith(".")
    }
    scores = _scores(arguments, folder)
    try:
        written = (export / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{export / CARD} cannot be read ({error}); a run writes it at its end") from error
    card = published_card(written, export.name, arguments.repo, _licence(arguments, config), scores)
    files[CARD] = card.encode()
    if arguments.dry_run:
        print(card)
        for name, content in files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"{size:>14,}  {name}")
        log(f"dry run: {len(files)} files of {export} would go to {arguments.repo}; nothing was sent")
        return 0
    log(f"sending {len(files)} files of {export} to {arguments.repo}")
    address = hub.publish(arguments.repo, files, f"{export.name} by rsaft_fast", arguments.private)
    log(f"published: {address}")
    return 0


def _last_export(config: Config, folder: Path) -> Path:
    names = ["lora"] if config.parameters.train == "lora" else ["unet", "transformer", "denoiser"]
    found = [folder / name for name in names if os.path.isfile(folder / name / CARD)]
    if not found:
        raise UserError(
            f"{folder} has no exported weights ({' or '.join(names)}): the run did not come to its end; go on with "
            f"rsaft-fast train {folder / CONFIG} resume={folder}"
        )
    return found[0]


def _licence(arguments: argparse.Namespace, config: Config) -> Mapping[str, str]:
    if arguments.license:
        return {"license": arguments.license}
    base = public_name(config.backbone.path)
    if base not in LICENCES:
        raise UserError(
            f"the licence of the base model {base} is not known here; give --license ID, as the hub calls it, such as "
            "apache-2.0 or other"
        )
    return LICENCES[base]


def _scores(arguments: argparse.Namespace, folder: Path) -> str:
    """The card's section on held-out scores: of the evaluation asked for, or of the run's newest that is whole."""
    if arguments.evaluation:
        place = Path(arguments.evaluation) / JSON
        found = _of_run(_read(place), folder, arguments.checkpoint)
        if found is None:
            raise UserError(f"--evaluation {arguments.evaluation} is not of the weights that {folder} exports")
        return found
    places = sorted(folder.glob(f"evaluation/*/{JSON}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for place in places:
        content = _read(place)
        if content["complete"] and (found := _of_run(content, folder, arguments.checkpoint)) is not None:
            return found
    log(f"the card has no held-out scores: rsaft-fast eval {folder} measures them")
    return ""


def _read(place: Path) -> dict[str, Any]:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place} is not what rsaft-fast eval writes ({error}); evaluate anew") from error
    return content


def _of_run(content: Mapping[str, Any], folder: Path, checkpoint: str) -> str | None:
    """Rows of the base and of the weights that are exported; None where the evaluation is of others."""
    weights = _weights_of(folder, checkpoint)
    models, rows = content["protocol"]["models"], content["rows"]
    place = next((i for i, model in enumerate(models) if model.get("trained_weights") in weights), None)
    if place is None:
        return None
    names = list(rows[place]["scores"])
    head = ["", *(f"{name}\\*" if rows[place]["scores"][name]["trained"] else name for name in names)]
    told = [("before", rows[0])] if place else []
    cells = [
        [label, *(_shown(row["scores"].get(name)) for name in names)] for label, row in [*told, ("these", rows[place])]
    ]
    about = content["protocol"]
    text = (
        f"{about['count']} prompts of {public_name(about['prompts'])}, {about['pictures_of_a_prompt']} pictures of "
        "each, the same noise for both; means with 95 % intervals over prompts. A star: trained on, which says nothing "
        "about whether the pictures are better. S1: how much a reward falls right beside a picture."
    )
    return "\n\n".join(["## Held-out scores", markdown(head, cells), text])


def _weights_of(folder: Path, checkpoint: str) -> set[str]:
    """Hashes by which an evaluation knows the exported weights."""
    if checkpoint == BEST:
        config = load_config(folder / CONFIG)
        return {sha256_of(sorted(best_folder(config, folder).glob("*.safetensors")))}
    newest, _ = checkpoints.newest(folder / "checkpoints")
    if newest is None:
        return set()
    return {sha256_of(checkpoints.weight_files(newest))}


def _shown(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    half = "" if found["low"] is None else f" ±{(found['high'] - found['low']) / 2:.3f}"
    return f"{found['value']:.3f}{half}"
