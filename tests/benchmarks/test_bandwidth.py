"""What is copied to know a card's bandwidth: so much that the cache's share of it does not count."""

import pytest
import torch

from rsaft_fast.benchmarks.bandwidth import bytes_copied


@pytest.mark.parametrize(
    ("free", "copied"), [(79 << 30, 4 << 30), (16 << 30, 4 << 30), (8 << 30, 2 << 30), ((3 << 30) + 5, 768 << 20)]
)
def test_a_copy_is_large_beside_the_cache_and_fits(monkeypatch, free, copied):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    assert bytes_copied(torch.device("cuda")) == copied
    assert copied % (1 << 16) == 0, "rows of 2^14 floats"


def test_the_cpu_copies_little():
    assert bytes_copied(torch.device("cpu")) == 1 << 26
