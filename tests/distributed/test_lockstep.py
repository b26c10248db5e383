"""Ranks that call a sharded network unequally often: nobody waits for ever, and every sum is that of all samples."""

from __future__ import annotations

import random

import pytest
import torch
from builders.ranks import computed
from torch import nn
from torch.nn.functional import mse_loss

from rsaft_fast.algorithms.copies import EMA, Copies, replaced
from rsaft_fast.distributed import World
from rsaft_fast.distributed.lockstep import know_copy
from rsaft_fast.distributed.sharding import own_class, shard_network
from rsaft_fast.distributed.shards import local, whole_on_host

RANKS, WIDTH = 3, 5


class Net(nn.Module):
    """Two blocks and something beside them; shards of odd sizes, some of them empty."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, twice=False):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return (x * self.scale * (2 if twice else 1),)


def network(seed):
    torch.manual_seed(seed)
    return Net().double()


def script(seed):
    """What each rank does until they meet: calls with a gradient or without, at the weights or at a copy."""
    draw = random.Random(seed)
    kinds = ["graded", "plain", "old", "mean", "old graded"]
    return [[draw.choice(kinds) for _ in range(draw.choice([0, 0, 1, 2, 5]))] for _ in range(RANKS)]


def inputs(seed, rank, place):
    generator = torch.Generator().manual_seed(1000 * seed + 10 * rank + place)
    return [torch.randn(2 + place, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]


def act(kind, net, copies, mean, x, y):
    """One entry of a script: its outputs; what it adds to the gradient is that of the squared errors."""
    if kind == "plain" or kind in ("old", "mean"):
        there = {"plain": None, "old": copies.applied("old"), "mean": mean.applied()}
        with torch.no_grad():
            if kind == "plain":
                return net(x)[0]
            with there[kind]:
                return net(x)[0]
    if kind == "old graded":
        with copies.applied("old"):
            loss = mse_loss(net(x)[0], y, reduction="sum")
            loss.backward()
        return loss.detach()
    loss = mse_loss(net(x, twice=True)[0], y, reduction="sum")
    loss.backward()
    return loss.detach()


def prepared(net):
    parameters = dict(net.named_parameters())
    copies, mean = Copies(parameters, ("old",)), EMA(parameters, 0.5)
    with torch.no_grad():  # the weights have moved since
        for p in parameters.values():
            local(p).mul_(1.25)
    mean.update(1)
    return parameters, copies, mean


def of_rank(rank, seed, rounds):
    world, net = World(rank, RANKS), network(seed)
    lockstep = shard_network(net, net.blocks, world, torch.device("cpu"))
    parameters, copies, mean = prepared(net)
    outputs, gradients = [], []
    for number in range(rounds):
        own = script(seed + number)[rank]
        outputs.append([act(kind, net, copies, mean, *inputs(seed, rank, n)) for n, kind in enumerate(own)])
        world.sum_gradients(parameters.values())
        grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        gradients.append(dict(whole_on_host(grads, keep=True)))
        net.zero_grad()
    weights = dict(whole_on_host(parameters, keep=rank == 0))
    return outputs, gradients, lockstep.followed, weights, own_class(net) is Net


def test_calls_of_any_number_are_made_in_step_and_gradients_are_the_sums_of_all(tmp_path):
    seed, rounds = random.randrange(10**6), 6
    print("seed", seed)
    found = computed(RANKS, tmp_path, of_rank, seed, rounds)
    net = network(seed)
    parameters, copies, mean = prepared(net)
    for number in range(rounds):
        net.zero_grad()
        for rank, own in enumerate(script(seed + number)):
            for place, kind in enumerate(own):
                wanted = act(kind, net, copies, mean, *inputs(seed, rank, place))
                torch.testing.assert_close(found[rank][0][number][place], wanted, rtol=1e-12, atol=1e-13)
        sums = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for rank in range(RANKS):
            assert found[rank][1][number].keys() == sums.keys()
            torch.testing.assert_close(found[rank][1][number], sums, rtol=1e-11, atol=1e-13)
    weights = {name: p.detach() for name, p in parameters.items()}
    assert all(torch.equal(found[0][3][name], weights[name]) for name in weights) and not found[1][3]
    counts = [[len(own) for own in script(seed + number)] for number in range(rounds)]
    assert all(one[4] for one in found) and sum(one[2] for one in found) >= sum(max(c) - min(c) for c in counts)


def without_its_backward(rank):
    world, net = World(rank, 2), network(0)
    shard_network(net, net.blocks, world, torch.device("cpu"))
    x, y = inputs(0, rank, 0)
    said = []
    for act in (lambda: net(y), lambda: world.sum(torch.ones(1))):
        kept = net(x)[0]
        try:
            act()
        except RuntimeError as error:
            said.append(str(error))
        del kept
    net(x)[0].sum().backward()
    world.sum_gradients(net.parameters())
    return said


def test_a_graph_that_is_not_walked_back_is_an_error_and_no_hang(tmp_path):
    for said in computed(2, tmp_path, without_its_backward):
        assert len(said) == 2 and all("backward" in line and "no_grad" in line for line in said)


def test_values_that_nobody_knows_do_not_come_in_the_place_of_shards(tmp_path):
    def unknown(rank):
        world, net = World(rank, 2), network(0)
        shard_network(net, net.blocks, world, torch.device("cpu"))
        parameters = dict(net.named_parameters())
        values = {name: local(p).detach().clone() for name, p in parameters.items()}
        with pytest.raises(RuntimeError, match="know_copy"), replaced(parameters, values):
            pass
        know_copy(parameters, values)
        with replaced(parameters, values):
            return True

    assert computed(2, tmp_path, unknown) == [True, True]
