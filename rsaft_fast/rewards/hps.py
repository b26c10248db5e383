"""HPSv2 and HPSv2.1 (arXiv 2306.09341): a CLIP ViT-H-14 fine-tuned on human preferences, from its public pickle."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CLIPModel

from rsaft_fast.errors import UserError
from rsaft_fast.files import digests_of, sha256_of
from rsaft_fast.rewards.base import RewardSpec
from rsaft_fast.rewards.clip import ClipReward, Scale, load_clip_model
from rsaft_fast.rewards.files import checkpoint_file, conversion_of, weight_files
from rsaft_fast.rewards.open_clip import VIT_H_14, clip_model
from rsaft_fast.rewards.preprocess import Clamp, Preprocess
from rsaft_fast.rewards.text import CLIP_FILES, clip_tokenizer, fixed_text, require_vocabulary
from rsaft_fast.rewards.weights import read_state

Resize = Literal["aa", "legacy_noaa"]

# Its tokenizer is CLIP's own; the HPSv2 repository holds none.
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True)
class HpsVersion:
    """One published checkpoint."""

    file: str
    md5: str


VERSIONS = {
    "hpsv2": HpsVersion("HPS_v2_compressed.pt", "fd9180de357abf01fdb4eaad64631db4"),
    "hpsv2.1": HpsVersion("HPS_v2.1_compressed.pt", "4067542e34ba2553a738c5ac6c1d75c0"),
}


def load_hps(
    path: str | Path,
    version: str = "hpsv2.1",
    *,
    scale: Scale = "cosine",
    resize: Resize = "aa",
    clamp: Clamp = "hard",
    dtype: torch.dtype = torch.float32,
    checkpoint: bool = True,
    tokenizer: str | Path | None = None,
    device: torch.device | str = "cpu",
    architecture: dict[str, Any] = VIT_H_14,
) -> ClipReward:
    """HPSv2 or HPSv2.1 from its pickle, a folder or hub id (xswu/HPSv2) that holds it, or a folder in CLIPModel format.

    Args:
        path: of the weights.
        version: a key of `VERSIONS`.
        scale: "cosine" as the original returns it (about 0.25), "percent" as it is reported.
        resize: "aa" is the original with torchvision 0.17 or later, "legacy_noaa" with an earlier one: published
            scores, up to two points higher for the same pictures, may come from either.
        clamp: see `Preprocess`.
        dtype: of both towers; normalising and the dot product are in fp32 at least.
        checkpoint: recompute the image tower's layers in the backward pass instead of keeping their activations.
        tokenizer: CLIP's, as a folder, hub id or bpe_simple_vocab_16e6.txt.gz; without it one beside the weights,
            else the hub's.
        device: where it lives.
        architecture: of the checkpoint, keys of `CLIPConfig`.

    Raises:
        UserError: a missing file, package or weight, another model's checkpoint or the other version's, or a pickle
            with more than tensors in it.
    """
    fixed_text("")  # ftfy is needed at the first prompt: better to hear of it before gigabytes are read
    folder = Path(path)
    if str(path) and os.path.isfile(folder / "config.json"):
        model, files = load_clip_model(folder, str(path), "gelu"), weight_files(folder)
    else:
        files = [checkpoint_file(path, VERSIONS[version].file)]
        model = clip_model(read_state(files[0]), architecture, repr(str(files[0])))
    require_version(version, files[0], str(path))
    size = model.config.vision_config.image_size
    prepare = Preprocess((size, size), "longest_pad", antialias=resize == "aa", clamp=clamp)
    facts = {"scale": scale, "resize": resize, "text": "ftfy, HTML entities resolved"}
    origin = conversion_of(files[0]).get("source_sha256", "")
    spec = RewardSpec(version, str(path), sha256_of(files), prepare.describe() | facts, "Apache-2.0", origin)
    return ClipReward(
        model,
        _tokenizer(tokenizer, files[0].parent, model),
        prepare,
        spec,
        scale=scale,
        dtype=dtype,
        checkpoint=checkpoint,
        edit_prompt=fixed_text,
    ).to(device)


def require_version(version: str, file: Path, source: str = "") -> None:
    """Refuse the other published version's file: the two differ in nothing but their weights."""
    source = source or str(file)
    md5 = conversion_of(file).get("source_md5") or digests_of([file], "md5")["md5"]
    for name, published in VERSIONS.items():
        if md5 == published.md5 and name != version:
            raise UserError(f"{source!r} is the published {name}, not {version}; write reward.name={name}")


def _tokenizer(given: str | Path | None, beside: Path, model: CLIPModel):
    if given is None:
        given = beside if any(os.path.isfile(beside / name) for name in CLIP_FILES) else TOKENIZER
    try:
        tokenizer = clip_tokenizer(given)
    except UserError as error:
        raise UserError(f"{error}; HPSv2 needs CLIP's tokenizer: name its folder or {CLIP_FILES[-1]}") from error
    require_vocabulary(tokenizer, model.config.text_config.vocab_size, repr(str(given)))
    return tokenizer
