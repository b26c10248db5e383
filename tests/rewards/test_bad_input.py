"""A checkpoint, a picture or a prompt that is wrong, for every reward there is: one clear line, and nothing lost."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.clip import write_clip
from builders.detectors import write_mask2former, write_metadata
from builders.hpsv3 import write_hpsv3
from builders.image_reward import head_state, write_image_reward
from builders.messages import says
from builders.open_clip import load_hps, write_hps
from PIL import Image
from safetensors.torch import load_file, save_file

from rsaft_fast.data.pictures import read_picture
from rsaft_fast.errors import NonFiniteRewardError, UserError
from rsaft_fast.rewards import REWARDS, Reward, RewardSettings, load_reward
from rsaft_fast.rewards.aesthetic import FILE as AESTHETIC
from rsaft_fast.rewards.hps import VERSIONS
from rsaft_fast.rewards.weights import read_state
from rsaft_fast.smoothing.objective import require_finite

pytestmark = [
    pytest.mark.filterwarnings("ignore:this is not the instruction"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol 4"),
]


@dataclass(frozen=True)
class Case:
    """A reward on disk, tiny.

    Attributes:
        write: fills a folder; returns the file of the weights, None where there is none.
        load: the reward from that folder.
        pickle: the file's name where its layout allows a pickle.
        prompt: one that can be scored.
        takes: prompts that can be scored, of "" and a very long one; the others are refused.
    """

    write: Callable[[Path], Path | None]
    load: Callable[[Path], Reward]
    pickle: str | None = None
    prompt: str = "a red ox"
    takes: tuple[str, ...] = ("empty", "long")


def named(name: str, folder: Path, file: str = "", **more: str) -> Reward:
    """As a recipe names it; `more` are files of the folder."""
    files = {key: str(folder / value) for key, value in more.items()}
    return load_reward(RewardSettings(name=name, path=str(folder / file), **files))


def clip(folder: Path, **options) -> Path:
    return write_clip(folder, **options) / "model.safetensors"


def aesthetic(folder: Path) -> Path:
    write_clip(folder / "tower", hidden_act="quick_gelu", text_act="quick_gelu")
    torch.save(head_state(12), folder / AESTHETIC)
    return folder / AESTHETIC


def geneval(folder: Path) -> Path:
    write_clip(folder / "tower", hidden_act="quick_gelu", text_act="quick_gelu")
    return counting(folder)


def counting(folder: Path) -> Path:
    task = {"tag": "counting", "prompt": "a dog", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    write_metadata(folder / "tasks.jsonl", task)
    return write_mask2former(folder) / "model.safetensors"


def ocr(folder: Path) -> Path:
    models = Path(pytest.importorskip("rapidocr").__file__).parent / "models"
    for model in models.glob("*.onnx"):
        shutil.copy(model, folder)
    return next(folder.glob("*_det_*.onnx"))


def hps(version: str) -> Case:
    return Case(
        lambda folder: write_hps(folder, VERSIONS[version].file) / VERSIONS[version].file,
        lambda folder: load_hps(folder, version),
        VERSIONS[version].file,
    )


CASES = {
    **{name: Case(clip, partial(named, name), "pytorch_model.bin") for name in ("clip", "pickscore", "clipscore")},
    "hpsv2": hps("hpsv2"),
    "hpsv2.1": hps("hpsv2.1"),
    "imagereward": Case(
        lambda folder: write_image_reward(folder) / "ImageReward.pt", partial(named, "imagereward"), "ImageReward.pt"
    ),
    "aesthetic": Case(aesthetic, lambda folder: named("aesthetic", folder, AESTHETIC, image_tower="tower"), AESTHETIC),
    "hpsv3": Case(
        lambda folder: write_hpsv3(folder) / "HPSv3.safetensors",
        lambda folder: named("hpsv3", folder, instruction="instruction.txt"),
        "HPSv3.safetensors",
    ),
    "ocr": Case(ocr, partial(named, "ocr"), prompt='a "dog"', takes=()),
    "geneval-hf": Case(
        geneval,
        lambda folder: named("geneval-hf", folder, metadata="tasks.jsonl", image_tower="tower"),
        "pytorch_model.bin",
        prompt="a dog",
        takes=(),
    ),
    "counting": Case(
        counting,
        lambda folder: named("counting", folder, metadata="tasks.jsonl"),
        "pytorch_model.bin",
        prompt="a dog",
        takes=(),
    ),
    "counting in the playground": Case(
        lambda folder: None,
        lambda folder: load_reward(RewardSettings(name="counting", path="playground")),
        prompt="two red circles",
        takes=(),
    ),
}
# These have no weights of their own: what they are made of, or another process, has them.
WITHOUT = {"combination", "remote", "python"}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Each reward once."""
    rewards: dict[int, Reward] = {}

    def load(case: Case) -> Reward:
        if id(case) not in rewards:
            folder = tmp_path_factory.mktemp("reward")
            case.write(folder)
            rewards[id(case)] = case.load(folder)
        return rewards[id(case)]

    return load


