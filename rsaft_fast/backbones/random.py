"""Backbones of a public architecture with random weights: real shapes, real speed, no download.

Networks are built on the meta device, cast there for nothing, and get their memory on the device in the wanted dtype:
FLUX.1 in bf16 takes 22 GiB on the GPU and nothing on the host, in the seconds that drawing its weights takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from rsaft_fast.backbones.casting import cast_network
from rsaft_fast.backbones.pipeline import PipelineBackbone, required_components
from rsaft_fast.backbones.quantized import Quantization
from rsaft_fast.backbones.registry import ADAPTERS
from rsaft_fast.backbones.specs import Spec, load_spec
from rsaft_fast.errors import UserError


def random_backbone(
    spec: str | Spec,
    *,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    offload_blocks: int = 0,
    quantize: Quantization | None = None,
) -> PipelineBackbone:
    """A backbone of that architecture: its denoiser, VAE and scheduler, and `random_conditioning` in place of prompts.

    Args:
        spec: one of `specs.NAMES`, or a `Spec` of your own.
        device: "meta" gives shapes alone.
        seed: of the weights: the same on the same kind of device.
        offload_blocks: blocks of the denoiser that are streamed from the host (`memory.offload`).
        quantize: keep its blocks in few bits (`backbones.quantized`), once they are drawn: for that long the whole
            denoiser lies on the device.

    Raises:
        UserError: no such spec, one that its classes do not take, or a size it cannot make.
    """
    spec = load_spec(spec) if isinstance(spec, str) else spec
    if spec.pipeline not in ADAPTERS:
        raise UserError(f"the spec's pipeline is {spec.pipeline!r}; supported: {', '.join(sorted(ADAPTERS))}")
    adapter = ADAPTERS[spec.pipeline]
    family = adapter.family
    components = dict.fromkeys(required_components(family.pipeline_class)) | family.unused
    components |= {
        family.denoiser_name: random_network(family.denoiser_class, spec.denoiser, dtype, device, seed),
        "vae": random_network(family.vae_class, spec.vae, adapter.vae_dtype(dtype), device, seed + 1),
        "scheduler": getattr(diffusers, spec.scheduler["_class_name"]).from_config(spec.scheduler),
    }
    pipeline = family.pipeline_class(**components)
    return adapter(
        pipeline,
        height=height,
        width=width,
        dtype=dtype,
        device=device,
        offload_blocks=offload_blocks,
        quantize=quantize,
    )


def random_network(
    network_class: type[ModelMixin],
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> torch.nn.Module:
    """A network with drawn weights, allocated once, on `device` in `dtype`.

    Raises:
        UserError: a config of another class, or with keys that this one does not know.
    """
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    named = config.get("_class_name", network_class.__name__)
    unknown = sorted(set(options) - set(inspect.signature(network_class.__init__).parameters))
    if named != network_class.__name__ or unknown:
        what = f"is a {named}" if named != network_class.__name__ else f"has {', '.join(unknown)}"
        raise UserError(f"the spec does not fit {network_class.__name__}: its config {what}")
    with torch.device("meta"):
        network = network_class(**options)
    cast_network(network, dtype).eval()
    if torch.device(device).type == "meta":
        return network
    network.to_empty(device=device)
    _compute_tables(network)
    draw_weights(network, seed)
    return network


def _compute_tables(network: torch.nn.Module) -> None:
    """Compute what modules hold beside parameters and buffers, which stays where they were built."""
    for module in network.modules():
        tables = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta]
        if not tables:
            continue
        if not isinstance(module, QwenEmbedRope):
            raise NotImplementedError(f"{type(module).__name__} computes its {tables[0]} when it is built")
        made = QwenEmbedRope(module.theta, module.axes_dim, module.scale_rope)
        for name in tables:
            setattr(module, name, getattr(made, name))


@torch.no_grad()
def draw_weights(network: torch.nn.Module, seed: int) -> None:
    """Draw every weight where it lies, by each layer's own rule, whose activations neither explode nor vanish.

    Layers that the real architecture starts at zero (adaLN's) are drawn too: at zero, a block would do nothing. Global
    random state is left alone.
    """
    device = next(network.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        drawn = set()
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
                drawn.update(map(id, (*module.parameters(recurse=False), *module.buffers(recurse=False))))
        for name, parameter in network.named_parameters():
            if id(parameter) in drawn:
                continue
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        stored = network.state_dict().keys()
        for name, buffer in network.named_buffers():
            if id(buffer) in drawn:
                continue
            if name not in stored:
                raise NotImplementedError(f"{name} of {type(network).__name__} is computed when it is built, not drawn")
            buffer.normal_(std=0.5**0.5)  # SD3's table of sines and cosines has this root mean square
