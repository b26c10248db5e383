"""HPSv2 from its public pickle, against open_clip's computation written out in plain torch, and open_clip itself."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings

import pytest
import torch
from builders.messages import says
from builders.open_clip import ARCHITECTURE, CONTEXT, cosines, letter_tokens, load_hps, random_state, write_hps
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import RewardSettings, hps, load_reward
from rsaft_fast.rewards.hps import VERSIONS
from rsaft_fast.rewards.open_clip import VIT_H_14, to_transformers
from rsaft_fast.rewards.text import BPE_FILE, clip_tokenizer, fixed_text

pytest.importorskip("ftfy")
PROMPTS = ["a red ox", "blue", "big owl"]
FILE = VERSIONS["hpsv2.1"].file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hps(tmp_path_factory.mktemp("hps"))


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def expected_scores(reward, images, prompts=PROMPTS, seed=0):
    return cosines(random_state(seed), reward.preprocess(images), torch.stack([letter_tokens(p) for p in prompts]))


def test_scores_are_those_of_the_original_computation(folder, images):
    double = load_hps(folder, dtype=torch.float64)
    expected = expected_scores(double, images)
    assert expected.std() > 0.05
    torch.testing.assert_close(double.score(images, PROMPTS), expected, rtol=0, atol=1e-12)
    single = load_hps(folder)
    score = single.score(images, PROMPTS)
    assert score.dtype == torch.float32
    assert (score - expected).abs().max() < 1e-6
    percent = load_hps(folder, scale="percent").score(images, PROMPTS)
    torch.testing.assert_close(percent, score * 100)


def test_bf16_towers_give_fp32_scores_near_it(folder, images):
    reward = load_hps(folder, dtype=torch.bfloat16)
    score = reward.score(images, PROMPTS)
    assert score.dtype == torch.float32
    assert (score - expected_scores(reward, images)).abs().max() < 0.03
    # Finer than bf16's own steps: features were cast before the dot product.
    assert not torch.equal(score, score.bfloat16().float())


def test_every_weight_is_used_or_knowingly_dropped():
    state, used = random_state(), []
    renamed = to_transformers(state)
    model = CLIPModel(CLIPConfig(**ARCHITECTURE))
    assert renamed.keys() == model.state_dict().keys()
    for name, value in state.items():
        # Poisoned one at a time, each weight must show up as a NaN in what is loaded.
        marked = to_transformers({name: torch.full_like(value, float("nan"))})
        used += [name] if marked and all(v.isnan().all() for v in marked.values()) else []
    assert sorted(state.keys() - set(used)) == ["attn_mask"]
    with pytest.raises(UserError, match=says("'visual.head.weight'", "open_clip")):
        to_transformers({"visual.head.weight": torch.zeros(1)})


def test_the_full_architecture_has_the_published_size():
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**VIT_H_14))
    parameters = sum(p.numel() for p in model.parameters())
    vision = sum(p.numel() for name, p in model.named_parameters() if name.startswith("visi"))
    assert round(parameters / 1e6, 1) == 986.1
    assert round((vision + model.visual_projection.weight.numel()) / 1e6, 1) == pytest.approx(632.1, abs=1.4)
    # q, k and v are one weight in open_clip: four entries a layer fewer.
    assert len(model.state_dict()) - 4 * (32 + 24) == 686


def test_the_original_preprocessing_longest_side_and_padding_on_the_tensor(folder):
    images = torch.rand(1, 3, 20, 32, dtype=torch.float64)
    reward = load_hps(folder, dtype=torch.float64)
    legacy = load_hps(folder, dtype=torch.float64, resize="legacy_noaa")
    for given_reward, antialias in ((reward, True), (legacy, False)):
        canvas = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
        canvas[:, :, 3:13] = torch.nn.functional.interpolate(images, (10, 16), mode="bicubic", antialias=antialias)
        mean, std = (
            torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (reward.prepare.mean, reward.prepare.std)
        )
        torch.testing.assert_close(given_reward.preprocess(images), (canvas - mean) / std, rtol=0, atol=1e-12)
    assert reward.spec.preprocessing.items() >= {"resize": "aa", "antialias": True, "geometry": "longest_pad"}.items()
    assert legacy.spec.preprocessing.items() >= {"resize": "legacy_noaa", "antialias": False}.items()


def test_gradient_of_the_whole_reward(folder):
    reward = load_hps(folder, dtype=torch.float64, clamp="none")
    images = torch.rand(2, 3, 21, 33, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:2]).sum(), images)
    for seed in range(4):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (reward.score(images + h * direction, PROMPTS[:2]).sum() for h in (1e-5, -1e-5))
        assert (gradient * direction).sum() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-6, abs=1e-8)


@given(st.permutations(range(3)), st.integers(1, 3))
@settings(deadline=None, max_examples=10)
def test_a_score_depends_on_its_own_picture_and_prompt_alone(folder, order, size):
    images = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    reward = load_hps(folder, dtype=torch.float64)
    together = reward.score(images, PROMPTS)
    for first in range(0, 3, size):
        chosen = list(order)[first : first + size]
        part = reward.score(images[chosen], [PROMPTS[i] for i in chosen])
        torch.testing.assert_close(part, together[chosen], rtol=1e-12, atol=1e-12)


def test_prompts_are_cleaned_as_the_original_does(folder, images):
    reward = load_hps(folder)
    assert fixed_text("  cafÃ© &amp;amp; tea ") == "café & tea"
    mended, broken = reward.encode_text(["cafÃ© &amp;amp;", "café &"])
    assert torch.equal(mended, broken)
    # Without the cleaning the two differ: the assertion above is not empty.
    reward.edit_prompt = str
    reward._text_cache.clear()
    assert not torch.equal(*reward.encode_text(["cafÃ© &amp;amp;", "café &"]))


def test_empty_and_overlong_prompts(folder, images):
    reward = load_hps(folder, dtype=torch.float64)
    prompts = ["", "x " * 500, "x " * 10]
    score = reward.score(images[:1].expand(3, -1, -1, -1), prompts)
    text = reward.encode_text(prompts)
    assert torch.equal(text[1], text[2]) and abs(score[0] - score[1]) > 0.01
    torch.testing.assert_close(
        score, expected_scores(reward, images[:1].expand(3, -1, -1, -1), prompts), atol=1e-12, rtol=0
    )
    assert (letter_tokens("x " * 500) == letter_tokens("x " * (CONTEXT - 2))).all()


def test_without_ftfy_there_is_one_clear_line(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match="pip install ftfy") as caught:
        load_hps(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["bare dict", "module prefix", "model prefix", "fp16", "safetensors", "old pickle"])
def test_every_layout_of_the_weights_scores_the_same(folder, tmp_path, images, layout):
    write_hps(tmp_path)
    state, file = random_state(), tmp_path / FILE
    if layout == "bare dict":
        torch.save(state, file)
    elif layout.endswith("prefix"):
        torch.save({"state_dict": {f"{layout.split()[0]}.{k}": v for k, v in state.items()}}, file)
    elif layout == "fp16":
        torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, file)
    elif layout == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=False)
    limit = 2e-2 if layout == "fp16" else 1e-6
    reward = load_hps(file)
    assert (reward.score(images, PROMPTS) - expected_scores(reward, images)).abs().max() < limit
    assert reward.spec.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_folder_in_transformers_format_scores_the_same(folder, tmp_path, images):
    load_hps(folder).model.save_pretrained(tmp_path)
    clip_tokenizer(folder).save_pretrained(tmp_path)
    expected = load_hps(folder).score(images, PROMPTS)
    torch.testing.assert_close(load_hps(tmp_path).score(images, PROMPTS), expected, rtol=0, atol=1e-6)


def test_the_other_versions_file_is_recognised(folder, monkeypatch):
    md5 = hashlib.md5((folder / FILE).read_bytes()).hexdigest()
    monkeypatch.setitem(hps.VERSIONS, "hpsv2.1", hps.HpsVersion(FILE, md5))
    assert load_hps(folder, name="hpsv2.1").spec.name == "hpsv2.1"
    with pytest.raises(UserError, match="is the published hpsv2.1, not hpsv2; write reward.name=hpsv2.1"):
        load_hps(folder / FILE, name="hpsv2")


class Executed:
    """Unpickling this creates the file of its name."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def spoil(folder, how):
    file, state = folder / FILE, random_state()
    if how == "code":
        torch.save({"state_dict": state, "hook": Executed(folder / "executed")}, file)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-2000])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    elif how == "no weights":
        torch.save({"state_dict": {}, "epoch": 1}, file)
    elif how == "a list":
        torch.save([torch.zeros(3)], file)
    elif how == "missing":
        del state["visual.proj"]
        torch.save({"state_dict": state}, file)
    elif how == "foreign":
        torch.save({"state_dict": state | {"rm_head.0.weight": torch.zeros(1)}}, file)
    elif how == "shape":
        torch.save({"state_dict": state | {"visual.positional_embedding": torch.zeros(10, 24)}}, file)
    elif how == "a layer more":
        more = {k.replace("resblocks.1.", "resblocks.2."): v for k, v in state.items() if k.startswith("visual.")}
        torch.save({"state_dict": state | more}, file)
    elif how == "no tokenizer":
        for name in ("tokenizer.json", "vocab.json"):
            (folder / name).unlink(missing_ok=True)
    elif how == "no file":
        file.unlink()