def refused(action: Callable[[], object]) -> str:
    """The one line."""
    with pytest.raises(UserError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line and len(line) > 20, line
    return line


def test_no_reward_is_left_out():
    assert {name.split(" in ")[0] for name in CASES} | WITHOUT == REWARDS.keys()


@pytest.mark.parametrize("share", [0.6, 0.01, 0.0])
def test_a_truncated_file(case, tmp_path, share):
    file = case.write(tmp_path)
    if file is None:
        pytest.skip("no file")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    line = refused(lambda: case.load(tmp_path))
    assert str(tmp_path) in line


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_nothing_is_run(case, tmp_path, writer):
    file = case.write(tmp_path)
    if case.pickle is None:
        pytest.skip("no pickle in this layout")
    mark, state = tmp_path / "executed", read_state(file) if file else {}
    file.unlink()
    content = state | {"more": Bomb(mark)}
    if writer == "torch":
        torch.save(content, tmp_path / case.pickle)
    else:
        (tmp_path / case.pickle).write_bytes(pickle.dumps({"more": Bomb(mark)}))
    refused(lambda: case.load(tmp_path))
    assert not mark.exists()
    # It would have run.
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


def test_a_weight_of_another_shape(case, tmp_path):
    file = case.write(tmp_path)
    if file is None or file.suffix == ".onnx":
        pytest.skip("no weights to reshape")
    state = load_file(file) if file.suffix == ".safetensors" else read_state(file)
    name = max(state, key=lambda n: state[n].numel())
    state[name] = torch.zeros(3, 5)
    if file.suffix == ".safetensors":
        save_file({n: v.contiguous() for n, v in state.items()}, file, {"format": "pt"})
    else:
        torch.save(state, file)
    refused(lambda: case.load(tmp_path))


@pytest.mark.parametrize(
    "images, mend",
    [
        (torch.rand(1, 4, 40, 40), "drop the alpha channel"),
        (torch.rand(1, 1, 40, 40), "repeat the grey channel"),
        (torch.rand(3, 40, 40), "(B, 3, H, W)"),
        (torch.zeros(1, 3, 40, 40, dtype=torch.uint8), "uint8"),
        (torch.rand(1, 3, 0, 40), "at least one pixel"),
    ],
    ids=["RGBA", "greyscale", "no batch", "bytes", "no rows"],
)
def test_pictures_of_another_kind(case, loaded, images, mend):
    assert mend in refused(lambda: loaded(case).score(images, [case.prompt]))


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA"])
def test_picture_files_of_any_mode_are_scored(case, loaded, tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "x.png")
    assert loaded(case).score(read_picture(tmp_path / "x.png"), [case.prompt]).isfinite().all()


@pytest.mark.parametrize("name, prompt", [("empty", ""), ("long", "owl " * 500)])
def test_an_empty_prompt_and_one_of_500_tokens(case, loaded, name, prompt):
    reward, images = loaded(case), torch.rand(2, 3, 40, 40)
    if name in case.takes:
        scores = reward.score(images, [prompt, case.prompt])
        assert scores.isfinite().all()
        # The other picture's score is not touched by its neighbour's prompt.
        torch.testing.assert_close(scores[1:], reward.score(images[1:], [case.prompt]), rtol=1e-4, atol=1e-5)
    else:
        refused(lambda: reward.score(images, [prompt, case.prompt]))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_pixels_that_are_no_numbers(case, loaded, value):
    reward, images = loaded(case), torch.rand(2, 3, 40, 40)
    expected = reward.score(images, [case.prompt] * 2)
    images[0, 1, 7, 9] = value
    scores = reward.score(images, [case.prompt] * 2)
    torch.testing.assert_close(scores[1], expected[1], rtol=1e-4, atol=1e-5)
    if value != value:
        assert scores[0].isnan()
        with pytest.raises(NonFiniteRewardError, match=says("1 of 2", "finite", "nan", repr(case.prompt))) as caught:
            require_finite(scores, [case.prompt] * 2)
        assert "\n" not in str(caught.value)
    else:  # below the range, where pictures are clipped
        assert scores[0].isfinite()


@pytest.mark.parametrize("prompts, words", [("a dog", "one string"), (["a"], "1 prompts for 2"), ([None] * 2, "None")])
def test_prompts_of_another_kind(case, loaded, prompts, words):
    assert words in refused(lambda: loaded(case).score(torch.rand(2, 3, 40, 40), prompts))
