"""The estimate against what really is alive at tiny size, and against published figures at real size."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from builders.clip import write_clip
from builders.image_reward import head_state, write_image_reward
from builders.recipes import config as tiny_config
from torch.utils._pytree import tree_map_only

from rsaft_fast.backbones import Conditioning, turns
from rsaft_fast.memory import phases
from rsaft_fast.memory.estimate import estimate
from rsaft_fast.memory.live import LiveBytes
from rsaft_fast.ops import library
from rsaft_fast.rewards import load_reward
from rsaft_fast.rewards.precision import s1_error
from rsaft_fast.train.check import check_config
from rsaft_fast.train.config import Config
from rsaft_fast.train.data import EncodedPrompts
from rsaft_fast.train.encodings import load_shapes, load_text_encoders
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
    ("sd3", "no smoothing"): {"smoothing": {"image": None, "parameters": None}},
    ("sd3", "full, checkpointed"): FULL | CHECKPOINTED,
    ("sd3", "full, 8 bits, released"): FULL_8BIT | {"optimizer__release_gradients": True},
    ("sd3", "full, 8 bits, released, on the host"): FULL_8BIT
    | {"optimizer__release_gradients": True, "optimizer__offload": "state"},
    ("sd3", "full, master, on the host"): FULL | {"backbone__dtype": "bf16", "optimizer__offload": "state"},
    ("flux", "full, on the host"): FULL | {"optimizer__offload": "state"},
    ("sd3", "full, master, mean"): FULL | {"backbone__dtype": "bf16", "ema": {"decay": 0.9}},
    ("flux", "lora"): {},
    ("flux", "full, 8 bits"): FULL_8BIT,
    ("sd15", "nf4"): {"backbone__quantize": "nf4"},
    ("sdxl", "nf4, checkpointed"): CHECKPOINTED | {"backbone__quantize": "nf4"},
    ("sd3", "fp8"): {"backbone__quantize": "fp8"},
    ("flux", "int8, a block on the host"): CHECKPOINTED | {"backbone__quantize": "int8", "backbone__offload_blocks": 1},
}
UPDATE = (phases.SAMPLING, phases.SCORING, phases.DECODER, phases.DENOISER)


@pytest.mark.usefixtures("kernels_on_the_host")
@pytest.mark.parametrize(("family", "case"), CASES)
def test_every_phase_is_what_really_is_alive(tiny, out, family, case):
    config = tiny_config(tiny, out, family, **CASES[family, case])
    real, found = really_alive(config), estimate(config, cuda=False)
    staged = [name for name in (phases.PERTURBING, phases.UPDATING) if found.phase(name)]
    for name in (*UPDATE, *(staged if config.optimizer.offload == "state" else ())):
        assert found.phase(name).total == pytest.approx(real.peaks[name].total, rel=0.02, abs=16_384), name
    assert max(found.phase(name).total for name in UPDATE) == pytest.approx(real.peak, rel=0.02)
