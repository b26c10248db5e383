"""Decoding in row strips against diffusers' own decoder: images, gradients, what it falls back to, and its peak."""

from __future__ import annotations

import copy

import pytest
import torch
from builders.backbones import PROMPTS, noise_source
from builders.messages import says
from builders.recipes import environment
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rsaft_fast import phases
from rsaft_fast.algorithms.reward_gradient import PlannedBatch, rsaft_step
from rsaft_fast.backbones import LoRASettings, add_lora, load_backbone, random_backbone
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.estimate.live import LiveBytes, shapes_alone
from rsaft_fast.memory import checkpoint_calls, checkpoint_vae_decoder, decode_in_strips
from rsaft_fast.memory.strips import STRIP_ELEMENTS
from rsaft_fast.methods import DRaFT
from rsaft_fast.optim import SAM
from rsaft_fast.playground import pipeline_path, reward_path
from rsaft_fast.recipe.load import load_config
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.sampling import derive_rng
from rsaft_fast.smoothing.settings import ParameterSmoothing, Smoothing

MIB = 2**20
GIB = 2**30


def make_vae(
    channels=(4, 8, 8), layers=1, attention=True, groups=2, seed=0, up="UpDecoderBlock2D", kind=AutoencoderKL, **own
):
    """A float64 VAE whose norms have weights and biases of their own."""
    torch.manual_seed(seed)
    vae = kind(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=(up,) * len(channels),
        latent_channels=4,
        layers_per_block=layers,
        norm_num_groups=groups,
        mid_block_add_attention=attention,
        **own,
    )
    vae = vae.double().eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


def decoded(vae, latents, cotangent=None):
    """Images and the gradient at the latents."""
    x = latents.clone().requires_grad_()
    images = vae.decode(x).sample
    if cotangent is None:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return images.detach(), torch.autograd.grad(images, x, cotangent.to(images.dtype))[0]


def relative_error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


def assert_close(found, truth, tolerance):
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert relative_error(ours, theirs.double()) < tolerance


VAES = {
    "two stages": make_vae((4, 8)),
    "three stages, wide": make_vae((8, 4, 12), layers=2, groups=4),
    "one stage": make_vae((8,)),
    "no attention": make_vae((4, 6), attention=False),
    "FLUX.2's": make_vae((4, 8), kind=AutoencoderKLFlux2),
    "FLUX.2's, of another width than its encoder": make_vae(
        (4, 8), kind=AutoencoderKLFlux2, decoder_block_out_channels=(6, 4)
    ),
}


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(list(VAES)),
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(2, 9),  # a group of two elements has no gradient to speak of
    strip_elements=st.sampled_from([1, 100, 333, 1000, STRIP_ELEMENTS]),
    seed=st.integers(0, 2**31),
)
def test_images_and_gradients_are_those_of_diffusers(name, batch, height, width, strip_elements, seed):
    vae = VAES[name]
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64)
    truth = decoded(vae, latents)
    with decode_in_strips(vae, strip_elements):
        found = decoded(vae, latents)
        with torch.no_grad():
            assert torch.equal(vae.decode(latents).sample, found[0])
    assert_close(found, truth, 1e-12)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 13])
def test_every_height_of_strips(rows):
    """Of a picture of 12 rows: with and without a smaller last strip, and beyond the picture."""
    vae, latents = VAES["two stages"], torch.randn(2, 4, 6, 7, dtype=torch.float64)
    with decode_in_strips(vae, rows * 8 * 14):  # of 8 channels, at the full width
        found = decoded(vae, latents)
    assert_close(found, decoded(vae, latents), 1e-12)


def test_nothing_that_is_given_is_written_over():
    vae, latents = VAES["two stages"], torch.randn(1, 4, 5, 3, dtype=torch.float64)
    x, cotangent = latents.clone().requires_grad_(), torch.randn(1, 3, 10, 6, dtype=torch.float64)
    before = cotangent.clone(), copy.deepcopy(vae.state_dict())
    with decode_in_strips(vae, 100):
        images = vae.decode(x).sample
        first = images.detach().clone()
        torch.autograd.grad(images, x, cotangent)
    assert torch.equal(x, latents) and torch.equal(cotangent, before[0]) and torch.equal(images, first)
    assert all(torch.equal(t, before[1][name]) for name, t in vae.state_dict().items())


