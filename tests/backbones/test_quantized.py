"""A base in few bits: the codes against their definitions, the layer against its own whole weight, and whole models."""

from __future__ import annotations

import copy
import importlib.util
import shutil

import pytest
import torch
from builders.backbones import BUILDERS, FAMILIES, PROMPTS, clear_gradients, gradients, relative_error, with_random_lora
from builders.damages import change
from builders.messages import says
from builders.recipes import config, recipe, write_recipe
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from rsaft_fast.backbones import LoRASettings, add_lora, load_backbone, random_backbone, save_lora
from rsaft_fast.backbones import quantized as q
from rsaft_fast.backbones.quantized import FORMATS, QuantizedLinear, quantize_denoiser
from rsaft_fast.cli import main
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.live import LiveBytes
from rsaft_fast.memory import checkpoint_denoiser, saved_tensor_bytes
from rsaft_fast.memory.offload import transformer_blocks
from rsaft_fast.train.loop import train

bnb = pytest.importorskip("bitsandbytes")
BF16 = torch.bfloat16
SIZE = 32
formats = pytest.mark.parametrize("quantization", list(FORMATS))


def linear(out=48, features=72, bias=True, dtype=torch.float32) -> nn.Linear:
    layer = nn.Linear(features, out, bias=bias).to(dtype)
    return layer.requires_grad_(False)


# The codes


def test_int8_is_the_nearest_of_255_steps_of_each_channel():
    layer = linear()
    layer.weight[3] = 0
    layer.weight[4] *= 1e-30
    found = QuantizedLinear(layer, "int8")
    steps = layer.weight.double().abs().amax(1, keepdim=True) / 127
    codes = found.weight.double()
    assert found.weight.dtype == torch.int8 and codes.abs().amax(1).tolist() == [127.0] * 3 + [0.0] + [127.0] * 44
    assert ((layer.weight.double() - codes * steps).abs() <= steps * 0.50001).all()
    torch.testing.assert_close(found.dequantized(torch.float64), codes * steps, rtol=1e-6, atol=0)


