"""FSDP2's shards through gloo: every rank's optimizer against one that has the whole network."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from builders.ranks import computed
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rsaft_fast.optim import SAM, SAMAdamW

RHO, RANKS, STEPS = 0.2, 2, 50
WIDTH = 7  # odd: shards differ in size, and those of `scale` (1 element) and of rows fewer than ranks are empty


class Net(nn.Module):
    """Odd sizes, a parameter that one rank alone holds, and one that has no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.scale, self.unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale


def network(dtype=torch.float64):
    torch.manual_seed(3)
    return Net().to(dtype)


def data(steps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(8, 5, generator=generator, dtype=dtype), torch.randn(8, 3, generator=generator, dtype=dtype))
        for _ in range(steps)
    ]


def groups(model, **second):
    """Two, of which the second has keys of its own."""
    return [
        {"params": [*model.first.parameters(), model.unused]},
        {"params": [*model.second.parameters(), model.scale], **second},
    ]


MAKERS = {
    "SAMAdamW": lambda model, **o: SAMAdamW(groups(model), lr=0.01, rho=RHO, max_grad_norm=0.3, **o),
    "SAM": lambda model, **o: SAM(groups(model), torch.optim.AdamW, lr=0.01, rho=RHO, **o),
    "ASAM": lambda model, **o: SAMAdamW(groups(model), lr=0.01, rho=RHO, adaptive=True, max_grad_norm=0.3, **o),
    "rho a group": lambda model, **o: SAMAdamW(groups(model, rho=0.02), lr=0.01, rho=RHO, **o),
}


def train(model, optimizer, batches, rank=0, ranks=1, spoil=None, after=lambda: None):
    """SAM on the joint batch, of which each rank has its part; `spoil(step)` may change the first pass's gradients."""
    for step, (x, y) in enumerate(batches):
        own = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
        optimizer.zero_grad()
        (model(x[own]) - y[own]).square().mean().backward()
        if spoil is not None:
            spoil(step)
        with optimizer.perturbed(zero_grad=True):
            (model(x[own]) - y[own]).square().mean().backward()
            optimizer.step()
        after()
    return model


def sharded(model):
    fully_shard(model.first)
    fully_shard(model.second)
    return fully_shard(model)


def whole(model):
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


def bits(model):
    return [p.to_local().detach().clone() for p in model.parameters()]


class Count:
    """The elements that each call of all_reduce sends."""

    def __enter__(self):
        self.sent, self.original = [], dist.all_reduce

        def counted(tensor, *args, **options):
            self.sent.append(tensor.numel())
            return self.original(tensor, *args, **options)

        dist.all_reduce = torch.distributed.all_reduce = counted
        return self

    def __exit__(self, *exc):
        dist.all_reduce = torch.distributed.all_reduce = self.original


def equivalence(rank, folder):
    seen = {}
    for name, make in MAKERS.items():
        model = sharded(network())
        optimizer = make(model)
        with Count() as count:
            train(model, optimizer, data(STEPS), rank, RANKS)
        seen[name] = {"weights": whole(model), "sent": count.sent, "stats": optimizer.stats()}
    seen["sizes"] = [len(p.to_local()) for p in model.parameters()]
    return seen


def trouble(rank, folder):
    """A non-finite gradient on one rank alone; an exception on one rank alone, between the passes."""
    model = sharded(network())
    optimizer = MAKERS["SAMAdamW"](model)

    def spoil(step):
        if step == 1 and rank == 1:
            model.first.weight.grad.to_local()[0, 0] = math.inf

    steps = []
    train(model, optimizer, data(3), rank, RANKS, spoil, lambda: steps.append(bits(model)))
    seen = {"skipped": int(optimizer.skipped), "stayed": all(map(torch.equal, steps[0], steps[1]))}
    seen["went on"] = not all(map(torch.equal, steps[1], steps[2]))
    x, y = data(1)[0]
    (model(x) - y).square().mean().backward()
    before = bits(model)
    try:
        with optimizer.perturbed():
            seen["moved"] = not all(map(torch.equal, before, bits(model)))
            if rank == 1:
                raise ZeroDivisionError
    except ZeroDivisionError:
        seen["raised"] = True
    seen["restored"] = all(map(torch.equal, before, bits(model)))
    return seen


KINDS = {
    "master": (torch.bfloat16, {}),
    "8 bits": (torch.float32, {"state_bits": 8, "min_8bit_size": 0}),
    "stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
}


