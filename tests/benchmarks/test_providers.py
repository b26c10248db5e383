"""Every provider computes what it is measured for: the same perturbation and the same AdamW step."""

import os

import pytest
import torch

from rsaft_fast import ops
from rsaft_fast.benchmarks.providers import (
    HOST_PASSES,
    LR,
    PROVIDERS,
    RHO,
    Ours,
    Problem,
    host_parts,
    passes_of,
    use_backend,
    why_missing,
)
from rsaft_fast.ops import backends

CPU = torch.device("cpu")
SHAPES = ((64, 65), (1,), (33, 3, 2), (4096,), (5000,))
WEIGHT_DECAY, EPS = 1e-2, 1e-8
# The backends of a GPU are tested as operations; torchao compiles for a minute.
HERE = [name for name in PROVIDERS if name not in ("ours-cuda", "ours-triton", "torchao")]
WITHOUT_PERTURB = ("adamw-alone", "pytorch_optimizer")  # one of them has no update either, the other no step
PAIRS = [(name, layout) for name in HERE for layout in ("fp32", "bf16") if layout in PROVIDERS[name].layouts]
# Moments in another form, and weights in bf16 alone.
OTHER_MOMENTS = [("optimi", "fp32"), ("optimi", "bf16"), ("pytorch_optimizer", "bf16")]


@pytest.fixture(autouse=True)
def backend_restored():
    before = os.environ.get(backends.ENV)
    yield
    use_backend(before)


def build(name, layout, seed=0):
    if reason := why_missing(name, CPU, layout):
        pytest.skip(reason)
    torch.manual_seed(seed)
    problem = Problem(SHAPES, layout, CPU)
    return problem, PROVIDERS[name].build(problem)


def weights_of(running):
    return [p.detach().double() for p in running.parameters]


def masters_of(running):
    """What holds the weights' full precision."""
    if getattr(running, "master", None):
        return [m.detach().double() for m in running.master]
    if hasattr(running, "optimizer"):
        held = [running.optimizer.state[p].get("master", p) for p in running.parameters]
        return [m.detach().double() for m in held]
    return weights_of(running)


def moments_of(running):
    """(exp_avg, exp_avg_sq, step) of each parameter."""
    optimizer = next(getattr(running, n) for n in ("optimizer", "base", "sam") if hasattr(running, n))
    held = getattr(optimizer, "base_optimizer", optimizer).state
    states = [held[p] for p in getattr(running, "master", None) or running.parameters]
    return [(s["exp_avg"].double(), s["exp_avg_sq"].double(), float(s["step"])) for s in states]


@pytest.mark.parametrize("name, layout", [pair for pair in PAIRS if pair[0] not in WITHOUT_PERTURB])
def test_perturb_moves_by_rho_along_the_gradient(name, layout):
    problem, running = build(name, layout)
    parts = running.parts()
    before = masters_of(running)
    parts["perturb"]()
    gradients = [g.double() for g in problem.gradients]
    norm = sum((g**2).sum() for g in gradients).sqrt()
    moved = [after - w for after, w in zip(weights_of(running), before)]
    length = sum((m**2).sum() for m in moved).sqrt()
    along = sum((m * g).sum() for m, g in zip(moved, gradients)) / norm / RHO
    if layout == "fp32":
        assert length == pytest.approx(RHO, rel=1e-4)
        assert along == pytest.approx(1, rel=1e-4)
    elif name != "optimi":  # bf16 without a master holds next to nothing of it
        assert along == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("what", ["update", "step"])
@pytest.mark.parametrize("name, layout", [pair for pair in PAIRS if pair not in OTHER_MOMENTS])
def test_an_update_restores_and_takes_an_adamw_step(name, layout, what):
    """From what was restored, and from the moments that the optimizer holds afterwards, the weights follow."""
    _, running = build(name, layout)
    parts = running.parts()
    if what not in parts:
        assert name in WITHOUT_PERTURB
        return
    before = masters_of(running)
    if what == "step" and "perturb" in parts:
        parts["perturb"]()
    parts[what]()
    for w, after, (exp_avg, exp_avg_sq, step) in zip(before, masters_of(running), moments_of(running)):
        denominator = (exp_avg_sq / (1 - 0.999**step)).sqrt() + EPS
        expected = w * (1 - LR * WEIGHT_DECAY) - LR * exp_avg / (1 - 0.9**step) / denominator
        assert (expected - w).abs().max() > LR / 10, "a step is taken"
        torch.testing.assert_close(after, expected, rtol=2e-7, atol=1e-3 * LR)


def test_the_passes_are_the_operations_themselves():
    before = {name: getattr(ops, name) for name in ("global_norm", "sam_perturb_", "sam_adamw_step_")}
    _, ours = build("ours-torch", "fp32")
    parts = ours.parts()
    assert before == {name: getattr(ops, name) for name in before}, "nothing stays wrapped"
    assert set(parts) == {"norm", "perturb", "step", "update"}
    norm = ours.optimizer.stats()["grad_norm"]
    for p in ours.parameters:
        p.grad.mul_(3)
    parts["norm"]()
    assert ours.optimizer.stats()["grad_norm"] == pytest.approx(3 * norm)


def test_nothing_stays_wrapped_when_an_update_fails():
    before = ops.global_norm
    _, ours = build("ours-torch", "fp32")
    ours.optimizer.perturb()
    with pytest.raises(RuntimeError, match="already perturbed"):
        passes_of(ours.optimizer, ours.update)
    assert ops.global_norm is before


@pytest.mark.parametrize("what", HOST_PASSES)
def test_host_variants_move_gradients_or_do_not(what):
    problem = Problem(SHAPES, "fp32", CPU)
    use_backend("torch")
    part = host_parts(problem, "torch")[what]
    held = [c.cell_contents for c in part.prepare.__closure__] if what == "host-moved" else [part.run.__self__]
    ours = next(one for one in held if isinstance(one, Ours))
    assert ours.optimizer.static_gradients is (what == "host-static")
    seen = []
    for _ in range(3):
        part()
        seen.append([p.grad.data_ptr() for p in ours.parameters])
    assert (seen[0] != seen[1]) is (what == "host-moved") and seen[0] == seen[2]


def test_eight_bit_is_eight_bit():
    _, ours = build("ours-torch", "8bit")
    large = ours.optimizer.state[ours.parameters[0]]
    assert large["exp_avg"].dtype == torch.uint8 and ours.optimizer.stochastic_rounding
    assert "master" not in large
    ours.parts()["step"]()


def test_a_missing_package_is_named():
    import importlib.util

    for name, package in (("torchao", "torchao"), ("optimi", "torch-optimi"), ("bitsandbytes", "bitsandbytes")):
        reason = why_missing(name, CPU, "fp32")
        module = "optimi" if name == "optimi" else package
        found = importlib.util.find_spec(module) is not None
        assert reason is None if found else reason == f"not installed (pip install {package})"