def test_fp8_is_the_nearest_e4m3_number_of_each_channel():
    layer = linear()
    layer.weight[3] = 0
    found = QuantizedLinear(layer, "fp8")
    scale = layer.weight.double().abs().amax(1, keepdim=True) / 448
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()].unique()
    nearest = (layer.weight.double().unsqueeze(-1) - numbers * scale.unsqueeze(-1)).abs().amin(-1)
    error = (layer.weight.double() - found.dequantized(torch.float64)).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-8)
    assert not found.dequantized()[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_nf4_is_bitsandbytes_own(dtype):
    layer = linear(96, 130, dtype=dtype)
    theirs = bnb.nn.Linear4bit(130, 96, compress_statistics=True, quant_type="nf4", compute_dtype=dtype)
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to(dtype).to("cpu")
    found = QuantizedLinear(layer, "nf4")
    assert torch.equal(found.weight, theirs.weight.data)
    whole = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(found.dequantized(), whole) and found.dequantized().dtype == dtype
    x = torch.randn(5, 130, dtype=dtype, requires_grad=True)
    torch.testing.assert_close(found(x), theirs(x))


@formats
def test_errors_and_bytes_are_those_documented(quantization):
    weight = torch.randn(64, 1280) * 0.02
    layer = nn.Linear(1280, 64)
    layer.weight.data = weight
    found = QuantizedLinear(layer, quantization)
    error = float((found.dequantized() - weight).norm() / weight.norm())
    assert error == pytest.approx({"nf4": 0.092, "fp8": 0.0265, "int8": 0.0079}[quantization], rel=0.05)
    bits = 8 * sum(t.untyped_storage().nbytes() for t in found.stored().values()) / weight.numel()
    assert bits == pytest.approx({"nf4": 4.127, "fp8": 8.025, "int8": 8.025}[quantization], abs=1e-3)


# The layer


@formats
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(72,), (3, 72), (2, 5, 72), (0, 72)])
def test_output_and_gradient_are_those_of_the_whole_weight(quantization, bias, shape):
    found = QuantizedLinear(linear(bias=bias), quantization)
    weight = found.dequantized(torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    b = None if found.bias is None else found.bias.double()
    torch.testing.assert_close(found(x), functional.linear(x, weight, b), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(found, x)


@formats
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_in_low_precision_too_to_the_bit(quantization, dtype):
    found = QuantizedLinear(linear(dtype=dtype), quantization)
    x = torch.randn(7, 72, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, whole = found(x), functional.linear(y, found.dequantized(), found.bias)
    grad = torch.randn_like(ours)
    ours.backward(grad)
    whole.backward(grad)
    assert torch.equal(ours, whole) and torch.equal(x.grad, y.grad)


@formats
def test_autograd_keeps_nothing_but_the_codes(quantization):
    found = QuantizedLinear(linear(), quantization)
    x = torch.randn(7, 72, requires_grad=True)
    with saved_tensor_bytes(found.stored().values()) as saved:
        out = found(x)
    assert saved.total == 0 and out.requires_grad
    with saved_tensor_bytes() as saved:
        out = found(x)
    assert saved.alive == sum(t.untyped_storage().nbytes() for t in found.stored().values())


@formats
def test_casting_copying_and_saving_change_no_code(quantization):
    found = QuantizedLinear(linear(dtype=BF16), quantization)
    before = {name: t.clone() for name, t in found.stored().items()}
    whole = found.dequantized()
    for changed in (copy.deepcopy(found), copy.deepcopy(found).to(torch.float16), copy.deepcopy(found).half().double()):
        for name, tensor in changed.stored().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        assert torch.equal(changed.dequantized(), whole) and changed.bias.dtype == BF16
    other = QuantizedLinear(linear(dtype=BF16), quantization)
    other.load_state_dict(found.state_dict())
    assert torch.equal(other.dequantized(), whole)
    assert found.to("meta").weight.dtype == before["weight"].dtype
    with pytest.raises(NotImplementedError):
        other.reset_parameters()


# The models


def load(folder, quantization=None, dtype=BF16, **options):
    return load_backbone(folder, dtype=dtype, height=SIZE, width=SIZE, quantize=quantization, **options)


def whole_twin(folder, backbone, dtype=BF16):
    """A backbone without codes that has the weights that this one computes with."""
    twin = load(folder, dtype=dtype)
    for name, module in backbone.denoiser.named_modules():
        if isinstance(module, QuantizedLinear):
            twin.denoiser.get_submodule(name).weight.data = module.dequantized(dtype)
    return twin


def prediction(backbone, **options):
    conditioning = backbone.encode(PROMPTS[:2])
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1)).to(backbone.latent_dtype)
    return backbone.predict(x.requires_grad_(), backbone.schedule(4)[1], conditioning.positive)


def run(backbone):
    """Prediction and gradients of the adapters."""
    clear_gradients(backbone)
    out = prediction(backbone)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    return out.detach(), gradients(backbone)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return BUILDERS[request.param](tmp_path_factory.mktemp(request.param))


@formats
def test_the_blocks_linear_layers_are_taken_and_nothing_else(folder, quantization):
    plain, backbone = load(folder), load(folder, quantization)
    blocks = tuple(f"{name}." for name in transformer_blocks(plain.denoiser))
    for name, module in plain.denoiser.named_modules():
        other = backbone.denoiser.get_submodule(name)
        assert isinstance(other, QuantizedLinear) == (type(module) is nn.Linear and name.startswith(blocks)), name
        assert type(other) is QuantizedLinear or type(other) is type(module)
    kept = {n: p for n, p in plain.denoiser.named_parameters() if not n.startswith(blocks)}
    assert kept and all(torch.equal(p, backbone.denoiser.get_parameter(n)) for n, p in kept.items())
    assert backbone.denoiser.dtype == BF16 and not backbone.trainable_parameters
    with pytest.raises(UserError, match=says("quantize", quantization, "LoRA")):
        backbone.train_all_parameters()


@pytest.mark.parametrize(
    ("quantization", "dtype"), [*((name, BF16) for name in FORMATS), ("nf4", torch.float32)], ids=str
)
def test_a_model_is_the_one_with_the_whole_weights(folder, quantization, dtype):
    backbone = load(folder, quantization, dtype)
    twin = with_random_lora(whole_twin(folder, backbone, dtype))
    out, grads = run(with_random_lora(backbone))
    whole, whole_grads = run(twin)
    assert torch.equal(out, whole)
    assert all(torch.equal(grads[name], whole_grads[name]) for name in grads)
    # Of SD3's and Qwen-Image's last block nobody sees the text.
    assert sum(bool(grad.any()) for grad in grads.values()) >= 0.85 * len(grads)
    checkpoint_denoiser(backbone.denoiser)
    again, checkpointed = run(backbone)
    assert torch.equal(out, again) and all(torch.equal(grads[name], checkpointed[name]) for name in grads)


def test_a_model_is_off_by_its_format_s_error(folder):
    with torch.no_grad():
        truth = prediction(load(folder)).double()
        error = {f: float((prediction(load(folder, f)).double() - truth).norm() / truth.norm()) for f in FORMATS}
    assert 0 < error["int8"] < error["nf4"]
    assert error["int8"] < 0.03 and error["fp8"] < 0.06 and error["nf4"] < 0.2


@formats
def test_adapters_begin_as_those_of_an_unquantised_base_and_are_all_that_is_saved(folder, quantization, tmp_path):
    plain, backbone = load(folder), load(folder, quantization)
    settings = LoRASettings(rank=2, alpha=3)
    for each in (plain, backbone):
        add_lora(each, settings, seed=5)
    own = backbone.trainable_parameters
    assert own.keys() == plain.trainable_parameters.keys()
    assert all(torch.equal(own[n], p) and own[n].dtype == torch.float32 for n, p in plain.trainable_parameters.items())
    files = [load_file(save_lora(b, tmp_path / str(i), settings)) for i, b in enumerate((plain, backbone))]
    assert files[0].keys() == files[1].keys() and all(torch.equal(t, files[1][n]) for n, t in files[0].items())
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "1")