def test_graphs_that_are_kept_and_graphs_side_by_side():
    vae = VAES["three stages, wide"]
    latents = [torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    truth = [torch.autograd.grad(vae.decode(x).sample.square().sum(), x)[0] for x in latents]
    with decode_in_strips(vae, 333):
        losses = [vae.decode(x).sample.square().sum() for x in latents]
        again = [torch.autograd.grad(losses[0], latents[0], retain_graph=True)[0] for _ in range(2)]
        (other,) = torch.autograd.grad(losses[1], latents[1])
    assert torch.equal(*again)
    assert_close([again[0], other], truth, 1e-12)


def test_a_graph_of_the_gradient_is_refused():
    vae, x = VAES["two stages"], torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    with decode_in_strips(vae):
        (gradient,) = torch.autograd.grad(vae.decode(x).sample.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.fixture(scope="module")
def wide_vae():
    """Channels enough for sums as long as those of real decoders."""
    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        norm_num_groups=8,
    )
    return vae.double().eval().requires_grad_(False)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 0.0), (torch.float32, 300.0), (torch.bfloat16, 0.0)])
def test_rounding_is_no_worse_than_that_of_the_plain_decoder(wide_vae, dtype, mean):
    """`mean`: of the first activation, beside a spread of about 1: with it, E[x^2] - E[x]^2 is no variance."""
    vae, latents = copy.deepcopy(wide_vae), torch.randn(2, 4, 12, 9, dtype=torch.float64)
    vae.decoder.conv_in.bias.add_(mean)
    vae.to(dtype)
    exact = copy.deepcopy(vae).double()
    latents = latents.to(dtype)
    truth = decoded(exact, latents.double())
    plain = [relative_error(a, b) for a, b in zip(decoded(vae, latents), truth)]
    with decode_in_strips(vae, 2000):
        ours = [relative_error(a, b) for a, b in zip(decoded(vae, latents), truth)]
    assert all(mine <= 1.5 * theirs for mine, theirs in zip(ours, plain))
    if dtype == torch.float32 and mean == 0:
        assert max(ours) < 1e-5


def swap_activation(vae):
    vae.decoder.up_blocks[0].resnets[0].nonlinearity = nn.GELU()


def swap_tail(vae):
    vae.decoder.conv_act = nn.Tanh()


def hook_a_norm(vae):
    vae.decoder.up_blocks[1].resnets[0].norm2.register_forward_hook(lambda module, inputs, out: 2 * out)


def hook_an_upsampler(vae):
    vae.decoder.up_blocks[0].upsamplers[0].register_forward_hook(lambda module, inputs, out: 3 * out)


def replace_a_forward(vae):
    block = vae.decoder.up_blocks[0]
    block.forward = lambda x, temb=None: 0.5 * type(block).forward(block, x, temb)


def wrap_a_convolution(vae):
    resnet = vae.decoder.mid_block.resnets[1]
    resnet.conv1 = nn.Sequential(resnet.conv1, nn.Tanh())


def pad_by_reflection(vae):
    vae.decoder.up_blocks[1].resnets[1].conv2.padding_mode = "reflect"
    vae.decoder.up_blocks[1].resnets[1].conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


def scale_the_output(vae):
    vae.decoder.mid_block.resnets[0].output_scale_factor = 2.0


def checkpoint_a_resnet(vae):
    checkpoint_calls([vae.decoder.up_blocks[0].resnets[1]])


ODDITIES = (
    swap_activation,
    swap_tail,
    hook_a_norm,
    hook_an_upsampler,
    replace_a_forward,
    wrap_a_convolution,
    pad_by_reflection,
    scale_the_output,
    checkpoint_a_resnet,
)


@pytest.mark.parametrize("change", ODDITIES)
def test_what_is_not_as_expected_runs_as_it_is(change):
    vae, latents = make_vae((4, 8), seed=5), torch.randn(2, 4, 5, 4, dtype=torch.float64)
    untouched = decoded(vae, latents)
    change(vae)
    truth = decoded(vae, latents)
    if change is not checkpoint_a_resnet:
        assert relative_error(truth[0], untouched[0]) > 1e-6
    with decode_in_strips(vae, 100):
        assert_close(decoded(vae, latents), truth, 1e-12)


def test_blocks_of_another_kind_run_as_they_are():
    vae, latents = make_vae((4, 8), up="AttnUpDecoderBlock2D"), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    truth = decoded(vae, latents)
    with decode_in_strips(vae, 100):
        assert_close(decoded(vae, latents), truth, 1e-12)


def test_trained_decoder_weights_get_their_gradients():
    vae, latents = make_vae((4, 8)), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    vae.decoder.requires_grad_(True)
    gradients = {}
    for strips in (False, True):
        with decode_in_strips(vae) if strips else checkpoint_calls([]):
            loss = vae.decode(latents).sample.square().sum()
        gradients[strips] = torch.autograd.grad(loss, list(vae.decoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients[False], gradients[True]))


