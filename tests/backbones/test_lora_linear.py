"""Low-rank layers that keep their input: against float64, against peft, and what they keep."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from rsaft_fast.backbones import LoRASettings, add_lora, random_backbone
from rsaft_fast.backbones.lora_linear import (
    LEFT,
    RIGHT,
    PlainProducts,
    SplitProducts,
    add_low_rank,
    keep_inputs,
    products_for,
)
from rsaft_fast.memory import saved_tensor_bytes
from rsaft_fast.ops import bf16_parts

IN, OUT, RANK = 24, 40, 3
BF16 = torch.bfloat16


def adapters(dtype=torch.float32, features=IN, out=OUT, rank=RANK):
    return torch.randn(rank, features, dtype=dtype) / rank, torch.randn(out, rank, dtype=dtype)


class Block(nn.Module):
    """Query, key and value of one input."""

    def __init__(self, bias: bool):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(IN, OUT, bias=bias) for _ in range(3))

    def forward(self, x):
        return self.q(x) * self.k(x) + self.v(x)


def block(dtype=torch.float64, bias=True, lean=True, base_dtype=None, **options) -> Block:
    """With drawn adapters of that dtype, by ours or by peft's forward."""
    config = LoraConfig(**{"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q", "k", "v"]} | options)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = inject_adapter_in_model(config, Block(bias).to(base_dtype or dtype)).eval()
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=dtype)
    if lean:
        keep_inputs(made)
    return made