@formats
def test_streamed_blocks_compute_the_same(folder, quantization):
    backbones = [load(folder, quantization), load(folder, quantization, offload_blocks=1)]
    for backbone in backbones:
        with_random_lora(backbone)
        checkpoint_denoiser(backbone.denoiser)
    (out, grads), (streamed, streamed_grads) = map(run, backbones)
    assert backbones[1].offloaded.fetches and torch.equal(out, streamed)
    assert relative_error(streamed_grads, grads) == 0


@formats
def test_no_more_than_one_layer_is_ever_whole_on_the_device(quantization):
    """The host is the CPU, and the meta device stands for the card."""
    denoiser = random_backbone("sd15", dtype=BF16, device="meta").denoiser
    blocks = transformer_blocks(denoiser)
    largest = max(m.weight.numel() for b in blocks.values() for m in b.modules() if isinstance(m, nn.Linear))
    denoiser = denoiser.to_empty(device="cpu")
    live = LiveBytes("meta")
    with live:
        quantize_denoiser(denoiser, quantization, "meta")
    tensors = [t for block in blocks.values() for t in (*block.parameters(), *block.buffers()) if t.is_meta]
    codes = sum(t.untyped_storage().nbytes() for t in tensors)
    assert 0 <= live.alive - codes <= 4 * 256  # bitsandbytes' table of 8-bit numbers
    assert live.peak - codes <= (2 + 3 * 4) * largest < 0.2 * 2 * sum(p.numel() for p in denoiser.parameters())


def test_shapes_alone_leave_the_real_thing_as_it_is():
    """bitsandbytes keeps a table on the device that asked first."""
    real = QuantizedLinear(linear(), "nf4").dequantized()
    torch.manual_seed(0)
    layer = linear()
    expected = QuantizedLinear(layer, "nf4").dequantized()
    q._dynamic_map.cache_clear()
    bnb.functional.name2qmap.clear()
    QuantizedLinear(linear().to("meta"), "nf4").dequantized()
    assert torch.equal(QuantizedLinear(layer, "nf4").dequantized(), expected)
    assert real.shape == expected.shape


