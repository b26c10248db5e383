"""Bad input: an error that says what is wrong; weights as they were to the bit; and training goes on as if unharmed."""

import re
from typing import NamedTuple

import pytest
import torch
from builders.messages import says

from optim.networks import batches, bits, loss_of, network, train
from rsaft_fast import ops
from rsaft_fast.ops import TensorTable
from rsaft_fast.optim import SAM, SAMAdamW

MAKERS = {
    "SAM": lambda p, **o: SAM(p, torch.optim.AdamW, lr=0.01, **o),
    "SAMAdamW": lambda p, **o: SAMAdamW(p, lr=0.01, **o),
    "backup in gradients": lambda p, **o: SAMAdamW(p, lr=0.01, backup="gradient", **o),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def ready(make, **options):
    """A network with gradients, and its optimizer."""
    model = network()
    opt = make(model.parameters(), **options)
    loss_of(model, batches(1)[0]).backward()
    return model, opt


def assert_unharmed(model, opt, make):
    """From here it trains to the bits of a network that saw nothing bad."""
    twin = network()
    assert not opt.is_perturbed and torch.equal(bits(model), bits(twin))
    for net, optimizer in ((model, opt), (twin, make(twin.parameters()))):
        train(net, optimizer, batches(3, seed=5))
    assert torch.equal(bits(model), bits(twin)) and not torch.equal(bits(model), bits(network()))
    assert int(opt.skipped) == 0


# -- gradients ---------------------------------------------------------------------------------------------------------


def sparse(p):
    p.grad = p.grad.to_sparse()


def other_shape(p):
    p.grad.data = torch.ones(5, 13)


def of_dtype(dtype):
    def spoil(p):
        p.grad_dtype = None  # torch's leave to differ from the weight
        grad, p.grad = p.grad, None
        p.grad = grad.to(dtype)

    return spoil


def freed(p):
    p.grad.untyped_storage().resize_(0)


class Bad(NamedTuple):
    spoil: object
    error: type
    words: str | re.Pattern[str]


GRADIENTS = {
    "sparse": Bad(sparse, TypeError, says("grad 0", "torch.sparse_coo", "sparse=False")),
    "other shape": Bad(other_shape, ValueError, says("grad 0", "(5, 13)", "(13, 5)")),
    "one of another dtype": Bad(of_dtype(torch.bfloat16), TypeError, says("grad", "torch.float32", "torch.bfloat16")),
    "complex": Bad(of_dtype(torch.complex64), TypeError, says("grad 0", "torch.complex64", "torch.float32 or")),
    "freed": Bad(freed, ValueError, says("grad 0", "storage", 0)),
}


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("bad", GRADIENTS.values(), ids=GRADIENTS)
def test_a_gradient_that_does_not_fit_in_the_first_pass(make, bad):
    model, opt = ready(make)
    bad.spoil(model[0].weight)
    with pytest.raises(bad.error, match=bad.words):
        opt.perturb()
    assert_unharmed(model, opt, make)


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("bad", GRADIENTS.values(), ids=GRADIENTS)
def test_a_gradient_that_does_not_fit_in_the_second_pass(make, bad):
    model, opt = ready(make)
    before = bits(model)
    opt.perturb(zero_grad=True)
    assert not torch.equal(bits(model), before)
    loss_of(model, batches(1)[0]).backward()
    bad.spoil(model[0].weight)
    with pytest.raises(bad.error, match=bad.words):
        opt.step()
    assert_unharmed(model, opt, make)


# -- parameters --------------------------------------------------------------------------------------------------------


def expanded():
    return torch.randn(3, 1).expand(3, 4)


def holey():
    return torch.randn(6, 8)[:, ::2]


def without_memory():
    tensor = torch.randn(4)
    tensor.untyped_storage().resize_(0)
    return tensor


PARAMETERS = {
    "on another device": Bad(lambda: torch.ones(2, device="meta"), ValueError, says("cpu, meta", "one optimizer")),
    "expanded": Bad(expanded, ValueError, says("weight 6", "(3, 4)", "(1, 0)", ".contiguous()")),
    "holey": Bad(holey, ValueError, says("weight 6", "(6, 4)", "(8, 2)", ".contiguous()")),
    "complex": Bad(
        lambda: torch.ones(2, dtype=torch.complex64), TypeError, says("weight 0", "torch.complex64", "floating-point")
    ),
    "without memory": Bad(without_memory, ValueError, says("weight 6", "storage", 0)),
}


@pytest.mark.parametrize("bad", PARAMETERS.values(), ids=PARAMETERS)
def test_a_parameter_that_cannot_be_updated(make, bad):
    model, opt = ready(make)
    parameter = torch.nn.Parameter(bad.spoil())
    opt.add_param_group({"params": [parameter]})
    with pytest.raises(bad.error, match=bad.words):
        opt.perturb()
    parameter.requires_grad_(False)  # left alone, it does not hinder the others
    assert_unharmed(model, opt, make)


def test_parameters_that_overlap(make):
    model, opt = ready(make)
    base = torch.randn(6)
    before = base.clone()
    parameters = [torch.nn.Parameter(base[:4]), torch.nn.Parameter(base[2:])]
    opt.add_param_group({"params": parameters})
    with pytest.raises(ValueError, match=says("weights 6 and 7", "overlap")):
        opt.perturb()
    assert torch.equal(base, before)
    for parameter in parameters:
        parameter.requires_grad_(False)
    assert_unharmed(model, opt, make)


def test_integer_parameters_are_frozen_by_nature(make):
    model, opt = ready(make)
    codes = torch.nn.Parameter(torch.arange(5), requires_grad=False)
    opt.add_param_group({"params": [codes]})
    assert_unharmed(model, opt, make)
    assert torch.equal(codes, torch.arange(5))


def test_a_weight_that_loses_its_memory_before_the_first_pass(make):
    model, opt = ready(make)
    weight = model[0].weight
    kept, size = weight.detach().clone(), weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=says("weight 0", "storage", 0)):
        opt.perturb()
    weight.untyped_storage().resize_(size)
    weight.data.copy_(kept)
    assert_unharmed(model, opt, make)


