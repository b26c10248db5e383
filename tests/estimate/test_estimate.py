"""The estimate against what really is alive at tiny size, and against published figures at real size."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from builders.clip import write_clip
from builders.hpsv3 import write_hpsv3
from builders.image_reward import head_state, write_image_reward
from builders.recipes import config as tiny_config
from torch.utils._pytree import tree_map_only

from rsaft_fast import phases
from rsaft_fast.backbones import Conditioning, krea2, qwen_image, turns
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.data.encodings import load_shapes, load_text_encoders
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.estimate.live import LiveBytes
from rsaft_fast.ops import library
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards import load_reward
from rsaft_fast.smoothing.precision import s1_error
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.trainer import Trainer


@pytest.fixture
def kernels_on_the_host(host_library, monkeypatch, request):
    """The torch path makes float32 copies that no kernel makes."""
    monkeypatch.setenv(library.ENV, str(host_library))
    monkeypatch.setenv("RSAFT_BACKEND", "cuda")
    library.forget()
    request.addfinalizer(library.forget)


def really_alive(config: Config) -> LiveBytes:
    """Peaks of the trainer's second update, on the CPU."""
    trainer = Trainer(config, check_config(config))
    trainer.encoded = as_on_a_gpu(trainer.encoded)
    trainer.update()
    trainer.optimizer.zero_grad()
    live = LiveBytes("cpu")
    live.exclude(trainer.backbone.offloaded.host if trainer.backbone.offloaded else ())
    optimizer = trainer.optimizer
    live.exclude(part.host for bucket in optimizer._buckets for part in getattr(bucket, "parts", ()))
    for module in (*trainer.backbone.modules(), trainer.reward):
        live.see([*module.parameters(), *module.buffers()])
    live.see(t for state in optimizer.state.values() for t in state.values() if t.ndim)
    for bucket in optimizer._buckets:
        live.see(v for v in vars(bucket.table).values() if isinstance(v, torch.Tensor))
        live.see(bucket.table["backup"] if "backup" in bucket.table else ())
    if trainer.ema:
        live.see(trainer.ema.means.values())
    for tensors in trainer.algorithm.held().values():
        live.see(tensors)
    if trainer.ascent:
        live.see(t for kept in trainer.ascent.kept.values() for t in kept.values())
    with live:
        trainer.update()
    return live


def as_on_a_gpu(encoded: EncodedPrompts) -> Callable[[Sequence[str]], Conditioning]:
    """Every picture has unconditional embeddings of its own there; on the CPU all share a row."""

    def encode(texts):
        found = encoded(texts)
        negative = found.negative and {name: tensor.contiguous() for name, tensor in found.negative.items()}
        return replace(found, negative=negative)

    return encode


