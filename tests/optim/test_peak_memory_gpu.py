"""The peaks of test_peak_memory.py as CUDA's allocator sees them, where a layer is small beside the model."""

import gc

import pytest
import torch

from rsaft_fast.optim import SAMAdamW

pytestmark = pytest.mark.gpu
LAYERS, WIDTH = 48, 2048
N = LAYERS * WIDTH * WIDTH
EIGHT = dict(state_bits=8, stochastic_rounding=True)
ONE_LAYER = 2 / LAYERS


@pytest.fixture(autouse=True)
def cublas_workspace():
    """What cuBLAS keeps from a thread's first product on, 32 MiB on an H100, is no part of any peak."""
    layer = torch.nn.Linear(WIDTH, WIDTH, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().square().mean().backward()


def peak(sharp=True, **options) -> float:
    """Bytes a parameter allocated at the peak of the second step."""
    gc.collect()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    layers = (torch.nn.Linear(WIDTH, WIDTH, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS))
    model = torch.nn.Sequential(*layers)
    opt = SAMAdamW(model.parameters(), lr=1e-4, rho=0.01, **options)
    x = torch.randn(1, WIDTH, device="cuda", dtype=torch.bfloat16)

    def step():
        opt.zero_grad()
        model(x).float().square().mean().backward()
        if sharp:
            opt.perturb(zero_grad=True)
            model(x).float().square().mean().backward()
        opt.step(plain=not sharp)
        opt.zero_grad()

    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - start) / N


def test_released_a_sam_step_needs_what_adamw_8bit_needs_without_sam():
    plain = peak(sharp=False, **EIGHT)
    assert plain == pytest.approx(2 + 2 + 2 + 8 / 256, abs=0.06)
    assert peak(**EIGHT, release_gradients=True) <= plain + 1.5 * ONE_LAYER
    assert peak(**EIGHT) == pytest.approx(plain + 2, abs=0.06)


def test_with_a_master_sam_needs_nothing_beside_adamw():
    assert peak() == pytest.approx(peak(sharp=False), abs=0.06)


def test_bitsandbytes_needs_no_less():
    bnb = pytest.importorskip("bitsandbytes")
    gc.collect()
    start = torch.cuda.memory_allocated()
    layers = (torch.nn.Linear(WIDTH, WIDTH, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS))
    model = torch.nn.Sequential(*layers)
    opt = bnb.optim.AdamW8bit(model.parameters(), lr=1e-4)
    x = torch.randn(1, WIDTH, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        model(x).float().square().mean().backward()
        opt.step()
        opt.zero_grad()
    theirs = (torch.cuda.max_memory_allocated() - start) / N
    del model, opt
    assert peak(**EIGHT, release_gradients=True) <= theirs + 1.5 * ONE_LAYER
