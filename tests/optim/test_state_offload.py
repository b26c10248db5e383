"""State in host memory: the same bits in every combination, few buffers, the same checkpoints."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from builders.messages import says
from hypothesis import given
from hypothesis import strategies as st

from optim.networks import batches, bits, loss_of, train
from rsaft_fast.ops.transfer import CopyStream, Packing
from rsaft_fast.optim import SAMAdamW, offload

BF16 = torch.bfloat16
PART = 3000
"""Bytes a part in these tests: the network below then has four or more in every combination."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(offload, "PART", PART)


class Traffic:
    """Copies to and from the device, and the staging buffers that are alive."""

    def __init__(self):
        self.inward, self.outward, self.most = 0, 0, 0
        self._storages: list[weakref.ref] = []

    @property
    def alive(self) -> int:
        gc.collect()
        return self._count()

    def _count(self) -> int:
        return len({ref()._cdata for ref in self._storages if ref() is not None})

    def watch(self, monkeypatch) -> None:
        begin, copied = offload.Staging.begin, CopyStream.copy

        def begun(staging, part):
            self._inward = staging._inward
            begin(staging, part)
            self._storages.append(weakref.ref(part.slot.buffer.untyped_storage()))
            self.most = max(self.most, self._count())

        def copy(stream, target, source, after=()):
            if stream is self._inward:
                self.inward += source.numel()
            else:
                self.outward += source.numel()
            return copied(stream, target, source, after)

        monkeypatch.setattr(offload.Staging, "begin", begun)
        monkeypatch.setattr(CopyStream, "copy", copy)


@pytest.fixture
def traffic(monkeypatch) -> Traffic:
    seen = Traffic()
    seen.watch(monkeypatch)
    return seen


def layers(dtype=torch.float32, seed=0, device="cpu") -> torch.nn.Sequential:
    torch.manual_seed(seed)
    made = [torch.nn.Linear(5, 37), torch.nn.Tanh(), torch.nn.Linear(37, 41), torch.nn.LayerNorm(41)]
    made += [torch.nn.Linear(41, 23), torch.nn.Tanh(), torch.nn.Linear(23, 3)]
    return torch.nn.Sequential(*made).to(device, dtype)


EIGHT = dict(state_bits=8, min_8bit_size=300)
STOCHASTIC = dict(master_weights=False, stochastic_rounding=True)
CASES = {
    "float32": (torch.float32, {}),
    "float32, 8 bits, in gradients": (torch.float32, EIGHT | dict(backup="gradient")),
    "float32, adaptive, clipped": (torch.float32, dict(adaptive=True, max_grad_norm=0.05)),
    "float32, static": (torch.float32, dict(static_gradients=True)),
    "float32, released": (torch.float32, dict(release_gradients=True)),
    "float64": (torch.float64, {}),
    "master": (BF16, {}),
    "master, 8 bits, clipped": (BF16, EIGHT | dict(max_grad_norm=0.05)),
    "master, released": (BF16, dict(release_gradients=True)),
    "stochastic": (BF16, STOCHASTIC),
    "stochastic, 8 bits": (BF16, EIGHT | STOCHASTIC),
    "stochastic, 8 bits, in gradients": (BF16, EIGHT | STOCHASTIC | dict(backup="gradient")),
    "stochastic, 8 bits, released": (BF16, EIGHT | STOCHASTIC | dict(release_gradients=True)),
}


def groups(model) -> list[dict]:
    """Two radii, two rates; a bucket mixes both groups."""
    params = list(model.parameters())
    return [{"params": params[:3], "rho": 0.2, "lr": 3e-3}, {"params": params[3:]}]


def trained(case: str, where: str, steps: int = 4, device="cpu"):
    dtype, options = CASES[case]
    model = layers(dtype, device=device)
    opt = SAMAdamW(groups(model), lr=1e-2, rho=0.1, offload=where, **options)
    seen = []
    data = batches(steps, dtype, device=device)
    train(model, opt, data, each=lambda: seen.append(opt.stats()))
    return model, opt, seen


def state_bits_of(opt) -> dict:
    return {
        (index, name): value.cpu().reshape(-1).view(torch.uint8)
        for index, state in opt.state_dict()["state"].items()
        for name, value in state.items()
    }


def equal_states(one, other) -> bool:
    ours, theirs = state_bits_of(one), state_bits_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def same_numbers(one: list[dict], other: list[dict]) -> bool:
    return repr(one) == repr(other)  # NaN included


