"""Compiled blocks: the same numbers, one compilation for all steps, weights that change in place."""

import pytest
import torch
from builders.backbones import FAMILIES, PROMPTS, cfg, clear_gradients, gradients, make_backbone, noise_source
from builders.messages import says
from torch._dynamo.utils import counters

from rsaft_fast.memory import checkpoint_denoiser
from rsaft_fast.ops import bf16_parts
from rsaft_fast.speed.regional import compile_blocks, repeated_blocks


class Calls:
    """A backbone's network calls, with and without gradient."""

    def __init__(self, backbone):
        self.backbone = backbone
        self.schedule = backbone.schedule(4)
        self.conditioning = backbone.encode(PROMPTS[:2], **cfg(backbone, 1.0))
        self.latents = backbone.initial_latents(noise_source(2))

    def sample(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.backbone.predict(self.latents, self.schedule[i], self.conditioning.positive)

    def differentiate(self, i: int) -> dict[str, torch.Tensor]:
        clear_gradients(self.backbone)
        x = self.latents.clone().requires_grad_(True)
        self.backbone.predict(x, self.schedule[i], self.conditioning.positive).square().sum().backward()
        return gradients(self.backbone) | {"x": x.grad}


def compiled(backbone, with_gradient: bool, backend: str = "aot_eager") -> None:
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(repeated_blocks(backbone.denoiser), with_gradient, backend)


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def assert_close(ours: dict, truth: dict) -> None:
    for name, tensor in truth.items():
        assert (ours[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max() + 1e-7, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpointed"),
    # Some ten seconds each, mostly of compiling: of transformers and UNets one as it is and one under checkpointing.
    [("sd3", False), ("flux", True), ("sd15", False), ("sdxl", True), ("klein", True), ("zimage", False)]
    + [("qwen", True), ("krea", True)],
)
def test_compiled_blocks_compute_the_same_and_compile_once(family, checkpointed, tmp_path):
    backbone = make_backbone(family, tmp_path)
    calls = Calls(backbone)
    expected = [(calls.sample(i), calls.differentiate(i)) for i in range(3)]
    if checkpointed:
        checkpoint_denoiser(backbone.denoiser)
    compiled(backbone, with_gradient=True)
    for i, (prediction, slopes) in enumerate(expected):
        torch.testing.assert_close(calls.sample(i), prediction, rtol=1e-5, atol=1e-5)
        assert_close(calls.differentiate(i), slopes)
        if i == 0:
            first = compilations()
            assert first > 0
    assert compilations() == first, "neither another step nor the other gradient mode compiles again"
    assert not counters["graph_break"] and not counters["recompiles"]


@pytest.mark.slow
def test_weights_that_change_in_place_are_seen(tmp_path):
    """As a perturbation changes them between the passes of every update."""
    backbone = make_backbone("sd3", tmp_path)
    calls = Calls(backbone)
    compiled(backbone, with_gradient=False)
    before, count = calls.sample(1), compilations()
    with torch.no_grad():
        for p in backbone.denoiser.parameters():
            p.mul_(1.1)
    perturbed = calls.sample(1)
    assert compilations() == count and not torch.allclose(before, perturbed)
    for block in repeated_blocks(backbone.denoiser):
        del block.forward
    torch.testing.assert_close(perturbed, calls.sample(1), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_rollout_alone_leaves_graded_calls_as_they_are(tmp_path):
    backbone = make_backbone("sd3", tmp_path)
    calls = Calls(backbone)
    truth = calls.differentiate(0)
    compiled(backbone, with_gradient=False)
    slopes = calls.differentiate(0)
    assert compilations() == 0 and all(torch.equal(slopes[name], truth[name]) for name in truth)
    calls.sample(0)
    assert compilations() > 0


def test_a_denoiser_without_known_blocks_is_refused():
    with pytest.raises(ValueError, match=says("Sequential", "JointTransformerBlock")):
        repeated_blocks(torch.nn.Sequential())


@pytest.mark.slow
def test_compiled_code_rounds_where_the_adapters_need_it():
    """Inductor leaves a cast to bf16 and back out: the parts of an fp32 adapter must not rest on one, or they would be
    the adapter in bf16, zero and zero, and a perturbation lost."""
    wide = torch.randn(4, 37)
    parts = torch.compile(bf16_parts)(wide)
    assert torch.equal(parts, bf16_parts(wide)) and torch.equal(parts.float().view(3, 4, 37).sum(0), wide)


@pytest.mark.slow
def test_inductor_computes_the_same(tmp_path):
    backbone = make_backbone("sd3", tmp_path)
    calls = Calls(backbone)
    prediction, slopes = calls.sample(0), calls.differentiate(0)
    compiled(backbone, with_gradient=True, backend="inductor")
    torch.testing.assert_close(calls.sample(0), prediction, rtol=1e-4, atol=1e-4)
    ours = calls.differentiate(0)
    for name, tensor in slopes.items():
        assert (ours[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max() + 1e-6, name


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_gpu(family, tmp_path):
    backbone = make_backbone(family, tmp_path, device="cuda", dtype=torch.bfloat16)
    calls = Calls(backbone)
    prediction = calls.sample(0)
    compiled(backbone, with_gradient=True, backend="inductor")
    assert (calls.sample(0) - prediction).abs().max() <= 0.05 * prediction.abs().max()
    calls.differentiate(0)
    count = compilations()
    calls.sample(1), calls.differentiate(1)
    assert compilations() == count
