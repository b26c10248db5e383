"""GenEval: its published verdicts and credits on synthetic detections, and its models from tiny checkpoints."""

from __future__ import annotations

import json
import random

import pytest
import torch
from builders.clip import write_clip
from builders.detectors import write_mask2former, write_metadata
from builders.messages import says
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.rewards.base import RewardSpec
from rsaft_fast.rewards.detection import COCO, Detection, class_names, input_size, load_mask2former, mask_box
from rsaft_fast.rewards.geneval import GenevalReward, crop
from rsaft_fast.rewards.geneval_tasks import (
    benchmark_correct,
    kept,
    load_tasks,
    parse_task,
    partial_credit,
    relations,
)

SEED = random.randrange(2**32)


def seen(name: str, x: float = 0, y: float = 0, colour: str = "red", score: float = 0.95, size: float = 10):
    """An object; its colour travels in the box's fraction, where `colours` reads it."""
    detection = Detection(name, score, (x, y, x + size, y + size))
    COLOUR[detection] = colour
    return detection


COLOUR: dict = {}


def colours(objects, name):
    return [COLOUR[detection] for detection in objects]


def task(*include, tag="two_object", exclude=()):
    entry = {"tag": tag, "prompt": "p", "include": list(include)}
    return parse_task(entry | ({"exclude": list(exclude)} if exclude else {}), COCO)


def want(name, count=1, **more):
    return {"class": name, "count": count} | more


DOG, CUP = want("dog"), want("cup")
LEFT = want("cup", position=["left of", 0])
# Demands, what was seen, GenEval's verdict, Flow-GRPO's terms and its strict verdict.
CASES = [
    ("one object", [DOG], [seen("dog")], True, [1], True),
    ("none", [DOG], [], False, [0], False),
    ("one too many", [DOG], [seen("dog"), seen("dog", 20)], True, [0], False),
    ("three too many", [DOG], [seen("dog", 20 * i) for i in range(4)], True, [-2], False),
    ("another's presence", [DOG], [seen("dog"), seen("cat")], True, [1], True),
    ("two objects", [DOG, CUP], [seen("dog"), seen("cup", 20)], True, [1, 1], True),
    ("one of two objects", [DOG, CUP], [seen("dog")], False, [1, 0], False),
    ("three of four", [want("dog", 4)], [seen("dog", 20 * i) for i in range(3)], False, [3 / 4], False),
    ("right colour", [want("dog", color="red")], [seen("dog")], True, [1, 1], True),
    ("wrong colour", [want("dog", color="blue")], [seen("dog")], False, [1, 0], False),
    ("no object for the colour", [want("dog", color="red")], [], False, [0, 0], False),
    (
        "half the colours",
        [want("dog", 2, color="red")],
        [seen("dog"), seen("dog", 20, colour="blue")],
        False,
        [1, 0.5],
        False,
    ),
    (
        "the surest has the colour",
        [want("dog", color="red")],
        [seen("dog", 20, colour="blue", score=0.5), seen("dog", score=0.9)],
        True,
        [0, 0],
        False,
    ),
    (
        "colours attributed",
        [want("dog", color="red"), want("cup", color="blue")],
        [seen("dog"), seen("cup", 20, colour="blue")],
        True,
        [1, 1, 1, 1],
        True,
    ),
    (
        "colours exchanged",
        [want("dog", color="blue"), want("cup", color="red")],
        [seen("dog"), seen("cup", 20, colour="blue")],
        False,
        [1, 0, 1, 0],
        False,
    ),
    ("left", [DOG, LEFT], [seen("dog", 30), seen("cup")], True, [1, 1, 1], True),
    # As published: the failed comparison's 0, and then the 1 that follows the loop in any case.
    ("right instead", [DOG, LEFT], [seen("dog"), seen("cup", 30)], False, [1, 1, 0, 1], False),
    ("nothing to be left of", [DOG, LEFT], [seen("cup")], False, [0, 1, 0], False),
    ("nothing that is left", [DOG, LEFT], [seen("dog")], False, [1, 0, 0], False),
    ("left of one of two", [want("dog", 2), LEFT], [seen("dog", 30), seen("dog", -30), seen("cup")], False,
     [1, 1, 0, 1], False),
]  # fmt: skip


