"""Backbones with random weights: the published shapes, built where they stay, alive from end to end."""

import dataclasses
import json

import pytest
import torch
from builders.backbones import BUILDERS, FAMILIES, SIZE, cfg, noise_source
from builders.messages import says
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsaft_fast.backbones import Krea2, LoRASettings, add_lora, random_backbone
from rsaft_fast.backbones.specs import NAMES, Spec, load_spec
from rsaft_fast.errors import UserError
from rsaft_fast.methods import DRaFT
from rsaft_fast.sampling import backpropagate, rollout

VAE = {"sd15": 83_653_863, "sdxl": 83_653_863, "sd35-medium": 83_819_683, "sd35-large": 83_819_683, "flux1": 83_819_683}
VAE |= dict.fromkeys(("qwen-image", "krea-2"), 126_892_531)
VAE |= dict.fromkeys(("klein-4b", "klein-9b", "flux2-dev"), 84_046_115) | {"z-image": 83_819_683}
LATENTS = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128), "flux1": (4096, 64)}
LATENTS |= dict.fromkeys(("qwen-image", "krea-2"), (4096, 64))
LATENTS |= dict.fromkeys(("klein-4b", "klein-9b", "flux2-dev"), (128, 64, 64))


@pytest.fixture(scope="module", params=FAMILIES)
def miniature(request, tmp_path_factory) -> Spec:
    """The architecture of a tiny pipeline as a spec."""
    folder = BUILDERS[request.param](tmp_path_factory.mktemp(request.param))
    read = lambda file: json.loads((folder / file).read_text())  # noqa: E731
    network = "unet" if (folder / "unet").is_dir() else "transformer"
    return Spec(
        read("model_index.json")["_class_name"],
        read(f"{network}/config.json"),
        read("vae/config.json"),
        read("scheduler/scheduler_config.json"),
    )


def make(spec: Spec, **options):
    return random_backbone(spec, **({"height": SIZE, "width": SIZE} | options))


def tensors_of(backbone) -> dict[str, torch.Tensor]:
    modules = {"denoiser": backbone.denoiser, "vae": backbone.pipeline.vae}
    states = {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}
    return {name: t for name, t in states.items() if t.is_floating_point()}  # a BatchNorm counts its batches


def dtype_of(backbone, name: str, dtype: torch.dtype) -> torch.dtype:
    """Krea-2's normalisations are in fp32 in its pipeline too."""
    wide = isinstance(backbone, Krea2) and name.startswith("denoiser.") and "norm" in name
    return torch.float32 if wide else dtype


LONG = ("sdxl", "sd35-large", "flux1", "qwen-image")  # to walk, on shapes alone


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in NAMES]
)
def test_published_architectures_take_their_own_conditioning_and_latents(name):
    backbone = random_backbone(name, dtype=torch.bfloat16, device="meta")
    for tensor_name, tensor in tensors_of(backbone).items():
        assert (tensor.device.type, tensor.dtype) == ("meta", dtype_of(backbone, tensor_name, torch.bfloat16))
    assert sum(p.numel() for p in backbone.pipeline.vae.parameters()) == VAE[name]
    assert backbone.latent_shape == LATENTS.get(name, (16, 128, 128))
    x = torch.empty(2, *backbone.latent_shape, device="meta")
    conditioning = backbone.random_conditioning(2, **cfg(backbone, 4.0))
    with torch.no_grad():
        for branch in filter(None, (conditioning.positive, conditioning.negative)):  # FLUX.2-dev has no second
            assert backbone.predict(x, backbone.schedule(28)[3], branch).shape == x.shape
        assert backbone.decode(x).shape == (2, 3, backbone.height, backbone.width)


