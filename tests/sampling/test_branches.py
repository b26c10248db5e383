"""Rows of conditioning whose texts have lengths of their own."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from rsaft_fast.sampling.branches import LENGTHS, join_rows, pick_rows, placed
from rsaft_fast.sampling.protocol import Conditioning


def row(length, seed, width=3):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, length, width, generator=generator)
    return {"text": text, "pooled": text.mean(1), LENGTHS: torch.tensor([length])}


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_rows_come_back_as_they_went_in(lengths, seed):
    rows = [row(length, seed + i) for i, length in enumerate(lengths)]
    joined = join_rows(rows)
    assert joined["text"].shape == (len(lengths), max(lengths), 3) and joined[LENGTHS].tolist() == lengths
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    batch = Conditioning(joined, join_rows(rows[::-1]), 2.0).select(order)
    for place, index in enumerate(order):
        alone = pick_rows(batch.positive, [place])
        assert all(torch.equal(alone[name], rows[index][name]) for name in rows[index])
        assert not batch.positive["text"][place, lengths[index] :].any(), "behind its end there are zeros"
    assert batch.negative is not None and batch.negative[LENGTHS].tolist() == [lengths[::-1][i] for i in order]
    assert all(torch.equal(pick_rows(joined, slice(0, 1))[name], rows[0][name]) for name in rows[0])


def test_lengths_stay_on_the_host_and_whole():
    moved = placed(row(4, 0), torch.device("meta"), torch.bfloat16)
    assert moved[LENGTHS].device.type == "cpu" and moved[LENGTHS].dtype == torch.int64
    assert moved["text"].device.type == "meta" and moved["pooled"].dtype == torch.bfloat16