@pytest.mark.parametrize("demands, objects, correct, terms, strict", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_published_verdicts_and_partial_credits(demands, objects, correct, terms, strict):
    wanted, found = task(*demands), kept(objects, "two_object")
    assert benchmark_correct(found, wanted, colours) is correct
    credit, exact = partial_credit(found, wanted, colours)
    assert credit == pytest.approx(sum(terms) / len(terms)) and exact is strict


def test_what_is_excluded_counts_for_the_benchmark_alone():
    wanted = task(want("dog", 2), tag="counting", exclude=[want("dog", 3)])
    two, three = ([seen("dog", 20 * i) for i in range(n)] for n in (2, 3))
    assert benchmark_correct(kept(two, "counting"), wanted, colours)
    assert not benchmark_correct(kept(three, "counting"), wanted, colours)
    assert partial_credit(kept(three, "counting"), wanted, colours)[0] == 0.5


def test_confidence_number_and_order():
    some = [seen("dog", score=s) for s in (0.3, 0.31, 0.91, 0.9)]
    assert [d.score for d in kept(some, "colors")["dog"]] == [0.91, 0.9, 0.31]
    assert [d.score for d in kept(some, "counting")["dog"]] == [0.91]
    assert kept([seen("dog", score=0.2)], "colors") == {}
    assert len(kept([seen("cup", i) for i in range(20)], "colors")["cup"]) == 16


@pytest.mark.parametrize(
    "x, y, expected",
    [
        (20, 0, {"right of"}),
        (-20, 0, {"left of"}),
        (0, -20, {"above"}),
        (0, 20, {"below"}),
        (20, 20, {"right of", "below"}),
        (20, -9, {"right of"}),
        (2, 0, set()),  # a tenth of both widths
        (2.2, 0, set()),  # beyond it, by less than half of the distance
        (4.1, 0, {"right of"}),
        (0, 0, set()),
    ],
)
def test_relations(x, y, expected):
    assert relations(seen("a", x, y), seen("b")) == expected


coordinates = st.floats(-1e3, 1e3)
sizes = st.floats(0.1, 500)


@given(coordinates, coordinates, sizes, coordinates, coordinates, sizes)
def test_relations_are_mirrored(ax, ay, asize, bx, by, bsize):
    a, b = (Detection("a", 1, (x, y, x + s, y + s)) for x, y, s in ((ax, ay, asize), (bx, by, bsize)))
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(b, a) == {opposite[r] for r in relations(a, b)}
    assert not {"left of", "right of"} <= relations(a, b)


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    return write_mask2former(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("tower"), hidden_act="quick_gelu", text_act="quick_gelu")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    file = tmp_path_factory.mktemp("metadata") / "evaluation_metadata.jsonl"
    return write_metadata(
        file,
        {"tag": "single_object", "include": [want("person")], "prompt": "a photo of a person"},
        {"tag": "color_attr", "include": [want("bear", color="pink"), DOG], "prompt": "a pink bear and a dog"},
        {"tag": "single_object", "include": [want("person")], "prompt": "a photo of a person"},
    )


def geneval(detector_folder, tower, metadata, **more):
    paths = {"path": str(detector_folder), "image_tower": str(tower), "metadata": str(metadata)}
    return load_reward(RewardSettings(name="geneval-hf", **paths | more))


def test_the_detector_is_mask2formers_own_computation(detector_folder):
    """Its (query, class) pairs against a plain loop over every one of them."""
    detector, files = load_mask2former(detector_folder)
    pixels = torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(SEED))
    found = detector.detect(pixels)
    assert [file.name for file in files] == ["model.safetensors"] and 0 < len(found) <= 12
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resized = torch.nn.functional.interpolate(pixels[None], (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        classes, masks = detector.model((resized - mean) / std)
    masks = torch.nn.functional.interpolate(masks, (50, 70), mode="bilinear")[0]
    probabilities = classes[0].softmax(-1)
    pairs = sorted(((probabilities[q, c].item(), q, c) for q in range(12) for c in range(80)), reverse=True)[:12]
    expected = []
    for probability, query, label in pairs:
        inside = masks[query] > 0
        if inside.any():
            expected.append((COCO[label], probability, masks[query]))
    assert [d.name for d in found] == [name for name, _, _ in expected], SEED
    for detection, (_, probability, mask) in zip(found, expected):
        # A pixel at the threshold may fall on either side, and is then in the score, or is not.
        assert (detection.mask != (mask > 0)).sum() < 5, SEED
        score = probability * mask.sigmoid()[detection.mask].mean().item()
        assert detection.score == pytest.approx(score, abs=1e-5), SEED
        left, top, right, bottom = detection.box
        assert detection.mask[top:bottom, left:right].sum() == detection.mask.sum()


def test_every_weight_is_used_but_the_losses(detector_folder, tmp_path):
    other = write_mask2former(tmp_path)
    state = load_file(other / "model.safetensors")
    save_file({n: v for n, v in state.items() if n != "class_predictor.bias"}, other / "model.safetensors")
    with pytest.raises(UserError, match=says(str(other), "lacks", 1, "'class_predictor.bias'")):
        load_mask2former(other)
    save_file(state | {"more": torch.zeros(1)}, other / "model.safetensors")
    with pytest.raises(UserError, match=says(str(other), "too many", 1, "'more'")):
        load_mask2former(other)


def test_scores_from_tiny_checkpoints(detector_folder, tower, metadata):
    prompts = ["a photo of a person", "a pink bear and a dog"]
    reward = geneval(detector_folder, tower, metadata)
    images = torch.rand(2, 3, 48, 64)
    together = reward.score(images, prompts)
    assert not reward.differentiable and together.dtype == torch.float32 and together.isfinite().all()
    assert torch.equal(reward.score(images[[1]], prompts[1:]), together[[1]])
    assert reward.spec.name == "geneval-hf" and len(reward.spec.sha256) == 64
    json.dumps(reward.spec.preprocessing)
    with pytest.raises(UserError, match=says("'a photo of a cup'", 2, "reward.metadata")):
        reward.score(images[:1], ["a photo of a cup"])


class Findings:
    names = COCO

    def __init__(self, *objects):
        self.objects = objects

    def detect(self, pixels):
        return list(self.objects)


@pytest.mark.parametrize("credit, score", [("partial", 0.75), ("strict", 0), ("benchmark", 0)])
def test_credits(credit, score, metadata, detector_folder, tower):
    judge = geneval(detector_folder, tower, metadata).judge
    tasks = {"p": task(DOG, LEFT)}
    detector = Findings(seen("dog"), seen("cup", 30))
    reward = GenevalReward(detector, judge, tasks, RewardSpec("geneval-hf"), credit)
    assert reward.score(torch.rand(1, 3, 40, 40), ["p"]).item() == score


def test_colours_are_clips_own(detector_folder, tower, metadata):
    """The mean of three unit text embeddings a colour, against the object's crop."""
    judge = geneval(detector_folder, tower, metadata).judge
    pixels = torch.rand(3, 40, 40)
    objects = [Detection("cup", 1, (2, 3, 20, 30)), Detection("cup", 1, (10, 0, 40, 40), torch.rand(40, 40) < 0.5)]
    clip = judge.clip
    expected = []
    for detection in objects:
        image = clip.model.get_image_features(pixel_values=clip.preprocess(crop(pixels, detection)[None])).pooler_output
        scores = {}
        for colour in ("red orange yellow green blue purple pink brown black white").split():
            texts = [
                f"a photo of a {colour} cup",
                f"a photo of a {colour}-colored cup",
                f"a photo of a {colour} object",
            ]
            mean = clip.encode_text(texts).mean(0)
            scores[colour] = (mean / mean.norm() @ image[0]).item()
        expected.append(max(scores, key=scores.get))
    assert judge.colours(pixels, objects, "cup") == expected
    assert judge.colours(pixels, [], "cup") == []


def test_a_crop_is_the_object_on_grey():
    pixels = torch.rand(3, 8, 9)
    mask = torch.zeros(8, 9, dtype=torch.bool)
    mask[2:5, 3] = True
    cut = crop(pixels, Detection("cup", 1, (2.0, 2.0, 5.0, 6.0), mask))
    assert cut.shape == (3, 4, 3)
    assert torch.equal(cut[:, :3, 1], pixels[:, 2:5, 3])
    assert (cut[:, 3] == 0.6).all() and (cut[:, :, 0] == 0.6).all()
    assert mask_box(mask) == (3, 2, 4, 5)
    assert crop(pixels, Detection("cup", 1, (8.9, 7.9, 8.9, 7.9))).shape == (3, 1, 1)


def test_input_sizes():
    edges = {"shortest_edge": 800, "longest_edge": 1333, "size_divisor": 32}
    assert input_size(edges, 512, 512) == (800, 800)
    assert input_size(edges, 512, 1024) == (672, 1344)
    assert input_size({"height": 384, "width": 384, "size_divisor": 32}, 5, 9) == (384, 384)


def test_class_names_are_genevals_where_they_are_cocos():
    other = {i: "x" for i in range(80)} | {0: "person", 62: "tvmonitor", 79: "toothbrush"}
    assert class_names(other)[62] == "tv" and len(set(COCO)) == 80
    assert class_names({0: "a", 1: "b"}) == ("a", "b")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"tag": "x", "prompt": "p"}', says("line 2", "no 'include'")),
        ('{"tag": "x", "prompt": "p", "include": []}', says("line 2", "included")),
        ("[1]", says("line 2", "object", "prompt")),
        ("{", says("line 2", "property name")),
        (
            '{"tag": "x", "prompt": "p", "include": [{"class": "unicorn", "count": 1}]}',
            says("line 2", "'unicorn'", "person, bicycle"),
        ),
        ('{"tag": "x", "prompt": "p", "include": [{"class": "dog", "count": 0}]}', says("line 2", "count", 0)),
        (
            '{"tag": "x", "prompt": "p", "include": [{"class": "dog", "count": 1, "color": "mauve"}]}',
            says("line 2", "'mauve'", "red, orange"),
        ),
        (
            '{"tag": "x", "prompt": "p", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}',
            says("line 2", "position", 0),
        ),
        ('{"tag": "x", "prompt": "a", "include": [{"class": "cat", "count": 1}]}', says("line 2", "'a'", "demands")),
    ],
)
def test_metadata_that_is_not_genevals_is_one_clear_line(tmp_path, line, message):
    file = write_metadata(tmp_path / "m.jsonl", {"tag": "x", "prompt": "a", "include": [DOG]})
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_tasks(file, COCO)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_the_gpu_sees_what_the_cpu_sees(detector_folder, tower, metadata):
    pixels = torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(SEED))
    ours, theirs = (
        {d.name: d.score for d in load_mask2former(detector_folder, device)[0].detect(pixels.to(device))}
        for device in ("cpu", "cuda")
    )
    assert theirs == pytest.approx(ours, abs=1e-3), SEED
    judge = load_reward(
        RewardSettings(name="geneval-hf", path=str(detector_folder), image_tower=str(tower), metadata=str(metadata)),
        device="cuda",
    ).judge
    # The picture may lie elsewhere than the models.
    for device in ("cpu", "cuda"):
        assert len(judge.colours(pixels.to(device), [Detection("cup", 1, (2, 3, 20, 30))], "cup")) == 1


def test_what_is_missing_is_one_clear_line(tower, detector_folder, metadata, tmp_path):
    with pytest.raises(UserError, match=says("evaluation_metadata.jsonl", "reward.metadata")):
        load_reward(RewardSettings(name="geneval-hf", path=str(detector_folder)))
    with pytest.raises(UserError, match=says("absent.jsonl", "No such file")):
        geneval(detector_folder, tower, tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=says(str(tower), "'clip'", "mask2former")):
        geneval(tower, tower, metadata)
    with pytest.raises(UserError, match=says(f"'{tmp_path / 'gelu'}'", "quick_gelu", "hidden_act")):
        geneval(detector_folder, write_clip(tmp_path / "gelu"), metadata)
    with pytest.raises(UserError, match=says("preprocessor_config.json", "{'longest_edge': 5}", "height and width")):
        load_mask2former(write_mask2former(tmp_path / "edges", size={"longest_edge": 5}))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=says("empty.jsonl", "no task")):
        geneval(detector_folder, tower, tmp_path / "empty.jsonl")
