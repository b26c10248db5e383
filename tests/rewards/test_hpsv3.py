"""HPSv3 from its public layout, against transformers' own Qwen2-VL forward with what the original changed in it."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.hpsv3 import (
    CONFIG,
    IMAGE,
    INSTRUCTION,
    SmallHpsv3,
    published_names,
    random_state,
    word_tokens,
    write_hpsv3,
    write_tokenizer,
)
from builders.messages import says
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from rsaft_fast.errors import UserError
from rsaft_fast.memory import checkpoint_calls, saved_tensor_bytes
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.rewards.hpsv3 import Hpsv3Settings, score_head
from rsaft_fast.rewards.hpsv3_text import CONSTANTS, SOURCE, read_instruction
from rsaft_fast.rewards.qwen2_vl import QWEN2_VL_7B, Qwen2VLFeatures, SmartResize, patchify

PROMPTS = ["a red ox", "b", "a much longer prompt, with ünicode and {braces}"]
PIXELS = SmallHpsv3.pixels
pytestmark = pytest.mark.filterwarnings("ignore:this is not the instruction")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hpsv3(tmp_path_factory.mktemp("hpsv3"))


def load(path, family=SmallHpsv3, **options):
    files = {"path": path, "instruction": (path if path.is_dir() else path.parent) / "instruction.txt"} | options
    return load_reward(family(**{key: str(v) if isinstance(v, Path) else v for key, v in files.items()}))


@pytest.fixture
def images():
    return torch.rand(3, 3, 60, 90, generator=torch.Generator().manual_seed(1))


def reference_moments(pixels, prompts):
    """(mu, sigma) by transformers' Qwen2VLModel, as transformers 4.45 ran it after a cast of everything to bf16 and
    back: consecutive positions, rounded rotary constants; padded on the right, under an attention mask."""
    state = random_state()
    model = Qwen2VLModel(Qwen2VLConfig(**CONFIG)).eval()
    weights = {n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")}
    assert not model.load_state_dict(weights).missing_keys
    rotary = model.language_model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    height, width = pixels.shape[-2] // 14, pixels.shape[-1] // 14
    inverse = (1 / 1e4 ** (torch.arange(0, 8, 2).float() / 8)).bfloat16()
    places = [
        (2 * r + i, 2 * c + j) for r in range(height // 2) for c in range(width // 2) for i in (0, 1) for j in (0, 1)
    ]
    table = torch.outer(torch.arange(max(height, width)).bfloat16(), inverse)
    angles = table[torch.tensor(places)].flatten(1).repeat(len(pixels), 1)
    model.visual.rotary_pos_emb.forward = lambda x, _: (
        angles.cos().repeat(1, 2).float(),
        angles.sin().repeat(1, 2).float(),
    )
    rows = [torch.tensor(word_tokens(prompt, height * width // 4)) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=256)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    processor = Qwen2VLImageProcessorPil()
    patches = [processor.patchify(p.numpy(), 14, 2, 2)[0] for p in pixels]
    patches = torch.cat([torch.as_tensor(np.asarray(p)).flatten(0, -2) for p in patches])
    with torch.no_grad():
        features = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=torch.arange(tokens.shape[1]).expand(3, len(tokens), -1),
            pixel_values=patches,
            image_grid_thw=torch.tensor([[1, height, width]] * len(pixels)),
        ).last_hidden_state
        x = features[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
        for position in (0, 3, 5):
            x = F.linear(x, state[f"rm_head.{position}.weight"], state[f"rm_head.{position}.bias"])
            x = x.relu() if position < 5 else x
    return x


def test_scores_are_those_of_transformers_own_forward(folder, images):
    reward = load(folder)
    inputs = reward.preprocess(images)
    expected = reference_moments(inputs, PROMPTS)
    assert expected.std(0).min() > 0.05
    torch.testing.assert_close(reward.moments(inputs, PROMPTS), expected, rtol=0, atol=1e-6)
    score = reward.score(images, PROMPTS)
    assert score.dtype == torch.float32 and score.shape == (3,)
    torch.testing.assert_close(score, expected[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", ["names of transformers 5", "a pickle"])
def test_every_layout_scores_the_same(folder, images, tmp_path, change):
    other = write_hpsv3(tmp_path, random_state() if change.startswith("names") else None)
    path = other
    if change == "a pickle":
        path = other / "model.pt"
        torch.save(published_names(random_state()), path)
    reward = load(path)
    torch.testing.assert_close(reward.score(images, PROMPTS), load(folder).score(images, PROMPTS), rtol=0, atol=1e-6)


def test_a_recipe_names_it(folder, images):
    """At the published number of pixels; the tokenizer is the one beside the weights."""
    settings = RewardSettings(name="hpsv3", path=str(folder), instruction=str(folder / "instruction.txt"))
    expected = load(folder, Hpsv3Settings).score(images[:1], PROMPTS[:1])
    torch.testing.assert_close(load_reward(settings).score(images[:1], PROMPTS[:1]), expected)


def test_every_weight_is_used_or_knowingly_dropped(folder):
    reward = load(folder)
    held = sum(p.numel() for p in reward.parameters())
    state = random_state()
    assert held == sum(v.numel() for v in state.values()) - state["lm_head.weight"].numel()
    assert not any(p.requires_grad for p in reward.parameters()) and not reward.train().training


def test_full_size_has_the_published_number_of_parameters():
    """Qwen2-VL-7B-Instruct: 16,582,751,232 bytes of bf16 (its safetensors index); HPSv3 cuts the vocabulary to the
    tokenizer's 151,657 and the reward's token, and adds the head."""
    with torch.device("meta"):
        config = Qwen2VLConfig(**QWEN2_VL_7B)
        count = sum(p.numel() for p in Qwen2VLFeatures(config).parameters())
        head = sum(p.numel() for p in score_head(3584).parameters())
    vocabulary = 152064 * 3584
    assert 2 * (count + vocabulary) == 16_582_751_232
    assert head == 3_687_474
    assert count + vocabulary + head - 2 * (152064 - 151658) * 3584 == 8_292_152_882


def test_bytes_kept_at_full_size_in_bf16():
    """One picture of 448x448 and 1000 tokens: what recomputation cannot do without is each layer's input."""
    with torch.device("meta"):
        config = Qwen2VLConfig(**QWEN2_VL_7B)
    inputs = 32 * 1024 * 1280 + 28 * 1000 * 3584 + 1024 * 3584
    kept = {}
    for checkpoint in (False, True):
        with torch.device("meta"):
            model = Qwen2VLFeatures(config).bfloat16().requires_grad_(False).eval()
            pixels = torch.empty(1, 3, 448, 448, dtype=torch.bfloat16, requires_grad=True)
            tokens, places = torch.zeros(1, 1000, dtype=torch.long), torch.tensor([999])
        if checkpoint:
            checkpoint_calls(model.layers)
        with saved_tensor_bytes(model.parameters()) as saved:
            assert model(pixels, tokens, places).shape == (1, 3584)
        kept[checkpoint] = saved.peak
    assert 1 <= kept[True] / (2 * inputs) < 1.2
    assert kept[False] > 10 * kept[True]