def test_dropout_in_training_is_left_to_the_plain_decoder():
    vae, latents = make_vae((4, 8)).train(), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    vae.decoder.mid_block.resnets[0].dropout.p = 0.5
    torch.manual_seed(0)
    truth = decoded(vae, latents)
    torch.manual_seed(0)
    with decode_in_strips(vae):
        assert all(torch.equal(a, b) for a, b in zip(decoded(vae, latents), truth))


def test_autocast_is_left_to_the_plain_decoder():
    vae, latents = make_vae((4, 8)).float(), torch.randn(1, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        truth = vae.decode(latents).sample
        with decode_in_strips(vae):
            assert torch.equal(vae.decode(latents).sample, truth)


@pytest.mark.parametrize("kind", [AsymmetricAutoencoderKL, AutoencoderTiny])
def test_another_decoder_is_refused(kind):
    with pytest.raises(UserError, match=says("backbone.checkpoint", "decoder-strips", kind.__name__, "AutoencoderKL ")):
        decode_in_strips(kind())


def test_removal_and_deep_copies():
    vae, latents = make_vae((4, 8)), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    truth, before = decoded(vae, latents), set(vae.decoder.__dict__)
    handle = decode_in_strips(vae, 100)
    other = copy.deepcopy(vae)
    for parameter in other.decoder.parameters():
        parameter.zero_()
    with torch.no_grad():
        assert not other.decode(latents).sample.any()
    handle.remove()
    assert set(vae.decoder.__dict__) == before
    assert all(torch.equal(a, b) for a, b in zip(decoded(vae, latents), truth))


# -- memory ------------------------------------------------------------------------------------------------------------


def peak(vae, latents, device):
    """Bytes at the peak of decoding and its gradient, beyond the weights, and how many are left."""
    live = LiveBytes(device)
    live.see([*vae.parameters(), latents])
    before = live.alive
    with live:
        images = vae.decode(latents.requires_grad_()).sample
        gradient = torch.autograd.grad(images, latents, torch.empty_like(images))
        del images
        left = live.alive - before - live.size(gradient[0])
        del gradient
    return live.peak - before, left


@pytest.mark.slow
def test_the_peak_on_the_cpu_whatever_the_batch():
    vae, strip = make_vae((16, 32, 32), layers=2).float(), 32 * 64
    full = 4 * 64 * 64  # bytes of a channel at the full resolution
    kept = 64 * full / 16 + 32 * full / 4 + 32 * full  # what the stages start from; inputs of the last resnets
    unavoidable = kept + (32 + 2 * 16) * full
    with checkpoint_vae_decoder(vae):
        by_resnet, _ = peak(vae, torch.randn(1, 4, 16, 16), "cpu")
    for batch in (1, 4):
        with decode_in_strips(vae, strip):
            ours, left = peak(vae, torch.randn(batch, 4, 16, 16), "cpu")
        pictures = 2 * 3 * full * batch  # images, and their cotangent
        assert left == 0
        assert ours < unavoidable + 12 * 4 * strip + pictures
        assert ours < 0.4 * by_resnet + pictures
        # Shapes alone, where not every picture is walked, say the same.
        shapes = copy.deepcopy(vae).to("meta")
        with shapes_alone(cuda=False), decode_in_strips(shapes, strip):
            counted, _ = peak(shapes, torch.empty(batch, 4, 16, 16, device="meta"), "meta")
        assert counted == pytest.approx(ours, rel=0.01)


@pytest.fixture(scope="module")
def real_backbone():
    """The decoder that all four formats share, at real size on the meta device."""
    return random_backbone("sd15", height=1024, width=1024, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("size", "batch", "limit"), [(1024, 1, 1.45 * GIB), (1024, 2, 1.48 * GIB), (512, 1, 0.48 * GIB)]
)
def test_the_peak_at_real_size_whatever_the_batch(real_backbone, size, batch, limit):
    vae = real_backbone.pipeline.vae
    latents = torch.empty(batch, 4, size // 8, size // 8, dtype=torch.bfloat16, device="meta")
    with shapes_alone(), decode_in_strips(vae):
        ours, left = peak(vae, latents, "meta")
    assert ours < limit and left == 0


def test_flux2s_decoder_at_real_size_keeps_and_takes_no_more():
    """The plain one keeps 11.1 GiB there."""
    vae = random_backbone("klein-4b", device="meta", dtype=torch.bfloat16).pipeline.vae
    latents = torch.empty(1, 32, 128, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    live = LiveBytes("meta")
    live.see([*vae.parameters(), latents])
    with shapes_alone(), live, decode_in_strips(vae):
        before = live.alive
        images = vae.decode(latents, return_dict=False)[0]
        kept = live.alive - before
        images.backward(torch.empty_like(images))
        assert kept < 0.98 * GIB and live.peak - before < 1.6 * GIB


@pytest.mark.slow
def test_the_estimate_of_a_shipped_recipe(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    keys = {"backbone.checkpoint": "[denoiser,decoder-strips]", "backbone.height": 1024, "backbone.width": 1024}
    keys |= {"data.batch_size": 1, "data.accumulate": 1, "sampler.guidance_scale": 1, "samples.every": 0}
    keys |= {"smoothing": "null", "sharpness": "null"}  # one decoding instead of five
    found = estimate(load_config("sd15-lora-24gb.yaml", [f"{key}={value}" for key, value in keys.items()]))
    assert found.phase(phases.SCORING).own < found.phase(phases.DECODER).own < 1.45 * GIB


@pytest.fixture
def real_vae(real_backbone):
    """The same decoder on the GPU, its weights drawn as diffusers draws them."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        vae = AutoencoderKL.from_config(real_backbone.pipeline.vae.config)
    return vae.to(torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.gpu
@pytest.mark.parametrize(("height", "width", "batch"), [(256, 256, 2), (264, 200, 1)])
def test_on_the_gpu_rounding_is_no_worse_and_nothing_synchronises(real_vae, height, width, batch):
    latents = torch.randn(batch, 4, height // 8, width // 8, device="cuda", dtype=torch.bfloat16)
    cotangent = torch.randn(batch, 3, height, width, device="cuda", dtype=torch.bfloat16)
    truth = decoded(copy.deepcopy(real_vae).double(), latents.double(), cotangent.double())
    plain = [relative_error(a, b) for a, b in zip(decoded(real_vae, latents, cotangent), truth)]
    with decode_in_strips(real_vae, 2**19):
        decoded(real_vae, latents, cotangent)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = decoded(real_vae, latents, cotangent)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(relative_error(a, b) <= 1.5 * error for a, b, error in zip(found, truth, plain))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [512, 1024])
def test_on_the_gpu_the_peak_is_the_counted_one(real_vae, real_backbone, size):
    """But for the convolutions' workspaces, which cuDNN chooses."""
    latents = torch.empty(1, 4, size // 8, size // 8, dtype=torch.bfloat16, device="meta")
    with shapes_alone(), decode_in_strips(real_backbone.pipeline.vae):
        counted, _ = peak(real_backbone.pipeline.vae, latents, "meta")
    drawn = torch.randn(latents.shape, device="cuda", dtype=torch.bfloat16)
    with decode_in_strips(real_vae):
        decoded(real_vae, drawn, torch.ones(1, 3, size, size, device="cuda"))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        decoded(real_vae, drawn, torch.ones(1, 3, size, size, device="cuda"))
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(counted, rel=0.1, abs=64 * MIB)


# -- in training -------------------------------------------------------------------------------------------------------


def update(backbone, reward):
    """An update by SAM over SGD at learning rate 1: its gradient."""
    plan = DRaFT(k=2).draw(3, derive_rng(0, 0, "plan"))
    prompts, noise = list(PROMPTS[:3]), noise_source(3)
    batch = PlannedBatch(MicroBatch(prompts, backbone.encode(prompts), backbone.initial_latents(noise), noise), plan)
    before = {name: p.detach().clone() for name, p in backbone.trainable_parameters.items()}
    optimizer = SAM(list(backbone.trainable_parameters.values()), torch.optim.SGD, rho=0.1, lr=1.0)
    smoothing = Smoothing(parameters=ParameterSmoothing(rho=0.1))
    loss = DRaFT(k=2).default_loss
    rsaft_step(backbone, reward, backbone.schedule(3), [batch], optimizer, smoothing=smoothing, loss=loss)
    found = torch.cat([(before[name] - p.detach()).flatten() for name, p in backbone.trainable_parameters.items()])
    with torch.no_grad():
        for name, p in backbone.trainable_parameters.items():
            p.copy_(before[name])
    return found


def test_an_update_of_the_playground_is_the_same():
    backbone = load_backbone(pipeline_path(), dtype=torch.float64)
    add_lora(backbone, LoRASettings(rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.trainable_parameters.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    settings = RewardSettings(path=str(reward_path("brittle")), dtype="float64", checkpoint=False)
    reward = load_reward(settings)
    truth = update(backbone, reward)
    with decode_in_strips(backbone.pipeline.vae, 1000):
        found = update(backbone, reward)
    assert truth.norm() > 0 and relative_error(found, truth) < 1e-9