@pytest.mark.parametrize("how", ["step", "restore"])
def test_a_weight_that_loses_its_memory_between_the_passes(make, how):
    model, opt = ready(make)
    opt.perturb(zero_grad=True)
    loss_of(model, batches(1)[0]).backward()
    weight = model[0].weight
    size = weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=says("weight 0", "storage", 0)):
        getattr(opt, how)()
    assert opt.is_perturbed  # still to be restored, once there is a place
    weight.untyped_storage().resize_(size)
    weight.data.fill_(float("nan"))
    opt.restore()
    assert_unharmed(model, opt, make)


# -- order -------------------------------------------------------------------------------------------------------------


def test_perturbing_twice(make):
    model, opt = ready(make)
    opt.perturb()
    perturbed = bits(model)
    with pytest.raises(RuntimeError, match=says("already perturbed", "step()", "restore()")):
        opt.perturb()
    assert torch.equal(bits(model), perturbed) and opt.is_perturbed
    opt.restore()
    assert_unharmed(model, opt, make)


def test_restoring_twice(make):
    model, opt = ready(make)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=says("restore()", "not perturbed")):
            opt.restore()
        loss_of(model, batches(1)[0]).backward()
        opt.perturb()
        opt.restore()
    assert_unharmed(model, opt, make)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("step", says("step()", "perturb()", "step(plain=True)")),
        ("second_step", says("second_step()", "first_step()")),
    ],
)
def test_stepping_unperturbed(make, how, words):
    model, opt = ready(make)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            getattr(opt, how)()
    assert_unharmed(model, opt, make)


def test_stepping_twice(make):
    model, opt = ready(make)
    with opt.perturbed(zero_grad=True):
        loss_of(model, batches(1)[0]).backward()
        opt.step()
    once = bits(model)
    with pytest.raises(RuntimeError, match=says("step()", "perturb()", "step(plain=True)")):
        opt.step()
    assert torch.equal(bits(model), once)


@pytest.mark.parametrize("restored", [False, True])
def test_a_plain_step_between_the_passes(make, restored):
    model, opt = ready(make)
    opt.perturb()
    if restored:
        opt.restore()
    at = bits(model)
    with pytest.raises(RuntimeError, match=says("step(plain=True)", "restored" if restored else "perturbed")):
        opt.step(plain=True)
    assert torch.equal(bits(model), at) and opt.is_perturbed is not restored
    if not restored:
        opt.restore()
    assert_unharmed(model, opt, make)


def test_a_plain_step_with_a_closure(make):
    model, opt = ready(make)
    with pytest.raises(RuntimeError, match=says("step(plain=True)", "closure")):
        opt.step(lambda: loss_of(model, batches(1)[0]), plain=True)
    assert_unharmed(model, opt, make)


