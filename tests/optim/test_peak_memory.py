"""What a whole step keeps at its peak, counted storage by storage, with the kernels' own code on host memory."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rsaft_fast.ops import library
from rsaft_fast.optim import SAMAdamW

LAYERS, WIDTH = 24, 128
LAYER = WIDTH * WIDTH
N = LAYERS * LAYER


class LiveBytes(TorchDispatchMode):
    """Sums the storages that operations have made and that are still alive."""

    def __init__(self, held):
        super().__init__()
        self.live, self.peak = {}, 0
        self._see(held)

    def _see(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self._see(t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


@pytest.fixture(autouse=True)
def kernels_on_the_host(host_library, monkeypatch, request):
    """The torch path makes float32 copies that no kernel makes."""
    monkeypatch.setenv(library.ENV, str(host_library))
    monkeypatch.setenv("RSAFT_BACKEND", "cuda")
    library.forget()
    request.addfinalizer(library.forget)


def peak(dtype=torch.bfloat16, sharp=True, **options) -> float:
    """Bytes a parameter at the peak of a step: weights, gradients, state, and the activations of one sample."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).to(dtype)
    opt = SAMAdamW(model.parameters(), lr=1e-4, rho=0.01, **options)
    x = torch.randn(1, WIDTH, dtype=dtype)

    def step():
        opt.zero_grad()
        model(x).float().square().mean().backward()
        if sharp:
            opt.perturb(zero_grad=True)
            model(x).float().square().mean().backward()
        opt.step(plain=not sharp)

    step()
    opt.zero_grad()
    held = [*model.parameters(), *(t for state in opt.state.values() for t in state.values())]
    held += [t for bucket in opt._buckets for name in ("backup",) if name in bucket.table for t in bucket.table[name]]
    with LiveBytes(held) as seen:
        step()
    return seen.peak / N


EIGHT = dict(state_bits=8, stochastic_rounding=True)
ONE_LAYER = 2 / LAYERS  # a bf16 gradient


def test_released_a_sam_step_needs_what_adamw_8bit_needs_without_sam():
    without_sam = 2 + 2 + 2 + 8 / 256  # weight, gradient, codes and their absmax
    assert peak(**EIGHT, release_gradients=True) <= without_sam + 2 * ONE_LAYER
    assert peak(**EIGHT, sharp=False) == pytest.approx(without_sam, abs=2 * ONE_LAYER)
    # And this is what it saves: backup, or the second gradients beside it.
    assert peak(**EIGHT) == pytest.approx(without_sam + 2, abs=2 * ONE_LAYER)
    assert peak(**EIGHT, backup="gradient") == pytest.approx(without_sam + 2, abs=2 * ONE_LAYER)


def test_with_a_master_sam_needs_nothing_beside_adamw():
    assert peak() == pytest.approx(peak(sharp=False), abs=2 * ONE_LAYER)
    assert peak(sharp=False) == pytest.approx(2 + 2 + 12, abs=2 * ONE_LAYER)


def test_in_float32_sam_needs_one_copy_or_none():
    plain = peak(torch.float32, sharp=False)
    assert peak(torch.float32) == pytest.approx(plain + 4, abs=4 * ONE_LAYER)
    assert peak(torch.float32, release_gradients=True) == pytest.approx(plain, abs=4 * ONE_LAYER)