@pytest.mark.parametrize(
    "how, message",
    [
        ("code", says(FILE, "code", "safetensors")),
        ("cut", says(FILE, "RuntimeError: PytorchStreamReader")),
        ("empty", says(FILE, "neither", "safetensors", "PyTorch")),
        ("pointer", says(FILE, "git lfs pull")),
        ("no weights", says(FILE, "keys: none")),
        ("a list", says(FILE, "list", "state dict")),
        ("missing", says(FILE, "lacks", 1, "'visual_projection.weight'")),
        ("foreign", says("'rm_head.0.weight'", "open_clip")),
        ("shape", says(FILE, "position_embedding.weight", "(10, 24)", "(5, 24)")),
        ("a layer more", says(FILE, "too many", 16, "layers.2.")),
        ("no tokenizer", says("HPSv2", "tokenizer", "bpe_simple_vocab_16e6.txt.gz")),
        ("no file", says("test_a_broken_checkpoint", f" {FILE};")),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(tmp_path, monkeypatch, how, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = write_hps(tmp_path)
    spoil(folder, how)
    with pytest.raises(UserError, match=message) as caught:
        load_hps(folder)
    assert "\n" not in str(caught.value) and not (folder / "executed").exists()


def test_a_recipe_names_it(folder, images, monkeypatch):
    monkeypatch.setattr(hps.HpsSettings, "architecture", ARCHITECTURE)
    settings = RewardSettings(name="hpsv2.1", path=str(folder), resize="legacy_noaa", scale="percent")
    reward = load_reward(settings)
    direct = load_hps(folder, resize="legacy_noaa", scale="percent")
    assert torch.equal(reward.score(images, PROMPTS), direct.score(images, PROMPTS)) and reward.spec == direct.spec
    # This file is v2.1's, and its name the other's default.
    with pytest.raises(UserError, match=says("HPS_v2_compressed.pt")):
        load_reward(settings.model_copy(update={"name": "hpsv2"}))


def test_a_wrong_path_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path, message in (
        ("/no/such/file.pt", says("'/no/such/file.pt'", "HPS_v2.1_compressed.pt")),
        ("nobody/none", says("'nobody/none'", "HF_HUB_OFFLINE")),
    ):
        with pytest.raises(UserError, match=message):
            load_hps(path)


def import_open_clip():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import open_clip
            import open_clip.model
    except Exception as error:
        # It needs torchvision, whose builds fail in many ways beside another torch.
        pytest.skip(f"open_clip does not import: {error}")
    return open_clip


def test_scores_are_open_clips_own(tmp_path, images):
    open_clip = import_open_clip()
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 24, "head_width": 12, "patch_size": 8, "image_size": 16}
    writing = {"context_length": CONTEXT, "vocab_size": 514, "width": 16, "heads": 2, "layers": 3}
    model = open_clip.model.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=writing).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reward = load_hps(write_hps(tmp_path, state=model.state_dict()), dtype=torch.float64)
    tokens = torch.stack([letter_tokens(p) for p in PROMPTS])
    with torch.no_grad():
        image = model.encode_image(reward.preprocess(images), normalize=True)
        expected = (image * model.encode_text(tokens, normalize=True)).sum(1)
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=0, atol=1e-12)


def test_tokens_are_open_clips_own(tmp_path):
    open_clip = import_open_clip()
    merges = os.path.join(os.path.dirname(open_clip.__file__), BPE_FILE)
    ours, theirs = clip_tokenizer(merges), open_clip.tokenizer.SimpleTokenizer(merges)
    assert len(ours) == 49408
    for prompt in [
        "A cafÃ© &amp; a TEA-house, 1234 cats' eyes!",
        "",
        "naïve – “quoted” — don't\nbreak\t here…",
        "猫 на крыше 🐈 ½ ﬁne",
        "very long " * 60,
    ]:
        expected = theirs([prompt])[0].tolist()
        tokens = ours(fixed_text(prompt), truncation=True, max_length=77)["input_ids"]
        assert tokens == expected[: len(tokens)] and not any(expected[len(tokens) :])
