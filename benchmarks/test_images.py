"""The image perturbation: ours on each backend beside eager torch."""

from __future__ import annotations

import pytest
import torch
from providers import DTYPES
from timing import extra_bytes, launches

from rsaft_fast import ops
from rsaft_fast.ops import backends

SIZES = {"cuda": [(32, 1024), (4, 512)], "cpu": [(2, 128)]}
SIZES_HERE = SIZES["cuda" if torch.cuda.is_available() else "cpu"]


def eager(images: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True, dtype=torch.float32)
    return images - (0.01 / (norm + 1e-12)).to(images.dtype) * gradient


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("batch, side", SIZES_HERE)
@pytest.mark.parametrize("provider", ["ours-cuda", "ours-triton", "ours-torch", "eager"])
def test_perturb_images(benchmark, record, timer, device, monkeypatch, provider, batch, side, dtype):
    kind = DTYPES[dtype]
    images = torch.rand(batch, 3, side, side, device=device).to(kind)
    gradient = torch.randn_like(images)
    if provider == "eager":
        part = lambda: eager(images, gradient)  # noqa: E731
    else:
        backend = provider.removeprefix("ours-")
        if reason := backends.why_not(backend, device, (kind,)):
            pytest.skip(reason)
        monkeypatch.setenv(backends.ENV, backend)
        part = lambda: ops.perturb_images(images, gradient, 0.01)  # noqa: E731
    times = timer(part)
    row = {"what": "perturb_images", "case": f"{batch}x3x{side}x{side}", "dtype": dtype, "provider": provider}
    row |= {f"ms_{name}": value for name, value in times.items()}
    row |= {"launches": launches(part, device), "extra_bytes": extra_bytes(part, device)}
    # The gradient is read twice: for its norm, and for the sum.
    benchmark.extra_info.update(record(row, 4 * images.element_size() * images.numel()))
    benchmark.pedantic(part, rounds=5, iterations=1, warmup_rounds=1)