FULL = {"parameters": {"train": "full"}}
FULL_8BIT = FULL | {
    "backbone__dtype": "bf16",
    "optimizer__state_bits": 8,
    "optimizer__stochastic_rounding": True,
}
CHECKPOINTED = {"backbone__checkpoint": ["denoiser", "decoder"]}
CASES = {
    ("sd15", "lora"): {},
    ("sd15", "checkpointed"): CHECKPOINTED,
    ("sd15", "guided, accumulated"): {"sampler": {"steps": 3, "guidance_scale": 3.0}, "data__accumulate": 3},
    ("sd15", "latent ball"): {"smoothing": {"image": {"space": "latent"}}},
    ("sd15", "full"): FULL,
    ("sd15", "full, 8 bits, in gradients"): FULL_8BIT | {"optimizer__backup": "gradient"},
    ("sd15", "decoded in strips"): {"backbone__checkpoint": ["denoiser", "decoder-strips"]},
    ("sdxl", "checkpointed"): CHECKPOINTED,
    ("sdxl", "blocks on the host"): CHECKPOINTED | {"backbone__offload_blocks": 8},
    ("flux", "a block on the host"): CHECKPOINTED | {"backbone__offload_blocks": 1},
    ("sd3", "lora"): {},
    ("sd3", "a block kept"): CHECKPOINTED | {"backbone__keep_blocks": 1},
    ("sd3", "two calls, checkpointed"): CHECKPOINTED | {"method": {"name": "draft", "k": 2}},
    ("sd3", "leaps"): {"method": {"name": "flowbp_lagrange"}, "sampler": {"steps": 6}},
    ("sd15", "a bridge"): CHECKPOINTED | {"method": {"name": "flowbp_bridge", "k": 3}, "sampler": {"steps": 5}},
    ("sd3", "no smoothing"): {"smoothing": {"image": None, "parameters": None}},
    ("sd3", "full, no smoothing"): FULL | {"smoothing": {"image": None, "parameters": None}},  # nothing is backed up
    ("sd3", "full, momentum"): FULL | {"smoothing": {"parameters": {"direction": "momentum"}}},
    ("sd3", "full, friendly"): FULL | {"smoothing": {"parameters": {"direction": "friendly"}}},
    ("sd3", "full, checkpointed"): FULL | CHECKPOINTED,
    ("sd3", "full, 8 bits, released"): FULL_8BIT | {"optimizer__release_gradients": True},
    ("sd3", "full, 8 bits, released, on the host"): FULL_8BIT
    | {"optimizer__release_gradients": True, "optimizer__offload": "state"},
    ("sd3", "full, master, on the host"): FULL | {"backbone__dtype": "bf16", "optimizer__offload": "state"},
    ("flux", "full, on the host"): FULL | {"optimizer__offload": "state"},
    ("sd3", "full, master, mean"): FULL | {"backbone__dtype": "bf16", "ema": {"decay": 0.9}},
    ("sd3", "full, anchored"): FULL | {"regularize": {"kl_to_base": 1.0}},
    ("flux", "lora"): {},
    ("flux", "full, 8 bits"): FULL_8BIT,
    ("sd15", "nf4"): {"backbone__quantize": "nf4"},
    ("sdxl", "nf4, checkpointed"): CHECKPOINTED | {"backbone__quantize": "nf4"},
    ("sd3", "fp8"): {"backbone__quantize": "fp8"},
    ("klein", "full, 8 bits"): FULL_8BIT,
    ("klein", "checkpointed, decoded in strips"): {"backbone__checkpoint": ["denoiser", "decoder-strips"]},
    ("zimage", "lora"): {},
    ("zimage", "nf4, guided in one call"): CHECKPOINTED
    | {"backbone__quantize": "nf4", "sampler": {"steps": 2, "guidance_scale": 3.0}, "speed": {"cfg": "batched"}},
    ("flux", "int8, a block on the host"): CHECKPOINTED | {"backbone__quantize": "int8", "backbone__offload_blocks": 1},
}
CASES |= {
    ("qwen", "guided, checkpointed"): CHECKPOINTED | {"sampler": {"steps": 3, "guidance_scale": 3.0}},
    ("qwen", "full, decoded in strips"): FULL | {"backbone__checkpoint": ["denoiser", "decoder-strips"]},
    ("qwen", "nf4, checkpointed, a block on the host"): CHECKPOINTED
    | {"backbone__quantize": "nf4", "backbone__offload_blocks": 1},
}
CASES |= {
    ("krea", "guided, checkpointed"): CHECKPOINTED | {"sampler": {"steps": 3, "guidance_scale": 3.0}},
    ("krea", "full, 8 bits, decoded in strips"): FULL_8BIT | {"backbone__checkpoint": ["denoiser", "decoder-strips"]},
    ("krea", "nf4, checkpointed, a block on the host"): CHECKPOINTED
    | {"backbone__quantize": "nf4", "backbone__offload_blocks": 1},
}
OFTEN = ("sd15", "sd3", "flux")  # the other families are seen with the slow tests
MARKED = [case if case[0] in OFTEN else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
pytestmark = pytest.mark.filterwarnings("ignore:this is not the instruction")


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    """Estimates count texts of Qwen-Image and Krea-2 at their longest; these are as long as the prompts here are."""
    monkeypatch.setattr(qwen_image, "MOST_TEXT", 8)
    monkeypatch.setattr(krea2, "MOST_TEXT", 8)


UPDATE = (phases.SAMPLING, phases.SCORING, phases.DECODER, phases.DENOISER)


@pytest.mark.usefixtures("kernels_on_the_host")
@pytest.mark.parametrize(("family", "case"), MARKED)
def test_every_phase_is_what_really_is_alive(tiny, out, family, case):
    config = tiny_config(tiny, out, family, **CASES[family, case])
    if family == "zimage":  # the estimate is for texts as long as the pipeline reads them
        long = out.with_name("long.txt")
        long.write_text("\n".join(100 * letter for letter in "abcd"))
        config = config.model_copy(update={"data": config.data.model_copy(update={"prompts": str(long)})})
    real, found = really_alive(config), estimate(config, cuda=False)
    staged = [name for name in (phases.PERTURBING, phases.UPDATING) if found.phase(name)]
    staged = staged if config.optimizer.offload == "state" else []
    update = (*UPDATE, *([phases.ANCHORING] if config.regularize else []))
    # Qwen-Image's table of positions is on the device too; on the host it lies before the count begins.
    table = 4096 * 4 * 8 if family == "qwen" else 0
    for name in (*update, *staged):
        assert found.phase(name).total == pytest.approx(real.peaks[name].total + table, rel=0.02, abs=16_384), name
    assert max(found.phase(name).total for name in update) == pytest.approx(real.peak + table, rel=0.02)


def on_a_device_of_its_own(monkeypatch) -> None:
    """What goes to the host leaves the count; what comes from there is new. Values are lost on the way."""
    monkeypatch.setattr(turns, "_is_host", lambda device: False)
    away = lambda t: t.to("meta")  # noqa: E731
    back = lambda t: torch.zeros_like(t, device="cpu")  # noqa: E731
    moved = lambda tree, to: tree_map_only(torch.Tensor, away if to == turns.HOST else back, tree)  # noqa: E731
    monkeypatch.setattr(turns, "_moved", lambda tree, to: moved(tree, to if isinstance(to, str) else "device"))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "klein", "zimage", "qwen", "krea"])