def kinds(rank, folder):
    """State and masters are of the shard; a checkpoint comes back to the bit on as many ranks."""
    seen = {}
    for name, (dtype, options) in KINDS.items():
        batches = data(6, dtype)
        ends = []
        for way in ("unbroken", "resumed"):
            model = sharded(network(dtype))
            optimizer = SAMAdamW(model.parameters(), lr=0.01, rho=RHO, **options)
            train(model, optimizer, batches[:3], rank, RANKS)
            if way == "resumed":
                path = f"{folder}/{name}"
                saved = {
                    "model": dict(model.named_parameters()),
                    "optimizer": get_optimizer_state_dict(model, optimizer),
                }
                dcp.save(saved, checkpoint_id=path)
                model = sharded(network(dtype))
                optimizer = SAMAdamW(model.parameters(), lr=0.01, rho=RHO, **options)
                optimizer.allocate_state()
                target = {
                    "model": dict(model.named_parameters()),
                    "optimizer": get_optimizer_state_dict(model, optimizer),
                }
                dcp.load(target, checkpoint_id=path)
                set_optimizer_state_dict(model, optimizer, target["optimizer"])
            for batch in batches[3:]:
                train(model, optimizer, [batch], rank, RANKS)
            ends.append(bits(model))
        state = optimizer.state[model.first.weight]
        seen[name] = {
            "apart": float(sum((a - b).double().square().sum() for a, b in zip(*ends)) ** 0.5),
            "local": {key: (tuple(value.shape), value.dtype) for key, value in state.items()},
            "shard": tuple(model.first.weight.to_local().shape),
            "saved": all(
                isinstance(value, DTensor) and value.dtype != torch.uint8
                for entry in optimizer.state_dict()["state"].values()
                for key, value in entry.items()
                if key != "step"
            ),
        }
    return seen


def of_a_single_process(rank, folder):
    """A checkpoint of whole tensors loads into shards."""
    saved = torch.load(f"{folder}/single.pt", weights_only=False)
    model = network()
    model.load_state_dict(saved["model"])
    model = sharded(model)
    optimizer = MAKERS["SAMAdamW"](model)
    optimizer.load_state_dict(saved["optimizer"])
    return whole(train(model, optimizer, data(STEPS)[3:6], rank, RANKS))


def refusals(rank, folder):
    model = network()
    fully_shard(model.first)
    optimizer = SAMAdamW(model.parameters(), lr=0.01)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    try:
        optimizer.perturb()
    except ValueError as error:
        return str(error)


def scenarios(rank, folder):
    found = (equivalence, trouble, kinds, of_a_single_process, refusals)
    return {scenario.__name__: scenario(rank, folder) for scenario in found}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    model = network()
    optimizer = MAKERS["SAMAdamW"](model)
    train(model, optimizer, data(STEPS)[:3])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "single.pt")
    return computed(RANKS, folder, scenarios, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_shards_train_as_the_whole_network(ranks, name):
    model = network()
    optimizer = MAKERS[name](model)
    train(model, optimizer, data(STEPS))
    for seen in (rank["equivalence"][name] for rank in ranks):
        for key, weight in model.named_parameters():
            torch.testing.assert_close(seen["weights"][key], weight.detach(), rtol=1e-9, atol=1e-12)
        for figure in ("grad_norm", "second_grad_norm"):
            assert seen["stats"][figure] == pytest.approx(optimizer.stats()[figure], rel=1e-9)


@pytest.mark.slow
def test_a_pass_sends_one_number_and_an_empty_shard_takes_part(ranks):
    assert 0 in ranks[1]["equivalence"]["sizes"] and 0 not in ranks[0]["equivalence"]["sizes"]
    for rank in ranks:
        assert rank["equivalence"]["SAMAdamW"]["sent"] == [1] * (2 * STEPS)


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(ranks):
    for seen in (rank["trouble"] for rank in ranks):
        assert seen["skipped"] == 1 and seen["stayed"] and seen["went on"]


@pytest.mark.slow
def test_an_exception_on_one_rank_restores_to_the_bit_on_all(ranks):
    assert [rank["trouble"].get("raised") for rank in ranks] == [None, True]
    assert all(rank["trouble"]["moved"] and rank["trouble"]["restored"] for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_of_the_shard_and_resumes_to_the_bit(ranks, kind):
    for seen in (rank["kinds"][kind] for rank in ranks):
        assert seen["saved"]
        # 8 bits are rounded once more, in blocks that may be others.
        assert seen["apart"] <= (1e-3 if kind == "8 bits" else 0)
        shape, dtype = seen["local"]["exp_avg"]
        assert shape == seen["shard"] and dtype == (torch.uint8 if kind == "8 bits" else torch.float32)
        assert ("master" in seen["local"]) == (kind == "master")


@pytest.mark.slow
def test_a_checkpoint_of_one_process_loads_into_shards(ranks):
    model = network()
    train(model, MAKERS["SAMAdamW"](model), data(STEPS)[:6])
    for seen in (rank["of_a_single_process"] for rank in ranks):
        for key, weight in model.named_parameters():
            torch.testing.assert_close(seen[key], weight.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_network_sharded_in_part_is_refused(ranks):
    assert all("fully_shard the root" in rank["refusals"] for rank in ranks)
