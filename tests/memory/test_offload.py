"""Streamed blocks: the same bits, at most two copies alive, fetched in the order of use, forward and backward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from builders.backbones import BUILDERS, FAMILIES, gradients, noise_source
from builders.messages import says
from builders.recipes import config as tiny_config
from builders.recipes import environment
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rsaft_fast.backbones import LoRASettings, PipelineBackbone, add_lora, load_backbone, random_backbone
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import GIB, estimate
from rsaft_fast.estimate.states import AccountedOptimizer
from rsaft_fast.memory import checkpoint_denoiser
from rsaft_fast.memory.offload import OffloadedBlocks, spread, transformer_blocks
from rsaft_fast.ops.transfer import CopyStream, Packing, host_buffer
from rsaft_fast.recipe.load import load_config
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.loop import train
from rsaft_fast.train.trainer import Trainer

OFFLOADED = {"backbone__checkpoint": ["denoiser", "decoder"]}


class Copies:
    """Every copy to the device that has been begun: from which host buffer, and whether it still lives."""

    def __init__(self):
        self.sources: list[int] = []
        self.storages: list[weakref.ref] = []
        self.most = 0

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.storages)

    def begun(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.sources.append(source.data_ptr())
        self.storages.append(weakref.ref(target.untyped_storage()))
        self.most = max(self.most, sum(ref() is not None for ref in self.storages))

    def since(self, stream: OffloadedBlocks, first: int) -> list[str]:
        """Names of the blocks fetched from that copy on."""
        names = {host.data_ptr(): block.name for host, block in zip(stream.host, stream._blocks)}
        return [names[source] for source in self.sources[first:]]


@pytest.fixture
def copies(monkeypatch) -> Iterator[Copies]:
    seen, copy = Copies(), CopyStream.copy

    def counted(self, target, source, after=()):
        seen.begun(target, source)
        return copy(self, target, source, after)

    monkeypatch.setattr(CopyStream, "copy", counted)
    return seen


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: build(tmp_path_factory.mktemp(family)) for family, build in BUILDERS.items()}


@cache
def block_count(folder) -> int:
    return len(transformer_blocks(load_backbone(folder).denoiser))


def prepared(folder, count: int, dtype=torch.float32, checkpointed=True, quantize=None) -> PipelineBackbone:
    """A backbone with drawn adapters; the same at any count. count -1: all blocks."""
    count = block_count(folder) if count < 0 else count
    backbone = load_backbone(folder, height=32, width=32, dtype=dtype, offload_blocks=count, quantize=quantize)
    add_lora(backbone, LoRASettings(rank=2))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in backbone.trainable_parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    checkpoint_denoiser(backbone.denoiser, checkpointed)
    return backbone


def call(backbone, step: int = 1) -> torch.Tensor:
    branch = backbone.random_conditioning(2).positive
    return backbone.predict(backbone.initial_latents(noise_source(2)), backbone.schedule(4)[step], branch)


def walked(backbone) -> list[torch.Tensor]:
    """A call without grad, and one with its gradients."""
    with torch.no_grad():
        sampled = call(backbone)
    out = call(backbone)
    out.square().sum().backward()
    return [sampled, out.detach(), *gradients(backbone).values()]


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_order_and_copies_alive(folders, copies, family, dtype):
    truth = walked(prepared(folders[family], 0, dtype))
    assert not copies.sources
    backbone = prepared(folders[family], -1, dtype)
    stream = backbone.offloaded
    with torch.no_grad():
        call(backbone)  # a UNet's order is known after its first call
    first = len(copies.sources)
    assert same(walked(backbone), truth)
    names = stream.names
    assert copies.since(stream, first) == [*names, *names, *reversed(names)]
    assert copies.most == 2 and copies.alive == 0 and stream.fetches == len(copies.sources)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_is_that_of_the_calls(folders, family):
    backbone, called = prepared(folders[family], -1), []
    for name, block in transformer_blocks(backbone.denoiser).items():
        block.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        call(backbone)
    assert backbone.offloaded.names == called and len(called) > 1


@pytest.mark.parametrize("quantize", ["nf4", "int8", "fp8"])
def test_quantised_blocks_are_streamed_as_codes(folders, copies, quantize):
    whole = prepared(folders["flux"], -1).offloaded
    truth = walked(prepared(folders["flux"], 0, quantize=quantize))
    backbone = prepared(folders["flux"], -1, quantize=quantize)
    assert same(walked(backbone), truth)
    # At this size half of the bytes are gaps between small tensors.
    assert sum(map(torch.numel, backbone.offloaded.host)) < 0.75 * sum(map(torch.numel, whole.host))
    assert copies.most == 2 and copies.alive == 0


def test_some_blocks_stay(folders, copies):
    truth = walked(prepared(folders["sdxl"], 0))
    backbone = prepared(folders["sdxl"], 3)
    assert same(walked(backbone), truth)
    assert len(backbone.offloaded.names) == 3 < len(transformer_blocks(backbone.denoiser)) and copies.most == 2


def test_more_buffers_look_further_ahead(folders, copies):
    truth = walked(prepared(folders["sdxl"], 0))
    backbone = load_backbone(folders["sdxl"], height=32, width=32)
    backbone.offloaded = OffloadedBlocks(backbone.denoiser, 8, "cpu", buffers=4)
    add_lora(backbone, LoRASettings(rank=2))
    for parameter, other in zip(
        backbone.trainable_parameters.values(), prepared(folders["sdxl"], 0).trainable_parameters.values()
    ):
        parameter.data.copy_(other.data)
    checkpoint_denoiser(backbone.denoiser)
    assert same(walked(backbone), truth) and copies.most == 4 and copies.alive == 0


@pytest.mark.parametrize("checkpointed", [True, False])
def test_graphs_keep_the_weights_they_were_made_with(folders, copies, checkpointed):
    """Two graphs at once, walked backward in the order in which they were made; and without checkpointing, which only
    costs memory."""
    results = []
    for count in (0, -1):
        backbone = prepared(folders["sd3"], count, checkpointed=checkpointed)
        outs = [call(backbone, step) for step in (1, 2)]
        if count and not checkpointed:
            assert copies.alive == 2 * len(backbone.offloaded.names)
        for out in outs:
            out.square().sum().backward()
        results.append([*(out.detach() for out in outs), *gradients(backbone).values()])
        del out, outs
    # Without a recomputation nobody takes the copy that the backward pass had sent for.
    assert same(*results) and copies.alive == (0 if checkpointed else 1)
    assert copies.most == 2 or not checkpointed


def test_a_call_that_fails_leaves_the_weights_on_the_host(folders, copies):
    truth = walked(prepared(folders["sdxl"], 0))
    backbone = prepared(folders["sdxl"], -1)
    blocks = list(transformer_blocks(backbone.denoiser).values())

    def exhausted(*_):
        raise torch.OutOfMemoryError("out of memory")

    for fails_in in ("forward", "backward"):
        out = call(backbone)
        handle = blocks[3].attn1.register_forward_hook(exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            call(backbone) if fails_in == "forward" else out.square().sum().backward()
        handle.remove()
        del out
        assert all(p.data_ptr() in host_addresses(backbone.offloaded) for p in frozen(blocks))
        for parameter in backbone.trainable_parameters.values():
            parameter.grad = None
    assert same(walked(backbone), truth) and copies.alive == 0 and copies.most <= 3


def host_addresses(stream: OffloadedBlocks) -> set[int]:
    return {view.data_ptr() for block in stream._blocks for view in block.packing.views(block.host)}


def parameters(backbone) -> list[torch.Tensor]:
    return list(backbone.denoiser.parameters())


def frozen(blocks) -> list[torch.Tensor]:
    return [p for block in blocks for p in block.parameters() if not p.requires_grad]


def test_only_adapters_and_resident_weights_are_on_the_device():
    """The device is "meta" here, so that its tensors tell."""
    backbone = random_backbone("flux1", device="meta", dtype=torch.bfloat16, offload_blocks=57)
    assert len(backbone.offloaded.names) == 57
    streamed = sum(host.numel() for host in backbone.offloaded.host)
    whole = sum(p.numel() for p in backbone.denoiser.parameters()) * 2
    assert 0.98 < streamed / whole < 1


def test_the_estimate_names_the_memory_of_the_host(tiny, out):
    settings = tiny_config(tiny, out, "sd3", **OFFLOADED, backbone__offload_blocks=2, optimizer__offload="state")
    trainer = Trainer(settings, check_config(settings))
    trainer.update()
    real = [
        sum(host.numel() for host in trainer.backbone.offloaded.host),
        sum(part.host.numel() for bucket in trainer.optimizer._buckets for part in bucket.parts),
    ]
    notes = [note for note in estimate(settings, cuda=False).notes if "page-locked host memory" in note]
    assert len(notes) == 2 and all(f": {size / GIB:.1f} GiB" in note for size, note in zip(real, notes))
    walked = AccountedOptimizer(trainer.optimizer, earlier=False, between=lambda: None)
    assert walked.host_bytes == real[1] > 0


@pytest.mark.slow
def test_flux_in_bf16_fits_a_card_of_24_gb_with_26_of_its_57_blocks_on_the_host(monkeypatch):
    """At real size; two pictures of 1024x1024 at a time. Whole it would take 31.3 GiB."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    found = estimate(load_config("flux-lora-24gb.yaml", ["backbone.quantize=null", "backbone.offload_blocks=26"]))
    assert 21 * GIB < found.peak < 22 * GIB
    backbone = random_backbone("flux1", device="meta", dtype=torch.bfloat16, offload_blocks=26)
    streamed = sum(block.packing.nbytes for block in backbone.offloaded._blocks)
    whole = sum(p.numel() for p in backbone.denoiser.parameters()) * 2
    assert found.standing["denoiser"] == pytest.approx(whole - streamed, rel=1e-3)
    assert f"{streamed / GIB:.1f} GiB of page-locked host memory" in " ".join(found.notes)