@pytest.mark.parametrize("shape", [(1024, 1024), (512, 768), (300, 300), (17, 900), (448, 448), (1, 40), (31, 29)])
def test_sizes_are_those_of_the_original(shape):
    height, width = shape
    size = SmartResize().size(height, width)
    if min(shape) > 14:  # below, transformers' own function now rounds a side to 0
        assert size == smart_resize(height, width, 28, 200704, 200704)
    assert all(side % 28 == 0 and side > 0 for side in size)
    assert 0.7 < size[0] * size[1] / 200704 < 1.5 or min(shape) < 20


def test_pixels_are_those_of_qwens_own_processor(tmp_path):
    """Resize, normalisation and the order of patches: within PIL's rounding to 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (75, 110, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((220, 150), Image.BICUBIC)
    prepare = SmartResize(PIXELS)
    size = prepare.size(150, 220)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})
    expected = processor(images=smooth, return_tensors="pt")
    assert expected["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
    image = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None] / 255
    ours = patchify(prepare(image), 14, 2, 2)
    assert ours.shape == expected["pixel_values"].shape
    error = (ours - expected["pixel_values"]).abs() * 0.27 * 255
    assert error.mean() < 0.3


@pytest.fixture
def in_float64(monkeypatch):
    """Qwen2-VL without its own casts to fp32, whose rounding finite differences would see."""

    def norm(self, x):
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())

    def rotate(q, k, cos, sin):
        half = modeling_qwen2_vl.rotate_half
        cos, sin = cos[:, None].double(), sin[:, None].double()
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    monkeypatch.setattr(modeling_qwen2_vl.Qwen2VLRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen2_vl, "apply_rotary_pos_emb_vision", rotate)


def test_gradient_of_the_whole_reward(folder, in_float64):
    reward = load(folder, dtype=torch.float64, clamp="none")
    images = torch.rand(2, 3, 50, 80, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[1:]).sum(), images)
    assert (gradient != 0).double().mean() > 0.99
    for seed in range(3):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (reward.score(images + h * direction, PROMPTS[1:]).sum() for h in (1e-6, -1e-6))
        assert (gradient * direction).sum() == pytest.approx((ahead - behind).item() / 2e-6, rel=1e-5, abs=1e-8)


def test_a_score_does_not_depend_on_its_neighbours(folder, in_float64):
    reward = load(folder, dtype=torch.float64)
    images = torch.rand(3, 3, 60, 90, dtype=torch.float64)
    together = reward.score(images, PROMPTS)
    for chosen in ([0], [1], [2, 0], [2, 1, 0]):
        part = reward.score(images[chosen], [PROMPTS[i] for i in chosen])
        torch.testing.assert_close(part, together[chosen], rtol=1e-12, atol=1e-12)
    poisoned = images.clone()
    poisoned[1] = float("nan")
    score = reward.score(poisoned, PROMPTS)
    assert score.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(score[[0, 2]], together[[0, 2]], rtol=1e-12, atol=1e-12)
    assert reward.score(images[:0], []).shape == (0,)


def test_the_picture_and_the_prompt_matter(folder, images):
    reward = load(folder)
    score = reward.score(images[:1].expand(3, -1, -1, -1), ["", "a b", "x " * 250])
    assert len(set(score.tolist())) == 3 and score.isfinite().all()
    assert reward.score(images, ["a"] * 3).std() > 1e-3


def test_bf16_keeps_the_head_and_the_rotary_constants(folder, images):
    reward, exact = load(folder, dtype=torch.bfloat16), load(folder)
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}
    score = reward.score(images, PROMPTS)
    assert score.dtype == torch.float32
    assert (score - exact.score(images, PROMPTS)).abs().max() < 0.2
    rounded = reward.model.language_model.rotary_emb.inv_freq.float()
    assert torch.equal(rounded, exact.model.language_model.rotary_emb.inv_freq)


def test_checkpointed_layers_keep_less_and_change_no_bit(folder):
    results, images = {}, torch.rand(2, 3, 56, 84)
    for checkpoint in (False, True):
        reward = load(folder, checkpoint=checkpoint)
        x = images.clone().requires_grad_()
        with saved_tensor_bytes(reward.parameters()) as saved:
            score = reward.score(x, PROMPTS[:2])
        results[checkpoint] = (saved.peak, score.detach(), torch.autograd.grad(score.sum(), x)[0])
    assert results[True][0] < 0.65 * results[False][0]  # two layers each; the patches and the head stay
    assert torch.equal(results[True][1], results[False][1]) and torch.equal(results[True][2], results[False][2])


@pytest.mark.gpu
def test_the_gpu_scores_as_the_cpu(folder, images):
    expected = load(folder).score(images, PROMPTS)
    x = images.cuda().requires_grad_()
    score = load(folder, device="cuda").score(x, PROMPTS)
    torch.testing.assert_close(score.cpu(), expected, rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(score.sum(), x)
    assert gradient.isfinite().all() and (gradient != 0).double().mean() > 0.99
    low = load(folder, device="cuda", dtype=torch.bfloat16).score(images.cuda(), PROMPTS)
    assert low.dtype == torch.float32 and (low.cpu() - expected).abs().max() < 0.2


def test_tokens_are_those_of_the_published_conversation(folder):
    conversation = load(folder).conversation
    for prompt in PROMPTS:
        assert conversation.tokens(prompt, 6) == word_tokens(prompt, 6)
    assert conversation.image_token == IMAGE


def test_the_instruction_comes_from_the_authors_package_unrun(tmp_path):
    source = f"import nothing_of_that_name\nINSTRUCTION = {'A {text_prompt} '!r}\n{CONSTANTS[1]} = 'is <|Reward|>'\n"
    (tmp_path / "data_collator_qwen.py").write_text(source)
    with zipfile.ZipFile(tmp_path / "hpsv3-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(SOURCE, source)
    for name in ("data_collator_qwen.py", "hpsv3-1.0.0-py3-none-any.whl"):
        assert read_instruction(tmp_path / name) == "A {text_prompt} is <|Reward|>"


def test_another_instruction_is_said_aloud_and_recorded(folder):
    with pytest.warns(UserWarning, match="HPSv3's"):
        reward = load(folder)
    facts = reward.spec.preprocessing
    assert facts["instruction_sha256"] == hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    assert reward.spec.sha256 == hashlib.sha256((folder / "HPSv3.safetensors").read_bytes()).hexdigest()
    json.dumps(facts)


def spoil(folder, how):
    """Returns the options under which to load."""
    weights, state = folder / "HPSv3.safetensors", published_names(random_state())
    if how == "no instruction":
        return {"instruction": None}
    if how == "instruction without the token":
        (folder / "instruction.txt").write_text("{text_prompt}")
    elif how == "instruction absent":
        return {"instruction": folder / "absent.txt"}
    elif how == "wheel that is none":
        (folder / "x.whl").write_text("no zip")
        return {"instruction": folder / "x.whl"}
    elif how == "code without it":
        (folder / "x.py").write_text("INSTRUCTION = open('x').read()")
        return {"instruction": folder / "x.py"}
    elif how == "weight missing":
        del state["rm_head.3.bias"]
    elif how == "weight unknown":
        state["visuals.x"] = torch.zeros(1)
    elif how == "head of another shape":
        state["rm_head.5.weight"] = torch.zeros(4, 16)
    elif how == "another tokenizer":
        state["model.embed_tokens.weight"] = torch.zeros(300, 32)
    elif how == "another config":
        (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen2_5_vl"}))
    elif how == "another architecture":  # without a config.json the weights are taken for the published ones
        (folder / "config.json").unlink()
    elif how == "no tokenizer":
        (folder / "vocab.json").unlink()
    elif how == "no chat template":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in state.items()}, weights)
    return {}


@pytest.mark.parametrize(
    "how, message",
    [
        ("no instruction", says("pip download hpsv3", "reward.instruction=")),
        ("instruction without the token", says("instruction.txt", "<|Reward|>", 0)),
        ("instruction absent", says("absent.txt", "reward.instruction=")),
        ("wheel that is none", says("x.whl", "BadZipFile", "reward.instruction=")),
        ("code without it", says("x.py", "INSTRUCTION", "reward.instruction=")),
        ("weight missing", says("HPSv3.safetensors", "lacks", 1, "'3.bias'")),
        ("weight unknown", says("'visuals.x'", "Qwen2-VL")),
        ("head of another shape", says("HPSv3.safetensors", "5.weight", "(4, 16)", "(2, 16)")),
        ("another tokenizer", says("tokens", 263, "HPSv3.safetensors", 300, "Qwen2-VL-7B-Instruct")),
        ("another config", says("config.json", "'qwen2_5_vl'", "(qwen2_vl)")),
        ("another architecture", says("HPSv3.safetensors", "lacks", "layers.10.input_layernorm.weight")),
        ("no tokenizer", says("vocab.json", "Qwen2-VL-7B-Instruct")),
        ("no chat template", says("chat template", "Qwen2-VL-7B-Instruct")),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(tmp_path, how, message):
    folder = write_hpsv3(tmp_path)
    options = spoil(folder, how)
    with pytest.raises(UserError, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def test_wrong_input_is_one_clear_line(folder, images, tmp_path):
    reward = load(folder)
    for prompts, message in [
        (["a", "<|Reward|>", "b"], says("<|Reward|>", "HPSv3")),
        (["a", "b"], says("prompts", 2, "images", 3)),
        ("a", says("prompts", "string", 3)),
    ]:
        with pytest.raises(UserError, match=message):
            reward.score(images, prompts)
    with pytest.raises(UserError, match=says("2x600", 200, 1)):
        reward.score(torch.rand(1, 3, 2, 600), ["a"])
    with pytest.raises(UserError, match=says("(B, 3, H, W)", "(1, 4, 30, 30)", "images[:, :3]")):
        reward.score(torch.rand(1, 4, 30, 30), ["a"])
    elsewhere = write_tokenizer(tmp_path / "tokenizer")
    torch.testing.assert_close(load(folder, tokenizer=elsewhere).score(images, PROMPTS), reward.score(images, PROMPTS))
