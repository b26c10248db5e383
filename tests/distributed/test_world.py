"""Sums over two real processes, against the same sums in one."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from builders.ranks import computed

from rsaft_fast.distributed import World


def work(rank):
    world = World(rank, 2)
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in SHAPES]
    for index, parameter in enumerate(parameters):
        # The third has a gradient on rank 1 alone, the last on none.
        if index < 2 or (index == 2 and rank == 1):
            parameter.grad = torch.full_like(parameter, rank + index + 1.0)
    addresses = [p.grad.data_ptr() if p.grad is not None else None for p in parameters]
    sent = []
    with mock.patch.object(
        dist, "all_reduce", lambda tensor, *a, **o: sent.append(tensor.nbytes) or REDUCE(tensor, *a, **o)
    ):
        world.sum_gradients(parameters)
    stayed = all(p.grad.data_ptr() == at for p, at in zip(parameters, addresses) if at is not None)
    total = world.sum(torch.tensor([1.5, rank], dtype=torch.float64))
    named = world.sum_named({"both": torch.tensor(rank + 1.0)} | ({"second": torch.tensor(5.0)} if rank else {}))
    told = world.largest(7 * rank), world.of_first(f"rank {rank}"), world.gathered(rank)
    return world.rank, world.size, list(world.share(3)), [p.grad for p in parameters], stayed, total, named, told, sent


REDUCE = dist.all_reduce
SHAPES = ((3, torch.float32), (5, torch.bfloat16), (2, torch.float32), (4, torch.float32))


def test_two_ranks_have_the_sums_of_both(tmp_path):
    for rank, (own, size, share, gradients, stayed, total, named, told, sent) in enumerate(computed(2, tmp_path, work)):
        assert (own, size, share) == (rank, 2, [0] if rank == 0 else [1, 2])
        assert named == {"both": 3.0, "second": 5.0} and told == (7, "rank 0", [0, 1])
        # Four numbers that say who has a gradient, and the gradients that anybody has: 5 floats, 5 bfloat16.
        assert sent == [4 * 4, 5 * 4, 5 * 2]
        assert stayed, "gradients are summed in place"
        assert [g if g is None else g.tolist() for g in gradients] == [[3.0] * 3, [5.0] * 5, [4.0] * 2, None]
        assert total.tolist() == [3.0, 1.0]


def test_one_process_is_a_world_of_its_own():
    world = World()
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    world.sum_gradients([parameter])
    values = torch.ones(3)
    assert world.sum(values) is values and parameter.grad.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"(?s)2.*2"):
        World(rank=2, size=2)
