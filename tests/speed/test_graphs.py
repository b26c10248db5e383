"""Graphs of the network's calls: their bookkeeping with a double that replays on the CPU, and real ones on a GPU."""

import pytest
import torch
from builders.backbones import FAMILIES, PROMPTS, cfg, make_backbone, noise_source
from builders.messages import says

from rsaft_fast.errors import UserError
from rsaft_fast.methods import DRaFT
from rsaft_fast.sampling import backpropagate, derive_rng, rollout
from rsaft_fast.speed.graphs import GraphedForward, graph_calls
from rsaft_fast.speed.regional import compile_blocks, repeated_blocks


class Recorded:
    """Stands in for a CUDA graph: a replay runs the call again, on the tensors that it was captured with, and writes
    into the same result, as a graph does."""

    def __init__(self):
        self.captures, self.replays = 0, 0

    def __call__(self, run):
        self.captures += 1
        out = run()

        def replay():
            self.replays += 1
            for held, fresh in zip(out, run()):
                held.copy_(fresh)

        return replay, out


@pytest.fixture
def recorded(tmp_path):
    backbone = make_backbone("flux", tmp_path)
    record = Recorded()
    backbone.denoiser.forward = GraphedForward(backbone.denoiser, record)
    return backbone, record


def predictions(backbone, indices=(0, 1, 2), size=2):
    conditioning = backbone.encode(PROMPTS[:size], **cfg(backbone, 1.0))
    x, schedule = backbone.initial_latents(noise_source(size)), backbone.schedule(4)
    with torch.no_grad():
        return [backbone.predict(x, schedule[i], conditioning.positive) for i in indices]


def test_one_capture_a_shape_and_a_replay_a_call(recorded, tmp_path):
    backbone, record = recorded
    plain = make_backbone("flux", tmp_path / "plain")
    for size in (2, 1, 2):
        for ours, truth in zip(predictions(backbone, size=size), predictions(plain, size=size), strict=True):
            assert torch.equal(ours, truth)
    assert (record.captures, record.replays) == (2, 9)


def test_results_outlive_the_next_replay(recorded):
    backbone, _ = recorded
    first, second = predictions(backbone, (0, 3))
    assert not torch.equal(first, second) and torch.equal(first, predictions(backbone, (0,))[0])


def test_inputs_of_the_caller_are_left_alone(recorded):
    backbone, _ = recorded
    conditioning = backbone.encode(PROMPTS[:2])
    x, schedule = backbone.initial_latents(noise_source(2)), backbone.schedule(4)
    kept = x.clone()
    with torch.no_grad():
        backbone.predict(x, schedule[0], conditioning.positive)
        backbone.predict(x + 1, schedule[1], conditioning.positive)
    assert torch.equal(x, kept)


def test_weights_that_change_in_place_are_seen_and_moved_ones_refused(recorded):
    backbone, record = recorded
    before = predictions(backbone, (0,))[0]
    parameter = next(iter(backbone.trainable_parameters.values()))
    with torch.no_grad():
        parameter.mul_(2)
    assert not torch.equal(before, predictions(backbone, (0,))[0]) and record.captures == 1
    kept, parameter.data = parameter.data, parameter.data.clone()
    with pytest.raises(RuntimeError, match=says("weights", "moved", "CUDA graph")):
        predictions(backbone, (0,))
    del kept


def test_a_call_that_cannot_be_captured_says_so_and_memory_running_out_stays_that(recorded):
    backbone, _ = recorded

    def failing(error):
        def capture(run):
            raise error

        return capture

    backbone.denoiser.forward.capture = failing(RuntimeError("operation not permitted when stream is capturing\n..."))
    with pytest.raises(UserError, match=says("operation not permitted", "speed.cuda_graph=false")):
        predictions(backbone, (0,))
    backbone.denoiser.forward.capture = failing(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        predictions(backbone, (0,))


def test_calls_with_gradient_are_not_captured(recorded):
    backbone, record = recorded
    noise, schedule = noise_source(2), backbone.schedule(4)
    plan = DRaFT(k=2).draw(4, derive_rng(0, 0, "plan"))
    trajectory = rollout(backbone, schedule, plan, backbone.initial_latents(noise), backbone.encode(PROMPTS[:2]), noise)
    assert (record.captures, record.replays) == (1, 4)
    backpropagate(backbone, trajectory, [torch.ones_like(trajectory.endpoints[0])])
    assert (record.captures, record.replays) == (1, 4)
    assert all(p.grad is not None for p in backbone.trainable_parameters.values())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_rollouts_are_the_plain_ones_on_the_gpu(family, compiled, tmp_path):
    backbone = make_backbone(family, tmp_path, device="cuda", dtype=torch.bfloat16)
    if compiled:
        compile_blocks(repeated_blocks(backbone.denoiser), with_gradient=False)
    conditioning = backbone.encode(PROMPTS[:2], "blurry", **cfg(backbone, 3.0))
    noise, schedule = noise_source(2), backbone.schedule(4)
    plan = DRaFT(k=1).draw(4, derive_rng(0, 0, "plan"))
    latents = backbone.initial_latents(noise)

    def endpoint():
        return rollout(backbone, schedule, plan, latents, conditioning, noise).endpoints[0]

    plain = endpoint()
    graph_calls(backbone.denoiser, backbone.device)
    for _ in range(2):
        torch.testing.assert_close(endpoint(), plain, rtol=0, atol=0 if not compiled else 0.05)
    with torch.no_grad():
        for parameter in backbone.trainable_parameters.values():
            parameter.mul_(1.5)
    moved = endpoint()
    assert len(backbone.denoiser.forward.captured) == 1 and not torch.equal(moved, plain)
    backbone.denoiser.forward = backbone.denoiser.forward.forward
    torch.testing.assert_close(moved, endpoint(), rtol=0, atol=0 if not compiled else 0.05)