def test_a_base_optimizer_that_fails():
    """Its own state is its own affair; the weights come back."""

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["params"][0].data.zero_()
            raise MemoryError("no room for the update")

    model = network()
    opt = SAM(model.parameters(), Failing, lr=0.1)
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(MemoryError), opt.perturbed(zero_grad=True):
        loss_of(model, batches(1)[0]).backward()
        opt.step()
    assert torch.equal(bits(model), bits(network())) and not opt.is_perturbed


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, -0.1, float("nan"), float("inf")])
def test_a_bad_radius(make, rho):
    with pytest.raises(ValueError, match=says(f"rho={rho}", "positive and finite")):
        make(network().parameters(), rho=rho)
    model, opt = ready(make)
    with pytest.raises(ValueError, match=f"rho={rho}"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "rho": rho})
    good, opt.param_groups[0]["rho"] = opt.param_groups[0]["rho"], rho
    with pytest.raises(ValueError, match=f"rho={rho}"):
        opt.perturb()
    opt.param_groups[0]["rho"] = good
    assert_unharmed(model, opt, make)


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"max_grad_norm": 0.0}],
)
def test_a_bad_hyper_parameter(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SAMAdamW(network().parameters(), **options)


def test_sam_wants_exactly_one_base():
    params = list(network().parameters())
    with pytest.raises(TypeError, match=says("SAM(params, torch.optim.AdamW", "SAM(optimizer)")):
        SAM(params)
    with pytest.raises(TypeError, match=says("instance", "base_optimizer")):
        SAM(torch.optim.SGD(params, lr=0.1), torch.optim.SGD)


# -- operations --------------------------------------------------------------------------------------------------------


def table_of(*lists, dtype=torch.float32, **options):
    """Two tensors a list, with values of their own."""
    sizes = ((3, 4), (5,))
    table = TensorTable([torch.randn(size, dtype=dtype) for size in sizes], **options)
    table.bind(**{name: [torch.randn(size, dtype=dtype) for size in sizes] for name in lists})
    return table


def assert_refused(operation, error, words, *tables):
    before = [[w.clone() for w in table["weight"]] for table in tables]
    with pytest.raises(error, match=words):
        operation()
    for table, weights in zip(tables, before):
        assert all(torch.equal(w, old) for w, old in zip(table["weight"], weights))


@pytest.mark.parametrize(
    ("name", "dtype", "allowed"),
    [
        ("grad", torch.complex64, "torch.float32 or torch.bfloat16"),
        ("grad", torch.int32, "torch.float32 or torch.bfloat16"),
        ("backup", torch.float32, "torch.bfloat16$"),
        ("backup", torch.float16, "torch.bfloat16$"),  # of the same size, yet no place for these bits
        ("master", torch.bfloat16, "torch.float32$"),
        ("exp_avg", torch.bfloat16, "torch.float32 or torch.uint8$"),
        ("exp_avg_sq", torch.float64, "torch.float32 or torch.uint8$"),
    ],
)
def test_a_list_of_a_dtype_that_it_cannot_have(name, dtype, allowed):
    table = table_of("grad", dtype=torch.bfloat16)
    known = table.addresses.clone()
    lists = {name: [torch.ones(3, 4, dtype=dtype), torch.ones(5, dtype=dtype)]}
    words = rf"{name} 0 .*{dtype} .*torch\.bfloat16 .*{allowed}"
    assert_refused(lambda: table.bind(**lists), TypeError, words, table)
    assert torch.equal(table.addresses, known)


def test_memory_that_is_gone():
    table = table_of("grad")
    grads = [torch.randn(3, 4), torch.randn(5)]
    grads[1].untyped_storage().resize_(0)
    assert_refused(lambda: table.bind(grad=grads), ValueError, says("grad 1", "storage", 0), table)
    with pytest.raises(ValueError, match=says("weight 1", "storage", 0)):
        TensorTable([torch.randn(2), grads[1]])


def test_a_list_that_an_operation_needs():
    """The addresses of a released list stay in the table: an operation that trusted them would read freed memory."""
    table = table_of("grad", "backup")
    norm = ops.global_norm(table, 0.1)
    table.release("grad")
    for operation in (
        lambda: ops.global_norm(table, 0.1),
        lambda: ops.sam_perturb_(table, norm),
        lambda: ops.sam_adamw_step_(table, ops.StepScalars("cpu"), first=norm, restore=True),
    ):
        assert_refused(operation, KeyError, says("'grad'", "bind"), table)
    table = table_of("grad")
    for operation in (ops.sam_perturb_, ops.sam_restore_):
        words = says("master", "backup")
        assert_refused(lambda operation=operation: operation(table, norm), ValueError, words, table)


def test_a_norm_of_too_few_groups_or_of_elsewhere():
    table = table_of("grad", "backup", group=[0, 2])
    for norm, words in (
        (ops.GradientNorm("cpu", 2), says("norm", "2 groups on cpu", "3 on cpu")),
        (ops.GradientNorm("meta", 3), says("norm", "3 groups on meta", "3 on cpu")),
    ):
        for operation in (ops.sam_perturb_, ops.sam_restore_):
            assert_refused(lambda op=operation, norm=norm: op(table, norm), ValueError, words, table)
    assert_refused(lambda: ops.global_norm(table, 0.1), ValueError, says("norm", "1 groups"), table)


def test_radii_and_tables_that_do_not_go_together():
    table = table_of("grad")
    for rho, words in (
        (torch.tensor([0.1]), says("rho", "torch.float32", "float64")),
        (torch.tensor([0.1, 0.2], dtype=torch.float64), says("rho", 2, "1 groups")),
    ):
        out = ops.GradientNorm("cpu")
        assert_refused(lambda rho=rho, out=out: ops.global_norm(table, rho, out=out), ValueError, words, table)
    elsewhere = TensorTable([torch.ones(2, device="meta")])
    assert_refused(lambda: ops.global_norm([table, elsewhere]), ValueError, says("tables", "cpu, meta"), table)
    assert_refused(lambda: ops.global_norm([]), ValueError, says("norm", "table"))


@pytest.mark.parametrize("group", [[0], [0, 1, 1], [0, -1]])
def test_groups_that_are_not_one_for_each_weight(group):
    with pytest.raises(ValueError, match=says(f"group={group}", 2, "weights")):
        table_of(group=group)