def test_encoding_needs_what_it_really_needs(tiny, out, family, monkeypatch):
    settings = tiny_config(
        tiny, out, family, sampler={"steps": 2, "guidance_scale": 3.0} if family != "flux" else {"steps": 2}
    )
    found = estimate(settings, cuda=False)
    shapes = load_shapes(settings.backbone, torch.float32, torch.device("cpu"))
    backbone = load_text_encoders(settings.backbone, shapes)
    on_a_device_of_its_own(monkeypatch)
    encoders = [getattr(backbone.pipeline, name) for name in backbone.text_encoder_names()]
    sizes = [sum(t.numel() * t.element_size() for t in (*e.parameters(), *e.buffers())) for e in encoders if e]
    live = LiveBytes("cpu")
    live.exclude(t for encoder in encoders if encoder for t in (*encoder.parameters(), *encoder.buffers()))
    with live:
        list(turns.encode_in_turns(backbone, ["a prompt", None]))
    peak = found.phase(phases.ENCODING)
    # A language model's masks and logits are most of a tiny one's bytes, and a hundredth of a real one's.
    allowed = {"abs": 100_000} if family in ("klein", "zimage") else {"rel": 0.05}
    assert peak.total == pytest.approx(live.peaks[phases.ENCODING].total, **allowed)
    assert found.phases[0] is peak and peak.beside == 0 and peak.total > max(sizes)


@pytest.mark.parametrize("name", ["clip", "imagereward", "aesthetic", "hpsv3", "combination"])
def test_rewards_need_what_they_really_need(tiny, out, tmp_path, name):
    settings = tiny_config(tiny, out, reward=reward_of(name, tiny, tmp_path))
    found = estimate(settings, cuda=False)
    reward = load_reward(settings.reward)
    live = LiveBytes("cpu")
    live.see(t for t in (*reward.parameters(), *reward.buffers()))
    with live, phases.phase(phases.KEEPING):
        reward.keep_prompts(["a prompt"])
    assert found.standing["reward"] == pytest.approx(live.alive, abs=1024)
    if name in ("clip", "combination"):
        assert found.phase(phases.KEEPING).total == pytest.approx(live.peaks[phases.KEEPING].total, rel=0.02)
    else:
        assert phases.KEEPING not in live.peaks
    # The tower is gone from the estimate of the next run no more than from this one's.
    assert estimate(settings, cuda=False) == found