def run(model, x):
    """Output and gradients, of the input first."""
    x = x.detach().requires_grad_()
    out = model(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@given(
    st.lists(st.floats(2.0**-60, 2.0**60, width=32) | st.floats(-(2.0**60), -(2.0**-60), width=32), min_size=1),
    st.integers(0, 2**31),
)
def test_three_bf16_parts_are_an_fp32_matrix_to_the_last_bit(values, seed):
    drawn = torch.randint(0, 2**23, (64,), generator=torch.Generator().manual_seed(seed)) + (127 << 23)
    wide = torch.cat([torch.tensor(values), drawn.to(torch.int32).view(torch.float32), torch.zeros(1)])[None]
    parts = bf16_parts(wide)
    assert parts.dtype == BF16 and torch.equal(parts.double().sum(0, keepdim=True), wide.double())


def test_the_products_left_out_are_below_the_last_bit():
    left, right = torch.rand(1, 1000) + 1, torch.rand(1, 1000) + 1
    found = (bf16_parts(left, LEFT).double() * bf16_parts(right, RIGHT).double()).sum(0)
    truth = (left.double() * right.double())[0]
    assert ((found - truth) / truth).abs().max() < 2.0**-23


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN), (2, 0, IN)])
def test_gradients_are_right_for_any_shape(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    onto = torch.randn(*shape[:-1], OUT, dtype=torch.float64, requires_grad=True)
    a, b = (t.requires_grad_() for t in adapters(torch.float64))
    out = add_low_rank(onto, x, a, b, 0.7)
    assert out.shape == onto.shape
    torch.testing.assert_close(out, onto + 0.7 * x @ a.T @ b.T, rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(lambda *t: add_low_rank(*t, 0.7), (onto, x, a, b))


def test_strides_do_not_matter():
    x = torch.randn(IN, 6, 5, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    onto = torch.randn(6, OUT, 5, dtype=torch.float64).permute(2, 0, 1)
    a, b = adapters(torch.float64)
    grad = torch.randn(OUT, 6, 5, dtype=torch.float64).permute(2, 1, 0)
    out = add_low_rank(onto, x, a, b, 1.0)
    out.backward(grad)
    torch.testing.assert_close(out, onto + x @ a.T @ b.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, grad @ b @ a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_block_is_peft_s(bias, checkpointed):
    ours, theirs = block(bias=bias), block(bias=bias, lean=False)
    x = torch.randn(2, 7, IN, dtype=torch.float64)
    call = (lambda x: checkpoint(ours, x, use_reentrant=False)) if checkpointed else ours
    call.parameters = ours.parameters if checkpointed else call.parameters
    for mine, his in zip(run(call, x), run(theirs, x), strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for name, p in ours.named_parameters() if "lora_" not in name)


def test_recomputing_changes_no_bit():
    x = torch.randn(2, 7, IN).to(BF16)
    ours, again = (block(torch.float32, base_dtype=BF16) for _ in range(2))
    recomputed = lambda x: checkpoint(again, x, use_reentrant=False)  # noqa: E731
    recomputed.parameters = again.parameters
    for plain, checkpointed in zip(run(ours, x), run(recomputed, x), strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_over_a_bf16_base_nothing_is_lost_but_the_last_rounding(scale):
    """Ours on the CPU and as the GPU computes it; peft's computes A x and B h in fp32."""
    rows, wide = 96, 160
    x, onto, grad = torch.randn(rows, wide).to(BF16), torch.randn(rows, OUT).to(BF16), torch.randn(rows, OUT).to(BF16)
    a, b = adapters(features=wide)
    truth = onto.double() + scale * x.double() @ a.double().T @ b.double().T
    true_gradients = (
        scale * grad.double() @ b.double() @ a.double(),
        scale * (grad.double() @ b.double()).T @ x.double(),
        scale * grad.double().T @ (x.double() @ a.double().T),
    )

    def found(products):
        leaves = [x.clone().requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        if products == "peft":
            out = (onto + (leaves[0].float() @ leaves[1].T @ leaves[2].T) * scale).to(BF16)
        else:
            out = add_low_rank(onto, *leaves, scale, products)
        out.backward(grad)
        return out.detach(), *(leaf.grad for leaf in leaves)

    error = lambda ours, true: float((ours.double() - true).norm() / true.norm())  # noqa: E731
    theirs = found("peft")
    for products in (SplitProducts, PlainProducts):
        out, *gradients = found(products)
        assert [g.dtype for g in gradients] == [BF16, torch.float32, torch.float32] and out.dtype == BF16
        assert (out != truth.to(BF16)).float().mean() < 1e-3  # ties within fp32's error
        for mine, his, true in zip(gradients, theirs[1:], true_gradients):
            assert error(mine, true) < max(2 * error(his, true), 2e-7)


@pytest.mark.parametrize("products", [SplitProducts, PlainProducts])
@pytest.mark.parametrize("matrix", ["A", "B"])
def test_a_millionth_of_the_adapters_arrives(products, matrix):
    torch.manual_seed(5)
    x, onto = torch.randn(4096, 64).to(BF16), torch.randn(4096, 256).to(BF16)
    a, b = adapters(features=64, out=256, rank=8)
    moved = [t + 1e-6 * t.abs().mean() * torch.randn_like(t).sign() for t in (a, b)]
    moved = (moved[0], b) if matrix == "A" else (a, moved[1])
    exact = lambda a, b: x.double() @ a.double().T @ b.double().T  # noqa: E731
    wanted = exact(*moved) - exact(a, b)

    out = [add_low_rank(onto, x, *pair, 1.0, products) for pair in ((a, b), moved)]
    seen = out[1].double() - out[0].double()
    assert seen.count_nonzero() > 100  # few of a million elements lie close enough to the edge of a bf16 step
    assert float((seen * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.35)
    # Before that rounding it is there in every element.
    unrounded = [products.expand(products.mixed(p, x.T), q.T, None, torch.float32).double() for p, q in ((a, b), moved)]
    seen = unrounded[1] - unrounded[0]
    assert float((seen * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.02)
    # In bf16 adapters it is not.
    lost = [add_low_rank(onto, x, *(t.to(BF16) for t in pair), 1.0) for pair in ((a, b), moved)]
    assert (lost[1] != lost[0]).float().mean() < 0.02 * 1e-2


@pytest.mark.parametrize("base_dtype", [BF16, torch.float32])
def test_query_key_and_value_keep_one_input(base_dtype):
    model = block(torch.float32, base_dtype=base_dtype, bias=False)
    theirs = block(torch.float32, base_dtype=base_dtype, bias=False, lean=False)
    x = torch.randn(64, IN, dtype=base_dtype)
    hidden, size = 64 * RANK * 4, x.element_size()
    kept = {}
    for name, module in (("ours", model), ("peft's", theirs)):
        with saved_tensor_bytes(module.parameters()) as saved:
            outputs = [getattr(module, part)(x) for part in "qkv"]
        kept[name] = saved.alive
        del outputs
    assert kept["ours"] == 64 * IN * size + 3 * hidden
    if base_dtype == BF16:
        assert kept["peft's"] >= 3 * 64 * IN * 4 + 3 * hidden
    with torch.no_grad(), saved_tensor_bytes() as saved:
        model(x)
    assert saved.total == 0


def test_a_copy_computes_by_itself():
    original = block()
    twin = copy.deepcopy(original)
    x = torch.randn(3, IN, dtype=torch.float64)
    before = original(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(original(x), before) and not twin(x).any()


def two_adapters(model):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q", "k", "v"]), model, adapter_name="second")
    for part in (model.q, model.k, model.v):
        part.set_adapter(["default", "second"])
        nn.init.normal_(part.lora_B["second"].weight.data)
    keep_inputs(model)


def disabled(model):
    for part in (model.q, model.k, model.v):
        part.enable_adapters(False)


def merged(model):
    for part in (model.q, model.k, model.v):
        part.merge()


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, two_adapters),
        ({}, disabled),
        ({}, merged),
        ({"use_dora": True}, None),
        ({"lora_bias": True}, None),
        ({"lora_dropout": 0.5}, lambda model: model.train()),
    ],
    ids=["two", "disabled", "merged", "DoRA", "bias", "dropout"],
)
def test_what_is_not_one_plain_adapter_is_left_to_peft(options, change, monkeypatch):
    model = block(**options)
    if change:
        change(model)
    monkeypatch.setattr("rsaft_fast.backbones.lora_linear.add_low_rank", lambda *_: pytest.fail("ours"))
    x = torch.randn(5, IN, dtype=torch.float64)
    torch.manual_seed(0)
    found = model(x)
    for part in (model.q, model.k, model.v):
        del part.forward
    torch.manual_seed(0)
    assert torch.equal(found, model(x))


def test_autocast_is_left_to_peft(monkeypatch):
    model = block(torch.float32)
    monkeypatch.setattr("rsaft_fast.backbones.lora_linear.add_low_rank", lambda *_: pytest.fail("ours"))
    with torch.autocast("cpu", dtype=BF16):
        assert model(torch.randn(5, IN)).dtype == BF16


def test_tensor_cores_are_used_where_they_are_exact():
    x, a = torch.empty(4, IN, dtype=BF16, device="meta"), torch.empty(RANK, IN, device="meta")
    assert products_for(x, a) is SplitProducts
    assert products_for(x.to(torch.float16), a) is PlainProducts  # an fp16 number is no bf16 number
    assert products_for(x.float(), a) is PlainProducts
    assert products_for(x, a.to(BF16)) is PlainProducts
    assert products_for(torch.empty(4, IN, dtype=BF16), a) is PlainProducts


def test_every_layer_of_a_real_architecture_is_covered():
    with torch.device("meta"):
        backbone = random_backbone("sd15", dtype=BF16, device="meta")
        add_lora(backbone, LoRASettings(rank=2))
    layers = [m for m in backbone.denoiser.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    assert len(layers) == 128  # 16 transformer blocks, two attentions each, four projections
    assert all("forward" in vars(layer) for layer in layers)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 77, 4096])
def test_on_a_gpu_it_is_the_emulation_s(rows):
    x, onto, grad = (torch.randn(rows, n).to("cuda", BF16) for n in (640, 1280, 1280))
    a, b = (t.cuda().requires_grad_() for t in adapters(features=640, out=1280, rank=32))
    x.requires_grad_()
    out = add_low_rank(onto, x, a, b, 0.5)
    out.backward(grad)
    x64, a64, b64, grad64 = (t.detach().double() for t in (x, a, b, grad))
    truth = onto.double() + 0.5 * x64 @ a64.T @ b64.T
    gradients = (0.5 * grad64 @ b64 @ a64, 0.5 * (grad64 @ b64).T @ x64, 0.5 * grad64.T @ (x64 @ a64.T))
    assert (out != truth.to(BF16)).float().mean() < 0.01
    for found, true, limit in zip((x.grad, a.grad, b.grad), gradients, (4e-3, 2e-6, 2e-6)):
        assert (found.double() - true).norm() < limit * true.norm()
