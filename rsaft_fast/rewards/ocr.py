"""OCR reward of Flow-GRPO (arXiv 2505.05470): whether the text that a prompt quotes is written in the picture.

Read by RapidOCR's models, which are PaddleOCR's; no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from rsaft_fast.errors import UserError, first_line
from rsaft_fast.rewards.base import OffDevice, PictureReward, RewardSpec
from rsaft_fast.rewards.settings import OptionalPlace, RewardSettings, register

if TYPE_CHECKING:
    from rapidocr import RapidOCR

# Double quotes first; then the single ones of DrawBench, which an apostrophe inside a word is not.
_QUOTED = (re.compile(r'"([^"]*)"'), re.compile("“([^”]*)”"), re.compile(r"(?<!\w)'(.+?)'(?!\w)"))
_MEND = "pip install rapidocr onnxruntime rapidfuzz"


def target_text(prompt: str) -> str:
    """What the prompt wants written: its first quoted text.

    Raises:
        UserError: nothing is quoted.
    """
    for pattern in _QUOTED:
        match = pattern.search(prompt)
        if match and plain(match[1]):
            return match[1]
    raise UserError(f'prompt {prompt[:60]!r} quotes no text; the OCR reward needs one, as in: a sign that says "open"')


def plain(text: str) -> str:
    """Text as it is compared: lower case, without blanks."""
    return "".join(text.lower().split())


def text_score(read: str, target: str, *, substring: bool = True, repeat_penalty: float = 0.0) -> float:
    """1 - d / n of plain texts, with the edit distance d, at most n, and the target's length n.

    Args:
        read: everything that was read in the picture.
        target: not empty.
        substring: whether a target that stands whole within other text has d = 0, as published; text without end then
            costs nothing.
        repeat_penalty: taken off for each time beyond the first that the target was read; the sum is 0 at least.
    """
    from rapidfuzz.distance import Levenshtein

    if substring and target in read:
        distance = 0
    else:
        distance = min(Levenshtein.distance(read, target), len(target))
    repeats = max(read.count(target) - 1, 0)
    return max(1 - distance / len(target) - repeat_penalty * repeats, 0.0)


class OcrReward(PictureReward):
    """0 to 1: how nearly the picture's text is the one that the prompt quotes.

    Attributes:
        engine: RapidOCR's detector and recogniser, on the CPU.
    """

    elsewhere = True

    def __init__(self, engine: RapidOCR, spec: RewardSpec, *, substring: bool = True, repeat_penalty: float = 0.0):
        super().__init__()
        self.engine = engine
        self.spec = spec
        self.substring = substring
        self.repeat_penalty = repeat_penalty
        self.eval()

    def read(self, pixels: torch.Tensor) -> str:
        """All text in one picture (3, H, W), 0 to 1, lines joined without a blank."""
        picture = (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        # The engine takes the channels in OpenCV's order.
        lines = self.engine(picture[:, :, ::-1].copy()).txts
        return "".join(lines or ())

    def score_picture(self, pixels: torch.Tensor, prompt: str) -> float:
        """See `text_score`."""
        target = plain(target_text(prompt))
        options = {"substring": self.substring, "repeat_penalty": self.repeat_penalty}
        return text_score(plain(self.read(pixels)), target, **options)


@register
class OcrSettings(RewardSettings):
    """How nearly the picture's text is the one that the prompt quotes, 0 to 1.

    Attributes:
        path: folder with one *_det_*.onnx and one *_rec_*.onnx; empty takes those of rapidocr's wheel, and nothing is
            downloaded.
        substring: a quoted text that stands whole within other text counts as exact, as published.
        repeat_penalty: taken off for each time beyond the first that the quoted text is read.
    """

    name: Literal["ocr"] = "ocr"
    path: OptionalPlace = ""
    substring: bool = True
    repeat_penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    differentiable: ClassVar[bool] = False

    def load(self, device: torch.device | str = "cpu") -> OcrReward:
        """Load the reader; it runs on the CPU whatever `device` is.

        Raises:
            UserError: a missing package or model.
        """
        try:
            import onnxruntime
            import rapidfuzz  # noqa: F401
            import rapidocr
        except ImportError as error:
            missing = error.name or first_line(error)
            raise UserError(f"the OCR reward needs {missing}, which is missing; {_MEND}") from error
        folder = Path(self.place).expanduser() if self.path else Path(rapidocr.__file__).parent / "models"
        models = {part: _model(folder, part) for part in ("det", "rec")}
        parameters = {
            "Global.log_level": "error",
            # Flow-GRPO reads without turning lines upright.
            "Global.use_cls": False,
            "Det.model_path": str(models["det"]),
            "Rec.model_path": str(models["rec"]),
        }
        try:
            # The engine opens its models at the first picture: too late to say that one is damaged.
            for model in models.values():
                onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            engine = rapidocr.RapidOCR(params=parameters)
        except Exception as error:
            # onnxruntime and rapidocr raise their own kinds.
            raise UserError(
                f"the OCR models in {str(folder)!r} do not load ({type(error).__name__}: {first_line(error)}); {_MEND}"
            ) from error
        facts = {part: model.name for part, model in models.items()}
        options = {"substring": self.substring, "repeat_penalty": self.repeat_penalty}
        facts |= {"rapidocr": version("rapidocr"), **options}
        return OcrReward(engine, self.spec(list(models.values()), facts, "Apache-2.0"), **options)

    def shapes(self, log: Callable[[str], None]) -> OffDevice:
        """The reader runs on the CPU."""
        return OffDevice(RewardSpec(self.name))


def _model(folder: Path, part: str) -> Path:
    found = sorted(folder.glob(f"*_{part}_*.onnx"))
    if len(found) != 1:
        raise UserError(
            f"{str(folder)!r} holds {len(found)} files *_{part}_*.onnx; the OCR reward needs one: name a folder that "
            f"holds it, or install a rapidocr whose wheel does ({_MEND})"
        )
    return found[0]
