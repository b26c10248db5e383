"""Which reward families there are, and the settings that name one."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rsaft_fast.errors import UserError
from rsaft_fast.files import sha256_of
from rsaft_fast.paths import user_place
from rsaft_fast.pretrained import library_errors
from rsaft_fast.rewards.aesthetic import load_aesthetic
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.calibration import Scaling, find, read_calibration
from rsaft_fast.rewards.clip import ClipReward, Scale, with_clipscore_prefix
from rsaft_fast.rewards.combine import Combination, How, Part
from rsaft_fast.rewards.hps import Resize, load_hps
from rsaft_fast.rewards.image_reward import load_image_reward
from rsaft_fast.rewards.preprocess import Clamp
from rsaft_fast.rewards.remote import check_token_variable, load_remote
from rsaft_fast.rewards.wire import TOKEN_VARIABLE
from rsaft_fast.settings import Settings, UserPath, UserPlace

_PLAYGROUND = "playground/"


@dataclass(frozen=True)
class Family:
    """One line of `REWARDS`.

    Attributes:
        load: called as load(path, device=..., **{key: value}); of the settings it gets those in `keys` that are not
            null, so that null leaves the choice to the function's own default. `dtype` arrives as a torch.dtype.
        keys: of `RewardSettings` beside name and path; any other key is refused for this family.
        differentiable: whether its scores carry a gradient to the images.
        needs_path: False where the weights come with a package; then load's path may be "".
    """

    load: Callable[..., Reward]
    keys: tuple[str, ...] = ()
    differentiable: bool = True
    needs_path: bool = True


class SingleReward(Settings):
    """One reward model, and how it is computed.

    Attributes:
        name: the family. clip is any transformers CLIPModel with its tokenizer; pickscore and clipscore are such
            folders too. hpsv2 and hpsv2.1 read the published HPS_v2*_compressed.pt, imagereward ImageReward.pt with
            med_config.json beside it, aesthetic sac+logos+ava1-l14-linearMSE.pth, hpsv3 HPSv3.safetensors (16.6 GB
            in bfloat16). Without gradient: ocr reads the text that the prompt quotes (path empty: the models of
            rapidocr's wheel), geneval-hf is GenEval's logic over a Mask2Former, counting compares numbers (path
            playground, or a Mask2Former), remote asks a server (rsaft-fast serve). combination makes one reward of
            several.
        path: folder, file or hub id of the weights, such as yuvalkirstain/PickScore_v1, xswu/HPSv2,
            THUDM/ImageReward. playground/fair and playground/brittle ship with the package. Required, but for
            combination and families whose weights come with a package. Of remote: http://HOST:PORT/NAME.
        scale: what the cosine is multiplied by. logit is exp(logit_scale), PickScore's scale (about 21); percent is
            100, as HPSv2 is reported; cosine leaves it; clipscore is 2.5, negative cosines counted as 0. null is the
            family's own (clip and pickscore logit, hpsv2 and hpsv2.1 cosine, clipscore its own).
        resize: of hpsv2 and hpsv2.1. aa is the original with torchvision 0.17 or later, legacy_noaa with an earlier
            one; published scores differ by up to two points between them.
        clamp: values outside [0, 1] before the reward: hard clips the value, which then has no gradient; ste clips
            the value and passes the gradient; none leaves both.
        dtype: what the towers compute in; features and scores are in float32 at least. Below float32 the effect of a
            small image perturbation is rounded away.
        checkpoint: recompute the layers in the backward pass instead of keeping their activations.
        tokenizer: of hpsv2, hpsv2.1 (CLIP's: folder, hub id or bpe_simple_vocab_16e6.txt.gz), imagereward
            (bert-base-uncased's: folder, hub id or vocab.txt) and hpsv3 (Qwen2-VL-7B-Instruct's). null is the one
            beside the weights, else the hub's.
        image_tower: of aesthetic and geneval-hf: folder or hub id of OpenAI's CLIP ViT-L/14. null is the hub's.
        token_variable: of remote: the environment variable that holds the server's token; its name begins with RSAFT_.
        timeout: of remote: seconds to wait for one answer.
        patience: of remote: seconds during which a server that does not answer is tried again.
        instruction: of hpsv3: the text of its authors that goes with every prompt, as the hpsv3 package's wheel or
            source file, or a .txt. null is that of an installed hpsv3.
        substring: of ocr: a quoted text that stands whole within other text counts as exact, as published.
        repeat_penalty: of ocr: taken off for each time beyond the first that the quoted text is read.
        metadata: of geneval-hf and counting: what each prompt demands, a .jsonl as GenEval's evaluation_metadata.jsonl.
        credit: of geneval-hf: partial is Flow-GRPO's mean of terms, strict 1 where everything is exact, else 0,
            benchmark GenEval's own 0 or 1.
    """

    name: str = "clip"
    path: str = ""
    scale: Scale | None = None
    resize: Resize = "aa"
    clamp: Clamp = "hard"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    checkpoint: bool = True
    tokenizer: UserPlace | None = None
    image_tower: UserPlace | None = None
    token_variable: str = Field(default=TOKEN_VARIABLE, min_length=1)
    timeout: float = Field(default=60.0, gt=0)
    patience: float = Field(default=120.0, ge=0)
    instruction: UserPath | None = None
    substring: bool = True
    repeat_penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    metadata: UserPath | None = None
    credit: Literal["partial", "strict", "benchmark"] = "partial"

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(REWARDS)}"
            raise ValueError(f"reward {name!r} is unknown; {hint}")
        return name

    @field_validator("path")
    @classmethod
    def _given(cls, path: str, info: ValidationInfo) -> str:
        family = REWARDS.get(info.data.get("name"))
        if family is not None and family.needs_path and not path:
            raise PydanticCustomError("missing", "Field required")
        return user_place(path) if path else path

    @field_validator("token_variable")
    @classmethod
    def _ours(cls, name: str) -> str:
        try:
            check_token_variable(name)
        except UserError as error:
            raise ValueError(str(error)) from error
        return name

    @model_validator(mode="after")
    def _applies(self):
        family = REWARDS[self.name]
        for key, field in type(self).model_fields.items():
            if key in (*_OF_ALL, *family.keys) or getattr(self, key) == field.default:
                continue
            owners = [name for name, other in REWARDS.items() if key in other.keys]
            raise ValueError(f"{key} is a key of {', '.join(owners)}, not of {self.name}; leave it out")
        return self

    @property
    def differentiable(self) -> bool:
        """Whether the reward's scores will carry a gradient to the images; known before anything is loaded."""
        return REWARDS[self.name].differentiable


class RewardPart(SingleReward):
    """One reward of a combination: its keys are those of a reward, and these.

    Attributes:
        weight: of how weighted and rank. A weight below 0 makes a penalty of the part.
        label: its name in metrics.jsonl and tables; null is the family's. Two parts of one family need one.
    """

    weight: float = 1.0
    label: str | None = Field(default=None, min_length=1)

    @field_validator("name")
    @classmethod
    def _is_single(cls, name: str) -> str:
        if name == "combination":
            raise ValueError("a combination cannot be part of another; name its parts here")
        return name

    @property
    def shown(self) -> str:
        """What the part is called in logs and tables."""
        return self.label or self.name


class RewardSettings(SingleReward):
    """Which reward, and how it is computed; name combination makes one of several.

    Attributes:
        how: of combination: weighted adds weight * score; worst takes the lowest of the parts' scores, so that no
            reward can be raised at another's cost; mean-std takes mean - penalty * standard deviation over the parts,
            which distrusts what they disagree on; rank takes the mean win rate among pictures of the same prompt, has
            no gradient, and needs no calibration. Costs one forward and backward pass of each part, one after the
            other: the memory of the largest.
        penalty: of mean-std: the factor on the standard deviation.
        parts: of combination: its rewards, each with its own preprocessing and dtype.
        calibration: of combination: file that rsaft-fast score --calibration wrote. Each part's score then enters as
            (score - centre) / width, both measured on those pictures. worst and mean-std of different rewards need it.
        calibrate: what centre and width are: std takes mean and standard deviation, iqr the median and the
            interquartile range over 1.349, which outliers do not move.
    """

    how: How = "weighted"
    penalty: float = Field(default=1.0, ge=0)
    parts: tuple[RewardPart, ...] = ()
    calibration: UserPath | None = None
    calibrate: Scaling = "std"

    @model_validator(mode="after")
    def _combines(self) -> RewardSettings:
        if self.name != "combination":
            return self
        if not self.parts:
            raise ValueError("a combination needs parts: a list of rewards, each with name and path")
        labels = [part.shown for part in self.parts]
        if repeated := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two parts are called {repeated!r}; give one of them a label")
        if self.how in ("worst", "mean-std"):
            self._require_one_scale()
        elif self.how == "rank" and self.calibration is not None:
            raise ValueError("calibration does nothing with how rank: ranks have no scale; leave it out")
        elif self.how == "rank" and min(part.weight for part in self.parts) <= 0:
            raise ValueError("how rank takes the mean of win rates; every weight must be above 0")
        if self.how != "mean-std" and self.penalty != type(self).model_fields["penalty"].default:
            raise ValueError(f"penalty is of how mean-std, not of {self.how}; leave it out")
        return self

    def _require_one_scale(self) -> None:
        if any(part.weight != 1 for part in self.parts):
            raise ValueError(f"weight is of how weighted and rank, not of {self.how}; leave it out")
        kinds = {(part.name, part.scale) for part in self.parts}
        if len(kinds) > 1 and self.calibration is None:
            raise ValueError(
                f"how {self.how} compares scores of {', '.join(part.shown for part in self.parts)}, which have "
                "different scales: the lowest scale would decide alone; give calibration (rsaft-fast score PICTURES "
                "--reward ... --calibration FILE writes one), or take how weighted or rank"
            )

    @property
    def differentiable(self) -> bool:
        """Whether the reward's scores will carry a gradient to the images; known before anything is loaded."""
        if self.name != "combination":
            return super().differentiable
        return self.how != "rank" and all(part.differentiable for part in self.parts)


def load_reward(settings: SingleReward, device: torch.device | str = "cpu") -> Reward:
    """The frozen reward that `settings` names, on `device`.

    Raises:
        UserError: the weights cannot be found or are not what the family needs.
    """
    family = REWARDS[settings.name]
    options: dict[str, Any] = {key: getattr(settings, key) for key in family.keys}
    if "dtype" in options:
        options["dtype"] = getattr(torch, settings.dtype)
    options = {key: value for key, value in options.items() if value is not None}
    with library_errors(
        f"reward {settings.name} at {settings.path!r} could not be loaded",
        "its files are damaged or another model's: download them anew",
    ):
        reward = family.load(resolve_path(settings.path), device=device, **options)
    # The name that the user gave, not where this installation keeps it.
    reward.spec = replace(reward.spec, source=settings.path)
    return reward


def resolve_path(path: str) -> str:
    """`path`, or the folder of a reward that ships with the package ("playground/<name>")."""
    if not path.startswith(_PLAYGROUND):
        return path
    from rsaft_fast.playground import reward_path

    try:
        return str(reward_path(path.removeprefix(_PLAYGROUND)))
    except (ValueError, OSError) as error:
        raise UserError(f"reward {path!r}: {error}") from error


def _load_combination(
    path: str,
    *,
    device: torch.device | str,
    how: How,
    penalty: float,
    parts: Sequence[RewardPart],
    calibrate: Scaling,
    calibration: str | None = None,
) -> Combination:
    # Read first: a file that is not there shall not be found missing after gigabytes were loaded.
    entries = read_calibration(calibration) if calibration is not None else []
    facts = {}
    if calibration is not None:
        digest = sha256_of([Path(calibration)])
        facts = {"calibration": calibration, "calibration_sha256": digest, "calibrate": calibrate}
    loaded = []
    for part in parts:
        reward = load_reward(part, device)
        centre, width = find(entries, reward.spec, calibration).affine(calibrate) if entries else (0.0, 1.0)
        loaded.append(Part(part.shown, reward, part.weight, centre, width))
    return Combination(loaded, how, penalty, facts)


# Keys of every family.
_OF_ALL = ("name", "path", "weight", "label")


def _later(module: str, function: str) -> Callable[..., Reward]:
    """A loader whose module is imported at the first call: its part of transformers costs a second that most runs
    need not wait."""

    def load(path: str, **options: Any) -> Reward:
        return getattr(importlib.import_module(f"rsaft_fast.rewards.{module}"), function)(path, **options)

    return load


_TOWER = ("clamp", "dtype", "checkpoint")
_clip = ClipReward.from_pretrained

# A new family is one line: its loader and the keys that the loader takes.
REWARDS: dict[str, Family] = {
    "clip": Family(partial(_clip, name="clip"), ("scale", *_TOWER)),
    "pickscore": Family(partial(_clip, name="pickscore", activation="gelu"), ("scale", *_TOWER)),
    "clipscore": Family(
        # Its authors prepare pictures with torchvision.
        partial(_clip, name="clipscore", scale="clipscore", edit_prompt=with_clipscore_prefix, crop_offset="half_even"),
        ("scale", *_TOWER),
    ),
    "hpsv2": Family(partial(load_hps, version="hpsv2"), ("scale", "resize", "tokenizer", *_TOWER)),
    "hpsv2.1": Family(partial(load_hps, version="hpsv2.1"), ("scale", "resize", "tokenizer", *_TOWER)),
    "imagereward": Family(load_image_reward, ("tokenizer", *_TOWER)),
    "aesthetic": Family(load_aesthetic, ("image_tower", *_TOWER)),
    "hpsv3": Family(_later("hpsv3", "load_hpsv3"), ("instruction", "tokenizer", *_TOWER)),
    "ocr": Family(_later("ocr", "load_ocr"), ("substring", "repeat_penalty"), differentiable=False, needs_path=False),
    "geneval-hf": Family(
        _later("geneval", "load_geneval"), ("metadata", "credit", "image_tower"), differentiable=False
    ),
    "counting": Family(_later("counting", "load_counting"), ("metadata",), differentiable=False),
    "remote": Family(load_remote, ("token_variable", "timeout", "patience"), differentiable=False),
    "combination": Family(_load_combination, ("how", "penalty", "parts", "calibration", "calibrate"), needs_path=False),
}