@given(st.integers(1, 80), st.data())
def test_spread(among, data):
    count = data.draw(st.integers(1, among))
    places = spread(count, among)
    assert len(set(places)) == count and places == sorted(places) and 0 <= places[0] and places[-1] < among
    gaps = [b - a for a, b in pairwise([-1, *places, among])]
    inner = gaps[1:-1]
    assert not inner or max(inner) - min(inner) <= 1
    assert abs(gaps[0] - gaps[-1]) <= 1


@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(["float32", "bfloat16", "uint8"]))))
def test_packing_keeps_every_bit_and_layout(looks):
    tensors = [torch.randint(0, 255, shape).to(getattr(torch, dtype)).t() if len(shape) == 2 else
               torch.randint(0, 255, shape).to(getattr(torch, dtype)) for shape, dtype in looks]  # fmt: skip
    packing = Packing(tensors)
    buffer = host_buffer(packing.nbytes, torch.device("cpu"))
    views = packing.views(buffer)
    for view, tensor in zip(views, tensors):
        view.copy_(tensor)
    for view, tensor in zip(views, tensors):
        assert torch.equal(view, tensor) and view.stride() == tensor.stride() and view.dtype == tensor.dtype
        assert view.data_ptr() % 16 == 0 or not view.numel()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_blocks_that_cannot_be_streamed_are_refused(folders):
    with pytest.raises(UserError, match=says("offload_blocks", 9, "UNet2DConditionModel", 8)):
        load_backbone(folders["sdxl"], offload_blocks=9)
    backbone = load_backbone(folders["sd3"], offload_blocks=1)
    with pytest.raises(UserError, match=says("offload_blocks", "LoRA", "optimizer.offload=state")):
        backbone.train_all_parameters()
    denoiser = load_backbone(folders["sd3"]).denoiser
    with pytest.raises(UserError, match=says("transformer_blocks.1", "trained")):
        OffloadedBlocks(denoiser.requires_grad_(True), 1, "cpu")
    denoiser.requires_grad_(False)

    class Codes(nn.Parameter):
        pass

    last = denoiser.transformer_blocks[-1].attn.to_q
    last.weight = Codes(last.weight.data, requires_grad=False)
    with pytest.raises(UserError, match=says("transformer_blocks.1", "Codes")):
        OffloadedBlocks(denoiser, 1, "cpu")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({}, says("offload_blocks", 2, "backbone.checkpoint=[denoiser,decoder]")),
        ({"backbone__keep_blocks": 1, **OFFLOADED}, says("offload_blocks", 2, "keep_blocks", 1)),
        (
            {"parameters": {"train": "full"}, **OFFLOADED},
            says("offload_blocks", 2, "parameters.train", "full", "optimizer.offload=state"),
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused_before_anything_loads(tiny, out, overrides, line):
    with pytest.raises(UserError, match=line):
        check_config(tiny_config(tiny, out, "sd3", backbone__offload_blocks=2, **overrides))
    assert not out.exists()


# -- a whole run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_a_run_leaves_the_same_weights(tiny, tmp_path, copies, family):
    saved = {}
    for count in (0, 2):
        folder = tmp_path / str(count)
        train(tiny_config(tiny, folder, family, **OFFLOADED, backbone__offload_blocks=count), log=lambda line: None)
        saved[count] = checkpoints.read(checkpoints.newest(folder / "checkpoints")[0])
    assert saved[0].weights.keys() == saved[2].weights.keys()
    assert all(torch.equal(saved[0].weights[name], saved[2].weights[name]) for name in saved[0].weights)
    assert copies.most == 2 and copies.alive == 0


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide():
    """SD3.5 medium, of whose size copying and computing take milliseconds: 24 blocks, 4.6 GiB in bf16."""

    def build(count):
        backbone = random_backbone(
            "sd35-medium", height=512, width=512, dtype=torch.bfloat16, device="cuda", offload_blocks=count
        )
        add_lora(backbone, LoRASettings(rank=4))
        checkpoint_denoiser(backbone.denoiser)
        return backbone

    return build


@pytest.mark.gpu
@sdpa_kernel(SDPBackend.MATH)  # flash attention adds up a query's gradient in any order
def test_gpu_bits_pinned_memory_and_peak(wide):
    resident = wide(0)
    truth = walked(resident)
    weights = sum(p.numel() * p.element_size() for p in frozen(transformer_blocks(resident.denoiser).values()))
    largest = max(
        sum(p.numel() * p.element_size() for p in frozen([b])) for b in transformer_blocks(resident.denoiser).values()
    )
    peaks = [peak_of(resident)]
    del resident
    streamed = wide(24)
    assert all(host.is_pinned() for host in streamed.offloaded.host)
    assert all(p.is_cuda == (p.data_ptr() not in host_addresses(streamed.offloaded)) for p in parameters(streamed))
    assert same(walked(streamed), truth)
    peaks.append(peak_of(streamed))
    assert peaks[0] - peaks[1] > weights - 2.1 * largest


def peak_of(backbone) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    call(backbone).float().square().sum().backward()
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
def test_gpu_copies_run_beside_the_computation(wide):
    """A streamed call takes less than computing and copying one after the other."""
    streamed = wide(24)
    host = streamed.offloaded.host
    buffers = [torch.empty_like(part, device="cuda") for part in host]

    def copy_all():
        for target, source in zip(buffers, host):
            target.copy_(source, non_blocking=True)

    copying = milliseconds(copy_all)
    together = milliseconds(partial(sample, streamed))
    alone = milliseconds(partial(sample, wide(0)))
    assert together < 0.9 * (alone + copying) or together < 1.1 * max(alone, copying)


@torch.no_grad()
def sample(backbone) -> None:
    branch = backbone.random_conditioning(8).positive
    backbone.predict(backbone.initial_latents(noise_source(8)), backbone.schedule(4)[1], branch)


def milliseconds(function) -> float:
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)