@pytest.mark.filterwarnings("ignore:.*without a float32 master")
@pytest.mark.parametrize("case", CASES)
def test_weights_state_and_figures_have_the_same_bits(case, traffic):
    model, opt, seen = trained(case, "none")
    assert traffic.inward == 0
    other, offloaded, theirs = trained(case, "state")
    assert torch.equal(bits(model), bits(other)) and equal_states(opt, offloaded) and same_numbers(seen, theirs)
    parts = [part for bucket in offloaded._buckets for part in bucket.parts]
    whole = sum(part.packing.nbytes for part in parts)
    assert len(parts) > 3 and traffic.outward == 4 * whole
    # Perturbing reads what has a master once more; an adaptive or a plain step nothing else.
    assert traffic.inward == 4 * (2 * whole if "master" in case else whole)
    assert traffic.most <= 3 and traffic.alive == 0


@pytest.mark.parametrize("case", ["float32", "master, 8 bits, clipped", "stochastic, 8 bits, released"])
def test_every_backend_has_the_same_bits(case, backend):
    model, opt, seen = trained(case, "none", 2, backend)
    other, offloaded, theirs = trained(case, "state", 2, backend)
    assert torch.equal(bits(model), bits(other)) and equal_states(opt, offloaded) and same_numbers(seen, theirs)


