"""Two ranks through gloo: the norm of sharded parameters, skipping together, and the warning of silent workers."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from builders.workers import COUNT, run_workers

from optim.networks import batches, loss_of, network
from rsaft_fast.optim import SAM, SAMAdamW

pytestmark = pytest.mark.slow  # two workers

RHO, CLIP, STEPS = 0.3, 0.05, 3

MAKERS = {
    "SAM": lambda params, **o: SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, **o),
    "SAM fused": lambda params, **o: SAM(params, torch.optim.AdamW, lr=0.01, fused=True, **o),
    "SAMAdamW": lambda params, **o: SAMAdamW(params, lr=0.01, **o),
}


class Sharded:
    """A network whose flat parameters are dealt out: this rank's optimizer sees its own part of each."""

    def __init__(self, rank: int, dtype: torch.dtype):
        self.model, self.rank = network(dtype), rank
        self.shards = [torch.nn.Parameter(self.own(p).clone()) for p in self.model.parameters()]

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(-1).tensor_split(COUNT)[self.rank]

    def gather(self) -> None:
        for p, shard in zip(self.model.parameters(), self.shards):
            whole = torch.zeros_like(p.detach())
            self.own(whole).copy_(shard.detach())
            dist.all_reduce(whole)  # gloo's all_gather wants equal parts
            p.data.copy_(whole)

    def backward(self, batch) -> None:
        self.model.zero_grad()
        loss_of(self.model, batch).backward()
        for p, shard in zip(self.model.parameters(), self.shards):
            shard.grad = self.own(p.grad).clone()


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()


def sharded_training(rank, adaptive):
    sharded = Sharded(rank, torch.float64)
    options = dict(rho=RHO, adaptive=adaptive, max_grad_norm=CLIP, process_group=dist.group.WORLD)
    opt = SAMAdamW(sharded.shards, lr=0.01, **options)
    eps = None
    for batch in batches(STEPS, torch.float64):
        sharded.backward(batch)
        before = flat(sharded.shards)
        opt.perturb()
        eps = flat(sharded.shards) - before if eps is None else eps
        sharded.gather()
        sharded.backward(batch)
        opt.step()
        sharded.gather()
    return {"eps": eps, "weights": flat(sharded.model.parameters()), "stats": opt.stats()}


def a_bad_first_pass_on_rank_1(rank, make, **options):
    """A good step; a step whose first pass is bad on rank 1; a good step. The second pass's gradient is averaged."""
    model = network()
    opt = make(model.parameters(), rho=RHO, **options)
    seen = {"weights": [flat(model.parameters())], "perturbed": []}
    for number, (x, y) in enumerate(batches(3)):
        own = (x.chunk(COUNT)[rank], y.chunk(COUNT)[rank])
        opt.zero_grad()
        loss_of(model, own).backward()
        if number == 1 and rank == 1:
            model[0].bias.grad[3] = math.inf
        opt.perturb(zero_grad=True)
        seen["perturbed"].append(flat(model.parameters()))
        loss_of(model, own).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= COUNT
        opt.step()
        seen["weights"].append(flat(model.parameters()))
    return {**seen, "skipped": int(opt.skipped)}


def warnings_of_a_first_perturb(**options):
    model = network()
    opt = SAMAdamW(model.parameters(), **options)
    loss_of(model, batches(1)[0]).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.perturb()
    opt.restore()
    return [(str(w.message), w.filename) for w in caught]


def scenarios(rank):
    world = dist.group.WORLD
    bad = a_bad_first_pass_on_rank_1
    return {
        "sharded": {adaptive: sharded_training(rank, adaptive) for adaptive in (False, True)},
        "replicas": {name: bad(rank, make, replicas=world) for name, make in MAKERS.items()},
        "sharded and bad": bad(rank, MAKERS["SAMAdamW"], process_group=world),
        "each its own": bad(rank, MAKERS["SAMAdamW"], replicas=False),
        "warnings": {
            "none given": warnings_of_a_first_perturb(),
            "replicas": warnings_of_a_first_perturb(replicas=world),
            "replicas=False": warnings_of_a_first_perturb(replicas=False),
            "process_group": warnings_of_a_first_perturb(process_group=world),
        },
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_workers(scenarios, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("adaptive", [False, True])
def test_shards_train_as_the_whole(ranks, adaptive):
    """Perturbation and clipping follow the norm of all shards: one process with whole parameters does the same."""
    whole = network(torch.float64)
    opt = SAMAdamW(whole.parameters(), lr=0.01, rho=RHO, adaptive=adaptive, max_grad_norm=CLIP)
    first_eps = None
    for batch in batches(STEPS, torch.float64):
        opt.zero_grad()
        loss_of(whole, batch).backward()
        if first_eps is None:
            grads = [p.grad for p in whole.parameters()]
            w = [p.detach() for p in whole.parameters()]
            norm = flat([p * g if adaptive else g for p, g in zip(w, grads)]).norm()
            first_eps = [RHO * (p**2 * g if adaptive else g) / norm for p, g in zip(w, grads)]
        with opt.perturbed(zero_grad=True):
            loss_of(whole, batch).backward()
            opt.step()
    for number, rank in enumerate(ranks):
        seen = rank["sharded"][adaptive]
        own = flat([e.reshape(-1).tensor_split(COUNT)[number] for e in first_eps])
        torch.testing.assert_close(seen["eps"], own, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(seen["weights"], flat(whole.parameters()), rtol=1e-9, atol=1e-12)
        for name in ("grad_norm", "second_grad_norm"):
            assert seen["stats"][name] == pytest.approx(opt.stats()[name], rel=1e-9)


@pytest.mark.parametrize("make", MAKERS)
def test_replicas_skip_a_bad_first_pass_together(ranks, make):
    first, second = (rank["replicas"][make] for rank in ranks)
    for seen in (first, second):
        assert torch.equal(seen["perturbed"][1], seen["weights"][1])  # not moved, on the good rank either
        assert torch.equal(seen["weights"][2], seen["weights"][1])  # and not updated
        assert seen["skipped"] == 1
        assert not torch.equal(seen["weights"][3], seen["weights"][2])  # and on it goes
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"]))


def test_replicas_perturb_by_their_own_gradients(ranks):
    first, second = (rank["replicas"]["SAMAdamW"] for rank in ranks)
    for number in (0, 2):
        assert not torch.equal(first["perturbed"][number], second["perturbed"][number])
        for seen in (first, second):
            eps = (seen["perturbed"][number].double() - seen["weights"][number].double()).norm()
            assert eps.item() == pytest.approx(RHO, rel=1e-5)


def test_shards_skip_together_because_they_share_the_norm(ranks):
    for rank in ranks:
        seen = rank["sharded and bad"]
        assert torch.equal(seen["perturbed"][1], seen["weights"][1]) and seen["skipped"] == 1


def test_workers_that_know_of_no_other_part(ranks):
    """What the warning warns of."""
    first, second = (rank["each its own"] for rank in ranks)
    assert (first["skipped"], second["skipped"]) == (0, 1)
    assert torch.equal(first["weights"][1], second["weights"][1])
    assert not torch.equal(first["weights"][2], second["weights"][2])


def test_silent_workers_are_warned_of(ranks):
    for rank in ranks:
        [(message, filename)] = rank["warnings"]["none given"]
        assert "2 workers" in message
        assert all(
            mend in message for mend in ("replicas=torch.distributed.group.WORLD", "process_group", "replicas=False")
        )
        assert filename == __file__  # where perturb() was called
        assert [rank["warnings"][given] for given in ("replicas", "replicas=False", "process_group")] == [[], [], []]
