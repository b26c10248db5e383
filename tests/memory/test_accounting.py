"""Bytes that autograd keeps, against counts done by hand."""

from __future__ import annotations

import torch

from rsaft_fast.memory import saved_tensor_bytes


def test_a_product_keeps_its_two_factors():
    a, b = (torch.randn(10, 3, requires_grad=True) for _ in range(2))
    with saved_tensor_bytes() as saved:
        out = a * b
    assert saved.alive == saved.peak == saved.total == 2 * 10 * 3 * 4
    out.sum().backward()
    assert saved.alive == 0 and saved.peak == 240


def test_a_storage_counts_once_and_with_its_whole_size():
    a = torch.randn(100, requires_grad=True, dtype=torch.float64)
    with saved_tensor_bytes() as saved:
        out = (a * a).sum() + (a[:10] * a[5:15]).sum() + a.view(10, 10).t().exp().sum()
    # The leaf once, and the result of exp.
    assert saved.alive == 2 * 800
    del out
    assert saved.alive == 0


def test_ignored_storages_do_not_count():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(5, 8, requires_grad=True)
    with saved_tensor_bytes(layer.parameters()) as saved:
        layer(x)
    assert saved.peak == 5 * 8 * 4
    with saved_tensor_bytes() as saved:
        layer(x)
    assert saved.peak == 5 * 8 * 4 + 8 * 8 * 4


def test_peak_is_what_lives_together_and_total_is_everything():
    with saved_tensor_bytes() as saved:
        for _ in range(4):
            x = torch.randn(25, requires_grad=True)
            x.exp().sum().backward()
    assert saved.peak == 100 and saved.total == 400 and saved.alive == 0
    with saved_tensor_bytes() as chain:
        x = torch.randn(25, requires_grad=True)
        for _ in range(4):
            x = x.exp()
    assert chain.peak == chain.alive == 400
    del x
    assert chain.alive == 0


def test_nothing_is_kept_without_grad_and_nothing_counted_outside():
    x = torch.randn(10, requires_grad=True)
    with saved_tensor_bytes() as saved, torch.no_grad():
        x.exp()
    out = x.exp()
    assert saved.total == 0
    out.sum().backward()


def test_gradients_are_untouched():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def counted(x):
        with saved_tensor_bytes():
            return (x.sin() * x.exp()).tanh()

    assert torch.autograd.gradcheck(counted, x)
    assert torch.autograd.gradgradcheck(counted, x)
