"""Whatever fails in a pass, a step, a closure or a base optimizer: the weights are back, and training goes on."""

import pickle

import pytest
import torch
from builders.messages import says

from optim.networks import batches, bits, loss_of, network, train, weights
from rsaft_fast import ops
from rsaft_fast.optim import SAM, SAMAdamW
from rsaft_fast.optim.buckets import Bucket


class Fragile(torch.optim.AdamW):
    """Fails once, with some weights already written."""

    broken = True

    def step(self, closure=None):
        if self.broken:
            self.broken = False
            self.param_groups[0]["params"][0].data.zero_()
            raise MemoryError("no room for the update")
        return super().step(closure)


MAKERS = {
    "SAM": lambda p: SAM(p, torch.optim.AdamW, lr=0.01, rho=0.3),
    "SAMAdamW": lambda p: SAMAdamW(p, lr=0.01, rho=0.3),
    "in gradients": lambda p: SAMAdamW(p, lr=0.01, rho=0.3, backup="gradient"),
    "on the host": lambda p: SAMAdamW(p, lr=0.01, rho=0.3, offload="state"),
    "released": lambda p: SAMAdamW(p, lr=0.01, rho=0.3, release_gradients=True),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def closure_of(model, batch, calls):
    def closure():
        calls.append(1)
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


def test_after_a_base_optimizer_failed_a_closure_is_run_for_both_passes():
    model, twin, (batch,) = network(), network(), batches(1)
    opt = SAM(model.parameters(), Fragile, lr=0.01, rho=0.3)
    loss_of(model, batch).backward()
    opt.perturb(zero_grad=True)
    loss_of(model, batch).backward()
    with pytest.raises(MemoryError):
        opt.step()
    assert not opt.is_perturbed and torch.equal(bits(model), bits(twin))
    calls = []
    opt.step(closure_of(model, batch, calls))
    assert len(calls) == 2
    train(twin, SAM(twin.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3), [batch])
    assert torch.equal(bits(model), bits(twin))


@pytest.mark.parametrize("then", ["step", "plain", "perturb"])
def test_what_may_follow_a_base_optimizer_that_failed(then):
    model, twin, (batch,) = network(), network(), batches(1)
    opt = SAM(model.parameters(), Fragile, lr=0.01, rho=0.3)
    sharp = SAM(twin.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3)
    with pytest.raises(MemoryError):
        train(model, opt, [batch])
    if then == "step":  # another attempt, from the gradients of the second pass
        opt.step()
        train(twin, sharp, [batch])
    else:
        train(model, opt, [batch], sharp=then == "perturb")
        train(twin, sharp, [batch], sharp=then == "perturb")
    assert torch.equal(bits(model), bits(twin))
    with pytest.raises(RuntimeError, match=says("step()", "perturb()", "step(plain=True)")):
        opt.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_step_that_failed_can_be_tried_again(fused):
    """GradScaler leaves its scale on an optimizer whose step failed; the next step is not to be divided by it."""
    results = []
    for broken in (False, True):
        model, data = network(), batches(2)
        opt = SAM(model.parameters(), Fragile, lr=0.01, rho=0.3, fused=fused)
        opt.base.broken = broken
        scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
        for number in (1, 2):
            opt.zero_grad()
            scaler.scale(loss_of(model, data[0])).backward()
            if number == 1:
                opt.perturb()
        if broken:
            with pytest.raises(MemoryError):
                scaler.step(opt)
            assert not hasattr(opt, "grad_scale") and not hasattr(opt.base, "grad_scale")
        scaler.step(opt)
        train(model, opt, data[1:])
        results.append(bits(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("number", [1, 2])
def test_a_closure_that_fails(make, number):
    model, (batch,) = network(), batches(1)
    opt = make(model.parameters())
    calls = []

    def failing():
        if len(calls) == number - 1:
            raise KeyboardInterrupt
        return closure_of(model, batch, calls)()

    with pytest.raises(KeyboardInterrupt):
        opt.step(failing)
    assert not opt.is_perturbed and torch.equal(bits(model), bits(network())) and not opt.half_stepped
    train(model, opt, [batch])
    twin = network()
    train(twin, make(twin.parameters()), [batch])
    assert torch.equal(bits(model), bits(twin))


def test_an_exception_between_the_passes_leaves_a_plain_step_allowed(make):
    model, (batch,) = network(), batches(1)
    opt = make(model.parameters())
    loss_of(model, batch).backward()
    with pytest.raises(ZeroDivisionError), opt.perturbed(zero_grad=True):
        raise ZeroDivisionError
    assert torch.equal(bits(model), bits(network()))
    train(model, opt, [batch], sharp=False)
    twin = network()
    train(twin, make(twin.parameters()), [batch], sharp=False)
    assert torch.equal(bits(model), bits(twin))


@pytest.mark.parametrize("where", ["_finish", "_begin_second_pass"])
def test_perturbing_that_fails_when_the_weights_have_moved(make, where, monkeypatch):
    model, (batch,) = network(), batches(1)
    opt = make(model.parameters())
    loss_of(model, batch).backward()
    with monkeypatch.context() as patch:
        patch.setattr(opt, where, lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError), opt.perturbed():
            pass
    assert not opt.is_perturbed and torch.equal(bits(model), bits(network()))
    train(model, opt, [batch])


def test_an_update_that_breaks_off_among_its_tables_says_so(monkeypatch):
    groups = network()
    opt = SAMAdamW([{"params": groups[0].parameters(), "adaptive": True}, {"params": groups[3].parameters()}])
    opt.perturb()
    step, done = Bucket.step, []

    def failing(self, *args, **options):
        if done:
            raise torch.OutOfMemoryError("in the second table")
        done.append(step(self, *args, **options))

    monkeypatch.setattr(Bucket, "step", failing)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step()
    assert opt.half_stepped and not opt.is_perturbed
    for refused in (opt.perturb, lambda: opt.step(plain=True)):
        with pytest.raises(RuntimeError, match=says("last step", "last checkpoint")):
            refused()
    monkeypatch.setattr(Bucket, "step", step)
    opt.load_state_dict(SAMAdamW(opt.param_groups).state_dict() | {"param_groups": opt.state_dict()["param_groups"]})
    opt.step(plain=True)


def test_weights_that_cannot_be_put_back_after_half_an_update_are_known_to_be_half_stepped(monkeypatch):
    model, (batch,) = network(), batches(1)
    opt = SAMAdamW(model.parameters(), release_gradients=True)
    loss_of(model, batch).backward()
    opt.perturb()

    def failing(self):
        raise torch.OutOfMemoryError("while putting back")

    monkeypatch.setattr(SAMAdamW, "_put_back", failing)
    loss_of(model, batch).backward()
    with pytest.raises(torch.OutOfMemoryError, match="putting back") as raised, opt._abandoned_on_error():
        raise ZeroDivisionError
    assert opt.half_stepped and not opt.is_perturbed
    assert any("half done" in note for note in raised.value.__context__.__notes__)
    with pytest.raises(RuntimeError, match=says("last step", "last checkpoint")):
        opt.perturb()


def test_a_build_that_fails_is_made_again(monkeypatch):
    model, (batch,) = network(), batches(1)
    opt = SAMAdamW(model.parameters(), lr=0.01, rho=0.3)
    loss_of(model, batch).backward()
    for owner, name in ((SAMAdamW, "_bind_state"), (ops, "GradientNorm"), (ops, "StepScalars")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                opt.perturb()
    train(model, opt, [batch])
    twin = network()
    train(twin, SAMAdamW(twin.parameters(), lr=0.01, rho=0.3), [batch])
    assert torch.equal(bits(model), bits(twin))


# -- compiled step functions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SAM", "SAMAdamW"])
@pytest.mark.parametrize("how", ["methods", "block", "closure"])
@pytest.mark.filterwarnings("ignore")
def test_a_whole_step_function_compiles_around_a_fresh_optimizer(name, how):
    def function(model, opt, batch):
        opt.zero_grad()
        if how == "closure":
            calls = []
            opt.step(closure_of(model, batch, calls))
            return
        loss_of(model, batch).backward()
        if how == "block":
            with opt.perturbed(zero_grad=True):
                loss_of(model, batch).backward()
                opt.step()
            return
        opt.perturb(zero_grad=True)
        loss_of(model, batch).backward()
        opt.step()

    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()
        opt = MAKERS[name](model.parameters())
        step = torch.compile(function, backend="eager") if compiled else function
        for batch in batches(2):
            step(model, opt, batch)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


# -- base optimizers ---------------------------------------------------------------------------------------------------


class WithClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class NeedsLoss(torch.optim.SGD):
    def step(self, closure=None, *, loss):
        return super().step(closure)


BASES = {
    "LBFGS": (torch.optim.LBFGS, says("LBFGS", "closure")),
    "its own closure": (WithClosure, says("WithClosure", "closure")),
    "its own argument": (NeedsLoss, says("NeedsLoss", "needs loss")),
    "sparse": (torch.optim.SparseAdam, says("SparseAdam", "sparse=False")),
    "two passes": (lambda p: SAM(p, torch.optim.SGD, lr=0.1), says("SAM ", "two passes")),
    "two passes, fused": (SAMAdamW, says("SAMAdamW ", "two passes")),
    "no optimizer": (lambda p: torch.nn.Linear(1, 1), says("Linear", "torch.optim.Optimizer")),
    "an instance": (torch.optim.SGD([torch.ones(1)], lr=0.1), r"SAM\(optimizer\)"),
}


@pytest.mark.parametrize(("base", "words"), BASES.values(), ids=BASES)
def test_a_base_optimizer_that_cannot_be_is_refused_at_once(base, words):
    params = list(network().parameters())
    with pytest.raises(TypeError, match=words):
        SAM(params, base)
    if not isinstance(base, torch.optim.Optimizer) and base is not BASES["no optimizer"][0]:
        with pytest.raises(TypeError, match=words):
            SAM(base(params))


def test_the_base_optimizer_goes_by_the_usual_name():
    model, data = network(), batches(3)
    opt = SAM(model.parameters(), torch.optim.AdamW, lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(opt.base_optimizer, step_size=1, gamma=0.5)
    train(model, opt, data, each=scheduler.step)
    assert opt.base_optimizer is opt.base and opt.param_groups[0]["lr"] == 0.01 / 8


def test_what_is_done_to_the_base_optimizer_is_done_to_all_of_it():
    model, extra = network(), torch.nn.Parameter(torch.ones(3))
    opt = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.2)
    train(model, opt, batches(1))
    saved = torch.optim.AdamW(network().parameters(), lr=0.77).state_dict()
    opt.base_optimizer.load_state_dict(saved)
    assert opt.param_groups is opt.base.param_groups and opt.state is opt.base.state
    assert opt.param_groups[0]["lr"] == 0.77
    opt.base_optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(3)
    opt.perturb()
    assert (extra > 1).all() and opt.param_groups[1]["rho"] == 0.2
    opt.step()
    assert (extra < 1).all()


# -- schedule-free -----------------------------------------------------------------------------------------------------


def strangers(name: str):
    return getattr(pytest.importorskip("pytorch_optimizer"), name)


def test_schedule_free_training_and_evaluation_follow_the_base_optimizer():
    model, twin, data = network(torch.float64), network(torch.float64), batches(6, torch.float64)
    opt = SAM(model.parameters(), strangers("ScheduleFreeAdamW"), lr=0.02, rho=0.1)
    base = strangers("ScheduleFreeAdamW")(twin.parameters(), lr=0.02)
    for number, batch in enumerate(data):
        for o in (opt, base):
            o.train()
        train(model, opt, [batch])
        base.zero_grad()
        grads = torch.autograd.grad(loss_of(twin, batch), list(twin.parameters()))
        norm = torch.cat([g.reshape(-1) for g in grads]).norm()
        old = [p.detach().clone() for p in twin.parameters()]
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads):
                p.add_(g, alpha=float(0.1 / norm))
        loss_of(twin, batch).backward()
        with torch.no_grad():
            for p, w in zip(twin.parameters(), old):
                p.copy_(w)
        base.step()
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-10, atol=1e-11)
        if number % 2:
            before = weights(model)
            for o in (opt, base):
                o.eval()
            assert not torch.equal(weights(model), before)
            torch.testing.assert_close(weights(model), weights(twin), rtol=1e-10, atol=1e-11)


def test_schedule_free_modes_wait_for_the_passes_and_the_passes_for_the_mode():
    model, (batch,) = network(), batches(1)
    opt = SAM(model.parameters(), strangers("ScheduleFreeAdamW"), lr=0.02)
    train(model, opt, [batch])
    loss_of(model, batch).backward()
    opt.perturb()
    at = bits(model)
    for refused in (opt.eval, opt.train):
        with pytest.raises(RuntimeError, match=says("perturbed", "step()", "restore()")):
            refused()
    assert torch.equal(bits(model), at)
    opt.restore()
    opt.eval()
    at = bits(model)
    for refused in (opt.perturb, lambda: opt.step(plain=True), opt.step):
        with pytest.raises(RuntimeError, match="optimizer.train()"):
            refused()
    assert torch.equal(bits(model), at)
    opt.train()
    train(model, opt, [batch])


def test_other_base_optimizers_have_one_mode():
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    opt.eval()
    opt.train()
    assert torch.equal(bits(model), bits(network()))
    train(model, opt, batches(1))


def looking_ahead(model):
    return SAM(strangers("Lookahead")(torch.optim.SGD(model.parameters(), lr=0.1), k=3), rho=0.1)


def test_a_wrapping_base_optimizer_is_saved_by_its_own_method():
    results = []
    for resume in (False, True):
        model, data = network(), batches(4)
        opt = looking_ahead(model)
        train(model, opt, data[:2])
        if resume:
            saved = pickle.loads(pickle.dumps((model.state_dict(), opt.state_dict())))
            model = network(seed=3)
            opt = looking_ahead(model)
            model.load_state_dict(saved[0])
            opt.load_state_dict(saved[1])
        train(model, opt, data[2:])
        results.append(bits(model))
    assert torch.equal(*results)