@pytest.mark.parametrize("name", ["imagereward", "aesthetic", "hpsv3", "combination"])
def test_updates_with_other_rewards_are_what_really_is_alive(tiny, out, tmp_path, name, kernels_on_the_host):
    settings = tiny_config(tiny, out, reward=reward_of(name, tiny, tmp_path))
    real, found = really_alive(settings), estimate(settings, cuda=False)
    # On shapes, autograd holds the resized pictures once more: HPSv3's are 448 x 448, beside a tiny model.
    resized = 2 * 3 * 448 * 448 * 4 if name == "hpsv3" else 0
    for phase in UPDATE:
        assert found.phase(phase).total == pytest.approx(real.peaks[phase].total, rel=0.02, abs=16_384 + resized), phase


def reward_of(name, tiny, tmp_path) -> dict:
    if name == "imagereward":
        return {"name": name, "path": str(write_image_reward(tmp_path / "blip"))}
    if name == "aesthetic":
        tower = write_clip(tmp_path / "tower", text_act="quick_gelu", hidden_act="quick_gelu")
        torch.save(head_state(12), tmp_path / "head.pth")
        return {"name": name, "path": str(tmp_path / "head.pth"), "image_tower": str(tower)}
    if name == "hpsv3":
        folder = write_hpsv3(tmp_path / "hpsv3")
        return {"name": name, "path": str(folder), "instruction": str(folder / "instruction.txt")}
    if name == "combination":
        return {"name": name, "parts": [{"path": str(tiny.clip)}, reward_of("imagereward", tiny, tmp_path)]}
    (tmp_path / "clip").mkdir()
    return {"path": str(write_clip(tmp_path / "clip"))}


def test_comparing_a_coarse_reward_with_float32_is_counted_and_over_after_it(tiny, out, kernels_on_the_host):
    coarse, exact = (
        estimate(tiny_config(tiny, out, reward={"path": str(tiny.clip), "dtype": dtype}), cuda=False)
        for dtype in ("bf16", "fp32")
    )
    assert exact.phase(phases.CHECKING) is None
    checking, standing = coarse.phase(phases.CHECKING), coarse.standing["reward"]
    # The copy in float32 beside the reward itself, and the activations of one picture.
    assert checking.own > 2 * standing
    settings = tiny_config(tiny, out, reward={"path": str(tiny.clip), "dtype": "bf16"})
    real = really_alive(settings)
    for name in UPDATE:
        assert coarse.phase(name).total == pytest.approx(real.peaks[name].total, rel=0.02, abs=16_384), name
    reward = load_reward(settings.reward)
    reward.keep_prompts(["a prompt"])
    image = torch.rand(1, 3, 32, 32)
    reward.score(image, ["a prompt"])
    live = LiveBytes("cpu")
    live.see(t for t in (*reward.parameters(), *reward.buffers(), image))
    with live:
        s1_error(reward, image, ["a prompt"], 1.0)
    assert checking.own == pytest.approx(live.peaks[phases.CHECKING].own, rel=0.1, abs=16_384)
    standing_beside = [
        size for name, size in coarse.standing.items() if name in ("adapters", "denoiser", "VAE", "reward")
    ]
    assert checking.beside == pytest.approx(sum(standing_beside), abs=20_000)  # a picture and the resize


def test_without_text_encoders_on_the_disk_all_else_is_as_with_them(tiny, out, tmp_path):
    whole = estimate(tiny_config(tiny, out, "sd3"))
    folder = shutil.copytree(tiny.sd3, tmp_path / "pipeline")
    for encoder in folder.glob("text_encoder*"):
        shutil.rmtree(encoder)
    found = estimate(tiny_config(tiny, out, "sd3", backbone__path=str(folder)))
    assert found.phase(phases.ENCODING) is None
    assert found.standing == whole.standing
    for name in (phases.SAMPLING, phases.DECODER, phases.DENOISER):
        assert found.phase(name) == whole.phase(name), name


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "qwen"])
def test_preparing_a_run_peaks_on_a_gpu_as_estimated(tiny, out, family):
    """Weights of kilobytes are lost in cuBLAS's workspace, which is there before and is taken off."""
    settings = tiny_config(tiny, out, family, backbone__device="cuda", data__encoding_cache=None)
    Trainer(settings, check_config(settings))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(settings, check_config(settings))
    found = estimate(settings)
    standing = sum(size for name, size in found.standing.items() if name in ("reward", "adapters", "denoiser", "VAE"))
    peak = max(standing, *(found.phase(name).total for name in (phases.ENCODING, phases.KEEPING)))
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(peak, rel=0.1, abs=2**18)
    assert trainer.reward.has_text_tower is False
