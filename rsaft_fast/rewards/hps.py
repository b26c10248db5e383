"""HPSv2 and HPSv2.1 (arXiv 2306.09341): a CLIP ViT-H-14 fine-tuned on human preferences, from its public pickle."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import CLIPModel

from rsaft_fast.errors import UserError
from rsaft_fast.files import digests_of
from rsaft_fast.rewards.clip import ClipReward, ClipSettings, Scale, load_clip_model
from rsaft_fast.rewards.files import checkpoint_file, conversion_of, weight_files
from rsaft_fast.rewards.open_clip import VIT_H_14, clip_model
from rsaft_fast.rewards.preprocess import Preprocess
from rsaft_fast.rewards.settings import register
from rsaft_fast.rewards.text import CLIP_FILES, clip_tokenizer, fixed_text, require_vocabulary
from rsaft_fast.rewards.weights import read_state
from rsaft_fast.settings import UserPlace

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


@register
class HpsSettings(ClipSettings):
    """HPSv2 or HPSv2.1 from the published HPS_v2*_compressed.pt, or as a transformers CLIPModel.

    Attributes:
        path: the .pt, a folder or hub id that holds it, or a folder in CLIPModel format.
        resize: aa is the original with torchvision 0.17 or later, legacy_noaa with an earlier one; published scores,
            up to two points higher for the same pictures, may come from either.
        tokenizer: CLIP's: folder, hub id or bpe_simple_vocab_16e6.txt.gz. null is the one beside the weights, else the
            hub's.
        architecture: of the pickle, keys of `CLIPConfig`.
    """

    name: Literal["hpsv2", "hpsv2.1"]
    path: UserPlace = "xswu/HPSv2"
    resize: Resize = "aa"
    tokenizer: UserPlace | None = None

    own_scale: ClassVar[Scale] = "cosine"
    architecture: ClassVar[dict[str, Any]] = VIT_H_14

    def load(self, device: torch.device | str = "cpu") -> ClipReward:
        """Load the version that `name` says.

        Raises:
            UserError: a missing file, package or weight, another model's checkpoint or the other version's, or a
                pickle with more than tensors in it.
        """
        fixed_text("")  # ftfy is needed at the first prompt: better to hear of it before gigabytes are read
        folder = Path(self.place).expanduser()
        if os.path.isfile(folder / "config.json"):
            model, files = load_clip_model(folder, self.path, "gelu"), weight_files(folder)
        else:
            files = [checkpoint_file(self.place, VERSIONS[self.name].file)]
            model = clip_model(read_state(files[0]), self.architecture, repr(str(files[0])))
        require_version(self.name, files[0], self.path)
        size = model.config.vision_config.image_size
        prepare = Preprocess((size, size), "longest_pad", antialias=self.resize == "aa", clamp=self.clamp)
        scale = self.scale or self.own_scale
        facts = {"scale": scale, "resize": self.resize, "text": "ftfy, HTML entities resolved"}
        spec = self.spec(files, prepare.describe() | facts, "Apache-2.0")
        tokenizer = _tokenizer(self.tokenizer, files[0].parent, model)
        options = {"scale": scale, "edit_prompt": fixed_text, **self.tower}
        return ClipReward(model, tokenizer, prepare, spec, **options).to(device)


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