def test_plain_steps_and_closures():
    results = []
    for where in ("none", "state"):
        model = layers()
        opt = SAMAdamW(model.parameters(), lr=1e-2, rho=0.1, offload=where)
        data = batches(3)
        train(model, opt, data[:1], sharp=False)

        def closure(model=model, batch=data[1]):
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        opt.step(closure)
        train(model, opt, data[2:])
        results.append(bits(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("case", ["float32", "master", "stochastic, 8 bits, released"])
@pytest.mark.parametrize("how", ["restore", "exception", "non-finite first", "non-finite second"])
def test_nothing_is_lost_where_no_step_is_made(case, how, traffic):
    dtype, options = CASES[case]
    if how == "non-finite second" and "released" in case:
        pytest.skip("released gradients are applied before anybody could know")
    model, opt, _ = trained(case, "state", 2)
    before, state, batch = bits(model), state_bits_of(opt), batches(1, dtype, seed=9)[0]
    opt.zero_grad()
    loss_of(model, batch).backward()
    if how == "restore":
        opt.perturb()
        assert not torch.equal(bits(model), before)
        opt.restore()
    elif how == "exception":
        with pytest.raises(ZeroDivisionError), opt.perturbed(zero_grad=True):
            raise ZeroDivisionError
    else:
        if how == "non-finite first":
            next(model.parameters()).grad[0, 0] = float("nan")
        opt.perturb(zero_grad=True)
        loss_of(model, batch).backward()
        if how == "non-finite second":
            next(model.parameters()).grad[0, 0] = float("inf")
        opt.step()
        assert int(opt.skipped) == 1
    assert torch.equal(bits(model), before) and traffic.alive == 0
    after = state_bits_of(opt)
    assert all(torch.equal(state[key], after[key]) for key in state)
    other, same, _ = trained(case, "none", 2)
    same._restore_skipped({"skipped": int(opt.skipped)})
    train(model, opt, batches(2, dtype, seed=3))
    train(other, same, batches(2, dtype, seed=3))
    assert torch.equal(bits(model), bits(other)) and equal_states(opt, same)


@pytest.mark.parametrize("case", ["float32", "master, 8 bits, clipped", "stochastic, 8 bits, released"])
@pytest.mark.parametrize("ways", [("none", "state"), ("state", "none"), ("state", "state")])
def test_checkpoints_go_both_ways(case, ways):
    dtype, options = CASES[case]
    model, opt, _ = trained(case, ways[0], 3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    plain = trained(case, "none", 3)[1].state_dict()
    looks = [
        {key: (value.shape, value.dtype) for state in tree["state"].values() for key, value in state.items()}
        for tree in (saved[1], plain)
    ]
    assert looks[0] == looks[1]
    rest = batches(3, dtype, seed=4)
    train(model, opt, rest)
    for used in (False, True):  # into a fresh optimizer, and into one with a past
        other = layers(dtype, seed=5)
        second = SAMAdamW(groups(other), lr=1.0, rho=0.7, offload=ways[1], **options)
        if used:
            train(other, second, batches(1, dtype, seed=6))
        other.load_state_dict(saved[0])
        second.load_state_dict(copy.deepcopy(saved[1]))
        train(other, second, rest)
        assert torch.equal(bits(model), bits(other)) and equal_states(opt, second)


def test_copies_and_pickles_go_on_alike():
    model, opt, _ = trained("master", "state", 2)
    for through in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        other, second = through((model, opt))
        assert second.offload == "state"
        train(other, second, batches(2, BF16, seed=3))
        twin, third = copy.deepcopy((model, opt))
        train(twin, third, batches(2, BF16, seed=3))
        assert torch.equal(bits(other), bits(twin))


def test_weights_that_somebody_else_wrote_are_taken_by_the_masters():
    results = []
    for where in ("none", "state"):
        model, opt, _ = trained("master", where, 2)
        with torch.no_grad():
            model[2].weight.mul_(1.5)
        train(model, opt, batches(2, BF16, seed=3))
        results.append(bits(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("case", ["float32", "master"])
def test_parameters_that_join_leave_the_others_state_alone(case):
    results, (dtype, options) = [], CASES[case]
    for where in ("none", "state"):
        model = layers(dtype)
        model[2].requires_grad_(False)
        opt = SAMAdamW(model.parameters(), lr=1e-2, rho=0.1, offload=where, **options)
        train(model, opt, batches(2, dtype))
        model[2].requires_grad_(True)
        train(model, opt, batches(2, dtype, seed=3))
        results.append(bits(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("case", ["float32", "float32, released", "master, released", "stochastic, 8 bits, released"])
def test_parameters_without_a_second_gradient(case, traffic):
    """Those of the first layers alone have one."""
    results, (dtype, options) = [], CASES[case]
    for where in ("none", "state"):
        model, batch = layers(dtype), batches(1, dtype)[0]
        opt = SAMAdamW(model.parameters(), lr=1e-2, rho=0.1, offload=where, **options)
        for _ in range(2):
            opt.zero_grad()
            loss_of(model, batch).backward()
            with opt.perturbed(zero_grad=True):
                model[3](model[2](model[1](model[0](batch[0])))).pow(2).mean().backward()
                opt.step()
        results.append((bits(model), opt))
    assert torch.equal(results[0][0], results[1][0]) and equal_states(results[0][1], results[1][1])
    assert traffic.alive == 0


def test_released_parts_come_in_the_order_of_the_last_pass(traffic):
    model, opt, _ = trained("stochastic, 8 bits, released", "state", 2)
    for bucket in opt._buckets:
        assert sorted(part.members.start for part in bucket._arrivals) == [p.members.start for p in bucket.parts]
    begun, begin = [], offload.Staging.begin
    opt.zero_grad()
    data = batches(1, BF16)[0]
    loss_of(model, data).backward()
    with opt.perturbed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload.Staging, "begin", lambda self, part: (begun.append(part), begin(self, part))[1])
        loss_of(model, data).backward()
        opt.step()
    for bucket in opt._buckets:
        assert [part for part in begun if part in bucket.parts] == bucket._arrivals  # each once, none in vain


def test_no_gradient_outlives_its_use_while_its_part_waits_for_others():
    dtype, options = CASES["stochastic, 8 bits, released"]
    model, batch = layers(dtype), batches(1, dtype)[0]
    opt = SAMAdamW(model.parameters(), lr=1e-2, rho=0.1, offload="state", **options)
    loss_of(model, batch).backward()
    taken = [weakref.ref(p.grad) for p in model.parameters()]
    alive = []
    with opt.perturbed():
        first = next(model.parameters())
        first.register_post_accumulate_grad_hook(lambda p: alive.append(sum(ref() is not None for ref in taken)))
        loss_of(model, batch).backward()
        opt.step()
    assert alive[0] <= 2  # of ten: those of the first layer


def test_a_broken_released_backward_leaves_nothing_on_the_device(traffic):
    dtype, options = CASES["stochastic, 8 bits, released"]
    model, batch = layers(dtype), batches(1, dtype)[0]
    opt = SAMAdamW(model.parameters(), lr=1e-2, rho=0.1, offload="state", **options)
    train(model, opt, batches(1, dtype))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    loss_of(model, batch).backward()
    with pytest.raises(ZeroDivisionError), opt.perturbed():

        def broken(grad):
            raise ZeroDivisionError

        hidden = model[2](model[1](model[0](batch[0])))
        hidden.register_hook(broken)
        (model[6](model[5](model[4](model[3](hidden)))) - batch[1]).pow(2).mean().backward()
    assert opt.half_stepped and traffic.alive == 0
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    other = layers(dtype)
    other.load_state_dict(saved[0])
    second = SAMAdamW(other.parameters(), lr=1e-2, rho=0.1, **options)
    second.load_state_dict(saved[1])
    for each, its in ((model, opt), (other, second)):
        train(each, its, batches(2, dtype, seed=3))
    assert torch.equal(bits(model), bits(other))


@pytest.mark.parametrize("case", ["float32", "master"])
def test_memory_running_out_for_the_staging_buffers_leaves_everything_as_it_was(case, monkeypatch):
    dtype, _ = CASES[case]
    model, opt, _ = trained(case, "state", 2)
    before, state, batch = bits(model), state_bits_of(opt), batches(1, dtype)[0]

    def exhausted(self):
        raise torch.OutOfMemoryError("out of memory")

    # Masters are read to perturb already, and their buffers are kept until the weights are back.
    where = "perturb" if case == "master" else "step"
    opt.zero_grad()
    loss_of(model, batch).backward()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        if where == "perturb":
            patch.setattr(offload.Staging, "_new", exhausted)
        with opt.perturbed(zero_grad=True):
            loss_of(model, batch).backward()
            patch.setattr(offload.Staging, "_new", exhausted)
            opt.step()
    assert torch.equal(bits(model), before) and not opt.is_perturbed
    after = state_bits_of(opt)
    assert all(torch.equal(state[key], after[key]) for key in state)


def test_weights_with_masters_come_back_without_new_memory(monkeypatch, traffic):
    model, opt, _ = trained("master", "state", 2)
    before, batch = bits(model), batches(1, BF16)[0]

    def exhausted(self):
        raise torch.OutOfMemoryError("out of memory")

    opt.zero_grad()
    loss_of(model, batch).backward()
    with pytest.raises(torch.OutOfMemoryError), opt.perturbed(zero_grad=True):
        assert traffic.alive == 3
        monkeypatch.setattr(offload.Staging, "_new", exhausted)
        raise torch.OutOfMemoryError("in the second pass")
    assert torch.equal(bits(model), before) and not opt.is_perturbed and traffic.alive == 0


def test_an_unknown_place_is_refused():
    with pytest.raises(ValueError, match=says("offload='disk'", '"none"', '"state"')):
        SAMAdamW([torch.nn.Parameter(torch.ones(2))], offload="disk")


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 120))
def test_split(sizes, limit):
    parts = offload.split(sizes, limit)
    assert [index for part in parts for index in part] == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in part) for part in parts]
    assert all(total <= limit or len(part) == 1 for total, part in zip(totals, parts))
    for part, total, after in zip(parts, totals, parts[1:]):
        assert total + sizes[after.start] > limit and len(part) > 0


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*without a float32 master")
def test_gpu_bits_and_pinned_state(case):
    model, opt, seen = trained(case, "none", device="cuda")
    other, offloaded, theirs = trained(case, "state", device="cuda")
    assert torch.equal(bits(model), bits(other)) and equal_states(opt, offloaded) and same_numbers(seen, theirs)
    for state in offloaded.state.values():
        assert all(value.is_pinned() for name, value in state.items() if name != "step")


@pytest.mark.gpu
def test_gpu_the_host_waits_for_nothing_and_the_device_keeps_no_state(monkeypatch):
    monkeypatch.setattr(offload, "PART", 2**22)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(16))).to("cuda", BF16)
    data = [(torch.randn(8, 1024, device="cuda", dtype=BF16),) * 2 for _ in range(4)]
    loss_of(model, data[0]).backward()
    # cuBLAS keeps workspace from the first product of each thread on, 32 MiB on an H100: here, and in what is compared.
    without = torch.cuda.memory_allocated()
    opt = SAMAdamW(model.parameters(), lr=1e-3, rho=0.1, offload="state")
    train(model, opt, data[:2])
    held = torch.cuda.memory_allocated() - without
    params = sum(p.numel() for p in model.parameters())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(model, opt, data[2:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert held < params  # tables; state would be 12 bytes a parameter
    opt.zero_grad()
    loss_of(model, data[0]).backward()
    opt.perturb(zero_grad=True)
    loss_of(model, data[0]).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    opt.step()
    largest = max(Packing(part.table["weight"]).nbytes for b in opt._buckets for part in b.parts) * 6
    assert torch.cuda.max_memory_allocated() - before <= 3 * largest + 2**20