def test_a_backbone_is_alive_from_the_noise_to_the_adapters_gradient(miniature):
    backbone = make(miniature)
    add_lora(backbone, LoRASettings(rank=2))
    with torch.no_grad():
        for parameter in backbone.trainable_parameters.values():
            parameter.normal_(std=0.1)
    noise, conditioning = noise_source(2), backbone.random_conditioning(2, **cfg(backbone, 3.0))
    schedule, plan = backbone.schedule(3), DRaFT(k=2).draw(3, None)
    end = rollout(backbone, schedule, plan, backbone.initial_latents(noise), conditioning, noise)
    leaf = end.endpoints[0].requires_grad_()
    images = backbone.decode(leaf)
    assert images.shape == (2, 3, SIZE, SIZE) and torch.isfinite(images).all() and images.std() > 1e-3
    images.square().sum().backward()
    backpropagate(backbone, end, [leaf.grad])
    gradients = [p.grad for p in backbone.trainable_parameters.values() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients) and sum(bool(g.any()) for g in gradients) > 4


def test_an_fp16_backbone_has_its_vae_in_fp32(miniature):
    backbone = make(miniature, dtype=torch.float16)
    for name, p in backbone.denoiser.named_parameters():
        assert p.dtype == dtype_of(backbone, f"denoiser.{name}", torch.float16)
    assert {p.dtype for p in backbone.pipeline.vae.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_drawn_in_its_dtype_and_by_the_seed_alone(miniature, dtype, monkeypatch):
    # Memory as the allocator may hand it out: a tensor that nobody draws stays NaN.
    monkeypatch.setattr(torch.nn.Module, "to_empty", poisoned_to_empty)
    torch.manual_seed(11)
    backbone = make(miniature, dtype=dtype)
    one, same, other = (tensors_of(b) for b in (backbone, *(make(miniature, dtype=dtype, seed=s) for s in (0, 5))))
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(11)))
    for name, tensor in one.items():
        assert tensor.dtype == dtype_of(backbone, name, dtype) and torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, same[name])
        if tensor.ndim > 1:
            assert tensor.std() > 1e-3 and not torch.equal(tensor, other[name]), name


def poisoned_to_empty(module, *, device):
    return module._apply(lambda t: torch.full_like(t, torch.nan if t.is_floating_point() else -7, device=device))


class LargestOther(TorchDispatchMode):
    """Bytes of the largest real tensor made in a dtype other than the wanted one."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted, self.bytes = wanted, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and tensor.dtype != self.wanted:
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


def test_no_weight_is_ever_held_in_another_dtype(miniature):
    with LargestOther(torch.bfloat16) as seen:
        make(miniature, dtype=torch.bfloat16)
    # The scheduler's tables of 1000 timesteps are all, and Qwen-Image's of 4096 positions: four complex numbers each.
    assert seen.bytes <= (4096 * 4 * 8 if miniature.pipeline == "QwenImagePipeline" else 8000)


def test_specs_that_fit_nothing_are_refused(miniature):
    with pytest.raises(UserError, match=says("'sd9'", "sd15", "sdxl")):
        random_backbone("sd9")
    wrong = {"pipeline": "KandinskyPipeline"}, {"denoiser": {"_class_name": "DiTTransformer2DModel"}}
    for change, line in zip(wrong, (says("KandinskyPipeline", "Flux"), "DiTTransformer2DModel")):
        with pytest.raises(UserError, match=line):
            make(dataclasses.replace(miniature, **change))
    with pytest.raises(UserError, match="num_leyers"):
        make(dataclasses.replace(miniature, denoiser={**miniature.denoiser, "num_leyers": 3}))
    own = {"Flux2KleinPipeline": ("klein-4b", 32)}
    own |= dict.fromkeys(("QwenImagePipeline", "Krea2Pipeline"), ("qwen-image", 16))
    other, channels = own.get(miniature.pipeline, ("flux1", 16))
    with pytest.raises(UserError, match=says("VAE", channels, "denoiser", 4)):
        make(dataclasses.replace(miniature, vae=load_spec(other).vae), device="meta")
    with pytest.raises(UserError, match=says("prompts", "text_encoder")):
        make(miniature).encode(["one"])