def test_a_missing_package_is_named(monkeypatch, folder):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError, match=says("nf4", 'pip install "rsaft_fast[low-bit]"')):
        load(folder, "nf4")
    load(folder, "int8")


def test_a_denoiser_that_is_stored_quantised_is_refused(folder, tmp_path, monkeypatch):
    name = next(n for n in ("unet", "transformer") if (folder / n).is_dir())
    shutil.copytree(folder, tmp_path / "copy")
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    change(tmp_path / "copy" / name / "config.json", quantization_config=stored)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *a, **o: pytest.fail("loaded"))
    with pytest.raises(UserError, match=says(name, "bitsandbytes", "backbone.quantize")):
        load(tmp_path / "copy")


@pytest.mark.gpu
@formats
def test_on_a_gpu_codes_and_gradients_are_the_cpu_s(quantization):
    layer = linear(320, 640, dtype=BF16)
    host, card = QuantizedLinear(layer, quantization), QuantizedLinear(layer, quantization, "cuda")
    torch.testing.assert_close(card.dequantized().cpu(), host.dequantized(), rtol=1e-2, atol=1e-4)
    x = torch.randn(77, 640, dtype=BF16, device="cuda", requires_grad=True)
    out = card(x)
    out.sum().backward()
    torch.testing.assert_close(out, functional.linear(x, card.dequantized(), card.bias))
    torch.testing.assert_close(x.grad, torch.ones_like(out) @ card.dequantized())


@pytest.mark.gpu
@formats
def test_on_a_gpu_loading_never_holds_the_whole_denoiser(quantization, tmp_path):
    denoiser = random_backbone("sd15", dtype=BF16).denoiser
    weights = [p.numel() for b in transformer_blocks(denoiser).values() for p in b.parameters()]
    torch.cuda.reset_peak_memory_stats()
    quantize_denoiser(denoiser, quantization, "cuda")
    peak, codes = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    assert peak - codes <= (2 + 3 * 4) * max(weights) < 2 * sum(weights)


# Runs


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("backbone.quantize=nf5", ["backbone.quantize", "nf4"]),
        ("parameters.train=full backbone.quantize=nf4", ["backbone.quantize nf4", "parameters.train full", "lora"]),
        ("parameters.train=full backbone.quantize=fp8", ["backbone.quantize fp8", "parameters.train full", "lora"]),
    ],
)
@pytest.mark.parametrize("command", ["train", "estimate"])
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    tiny, out, tmp_path, capsys, monkeypatch, override, words, command
):
    monkeypatch.setattr("rsaft_fast.train.loaders.load_backbone", lambda *a, **o: pytest.fail("loaded"))
    path = write_recipe(tmp_path / "recipe.yaml", recipe(tiny, out))
    assert main([command, str(path), *override.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words) and not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "quantization"), [("sd15", "nf4"), ("flux", "int8")])
def test_a_run_trains_resumes_bit_for_bit_and_is_sampled(tiny, tmp_path, family, quantization):
    overrides = dict(
        backbone__quantize=quantization, backbone__dtype="bf16", backbone__checkpoint=["denoiser"], checkpoint_every=1
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config(tiny, whole, family, max_steps=2, **overrides))
    train(config(tiny, broken, family, max_steps=1, **overrides))
    train(config(tiny, broken, family, max_steps=2, resume="auto", **overrides))
    first, last, again = (
        load_file(run / f"checkpoints/step_{step}/weights.safetensors")
        for run, step in ((whole, 1), (whole, 2), (broken, 2))
    )
    assert last.keys() == first.keys() and all("lora_" in name for name in last)
    assert all(torch.equal(tensor, again[name]) for name, tensor in last.items())
    assert all(not torch.equal(first[name], last[name]) for name in last)
    arguments = ["sample", str(getattr(tiny, family)), "--prompts", "one", "--steps", "2"]
    for name, run_folder in (("a", whole), ("b", broken)):
        assert main([*arguments, "--run", str(run_folder), "--output", str(tmp_path / name)]) == 0
    a, b = (Image.open(tmp_path / name / "0000_seed_0.png").tobytes() for name in "ab")
    assert a == b
