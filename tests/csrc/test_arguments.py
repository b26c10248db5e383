"""The C ABI's argument checks: a bad one is answered with error 1 before anything is written, device or not."""

import ctypes
import math

import pytest
import torch

from rsaft_fast import ops
from rsaft_fast.abi.table import ROW
from rsaft_fast.ops import CHUNK, cuda, library

INVALID = 1
F32, BF16, F16, U8, ABSENT = 0, 1, 2, 3, -1


class Problem:
    """A bf16 table with everything bound, and the scalars of a step; `call` passes them, some of them replaced."""

    def __init__(self, loaded, dtype=torch.bfloat16, master=False, state=torch.float32):
        self.loaded = loaded
        self.weight = [torch.randn(CHUNK + 3).to(dtype), torch.randn(5).to(dtype)]
        self.table = ops.TensorTable(self.weight, rounding_seed=None)
        self.lists = dict(
            grad=[torch.randn_like(w) for w in self.weight],
            exp_avg=[torch.zeros_like(w, dtype=state) for w in self.weight],
            exp_avg_sq=[torch.zeros_like(w, dtype=state) for w in self.weight],
        )
        name, kept_in = ("master", torch.float32) if master else ("backup", dtype)
        self.lists[name] = [w.to(kept_in, copy=True) for w in self.weight]
        if state is torch.uint8:
            for name in ("exp_avg_absmax", "exp_avg_sq_absmax"):
                self.lists[name] = [torch.zeros(-(-w.numel() // 256)) for w in self.weight]
        self.table.bind(**self.lists)
        self.norm, self.scalars = ops.GradientNorm("cpu"), ops.StepScalars("cpu")
        self.rho = torch.ones(1, dtype=torch.float64)
        self.struct = cuda._Table.from_buffer_copy(cuda._prepared(self.table).whole)
        self.inputs = cuda._Inputs(
            self.scalars.hyper.data_ptr(),
            None,
            None,
            None,
            self.scalars.skip.data_ptr(),
            self.scalars.skipped.data_ptr(),
        )
        self.slots = (ctypes.c_void_p * 17)(*[self.table.sum_sq.data_ptr()] * 17)
        self.counts = (ctypes.c_int32 * 17)(*[self.table.chunks] * 17)
        self.tables = (ctypes.c_void_p * 17)(*[ctypes.addressof(self.struct)] * 17)

    def arguments(self, function: str) -> dict:
        table, norm = ctypes.addressof(self.struct), self.norm
        inputs, skip = ctypes.addressof(self.inputs), self.scalars.skip.data_ptr()
        found_inf = norm.found_inf.data_ptr()
        return {
            "rsaft_sum_of_squares": dict(table=table, adaptive=0),
            "rsaft_finish_norm": dict(
                slots=ctypes.addressof(self.slots),
                counts=ctypes.addressof(self.counts),
                count=1,
                rho=self.rho.data_ptr(),
                groups=1,
                values=norm.values.data_ptr(),
                found_inf=found_inf,
                tables=ctypes.addressof(self.tables),
                inputs=inputs,
            ),
            "rsaft_sam_perturb": dict(table=table, scales=norm.scale.data_ptr(), found_inf=found_inf),
            "rsaft_sam_restore": dict(table=table, found_inf=found_inf),
            "rsaft_adamw_coefficients": dict(
                tables=ctypes.addressof(self.tables),
                count=1,
                norm=norm.norm.data_ptr(),
                found_inf=found_inf,
                inputs=inputs,
            ),
            "rsaft_sam_adamw_step": dict(table=table, skip=skip, first_inf=found_inf, restore=1),
        }[function]

    def call(self, function: str, **changes) -> int:
        arguments = self.arguments(function)
        assert changes.keys() <= arguments.keys()
        return getattr(self.loaded, function)(*{**arguments, **changes}.values(), None)


FUNCTIONS = [name for name in library._ARGUMENTS if name.startswith(("rsaft_s", "rsaft_f", "rsaft_a"))]
TABLE_FUNCTIONS = [name for name in FUNCTIONS if name not in ("rsaft_finish_norm", "rsaft_adamw_coefficients")]


@pytest.fixture
def loaded(host_library, monkeypatch):
    monkeypatch.setenv(library.ENV, str(host_library))
    library.forget()
    yield library.load()
    library.forget()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_works_and_refuses_missing_pointers(loaded, function):
    problem = Problem(loaded)
    assert problem.call(function) == 0
    optional = {"first_inf", "tables", "inputs"} if function == "rsaft_finish_norm" else {"first_inf"}
    before = [w.view(torch.int16).clone() for w in problem.weight]
    for name, value in problem.arguments(function).items():
        if value not in (0, 1) and name not in optional:
            assert problem.call(function, **{name: None}) == INVALID, name
    if function == "rsaft_finish_norm":
        assert problem.call(function, tables=None) == INVALID and problem.call(function, inputs=None) == 0
    assert all(torch.equal(a, b.view(torch.int16)) for a, b in zip(before, problem.weight))


@pytest.mark.parametrize("function", TABLE_FUNCTIONS)
@pytest.mark.parametrize(
    ("field", "value"),
    [("chunk_size", 0), ("chunk_size", 264), ("chunk_size", -256), ("chunks", -1), ("tensors", -1)]
    + [(name, None) for name in ("addresses", "numel", "group", "chunk_tensor", "chunk_index")],
)
def test_a_broken_table_is_refused(loaded, function, field, value):
    problem = Problem(loaded)
    setattr(problem.struct, field, value)
    assert problem.call(function) == INVALID


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("rsaft_sum_of_squares", "sum_sq"),
        ("rsaft_sam_perturb", "perturbation_sums"),
        ("rsaft_sam_adamw_step", "coefficients"),
        ("rsaft_adamw_coefficients", "coefficients"),
        ("rsaft_adamw_coefficients", "steps"),
        ("rsaft_finish_norm", "steps"),
    ],
)
def test_a_table_without_the_memory_that_is_written_is_refused(loaded, function, field):
    problem = Problem(loaded)
    setattr(problem.struct, field, None)
    assert problem.call(function) == INVALID


@pytest.mark.parametrize(
    ("function", "name", "dtypes"),
    [
        ("rsaft_sum_of_squares", "grad", (ABSENT, U8, 9)),
        ("rsaft_sam_perturb", "grad", (ABSENT, U8, 9)),
        ("rsaft_sam_perturb", "weight", (ABSENT, U8, F32)),
        ("rsaft_sam_perturb", "backup", (ABSENT, F32, F16)),
        ("rsaft_sam_restore", "backup", (ABSENT, F32, F16)),
        ("rsaft_sam_adamw_step", "grad", (ABSENT, U8, 9)),
        ("rsaft_sam_adamw_step", "backup", (ABSENT, F32)),
        ("rsaft_sam_adamw_step", "exp_avg", (ABSENT, BF16, U8)),
        ("rsaft_sam_adamw_step", "exp_avg_sq", (ABSENT, F16, U8)),
    ],
)
def test_types_that_do_not_go_together_are_refused(loaded, function, name, dtypes):
    problem = Problem(loaded)
    for dtype in dtypes:
        problem.struct.dtypes[ROW[name]] = dtype
        assert problem.call(function) == INVALID, dtype


@pytest.mark.parametrize("function", ["rsaft_sam_perturb", "rsaft_sam_restore", "rsaft_sam_adamw_step"])
def test_a_master_is_float32_beside_low_precision_weights(loaded, function):
    problem = Problem(loaded, master=True)
    assert problem.call(function) == 0
    problem.struct.dtypes[ROW["master"]] = BF16
    assert problem.call(function) == INVALID
    problem = Problem(loaded, torch.float32, master=True)
    assert problem.call(function) == INVALID


@pytest.mark.parametrize("function", ["rsaft_sam_perturb", "rsaft_sam_adamw_step"])
def test_stochastic_rounding_is_for_bf16_without_a_master(loaded, function):
    problem = Problem(loaded)
    problem.struct.stochastic = 1
    assert problem.call(function) == 0
    problem.struct.parameter = None
    assert problem.call(function) == INVALID
    for other in (Problem(loaded, torch.float16), Problem(loaded, torch.float32), Problem(loaded, master=True)):
        other.struct.stochastic = 1
        assert other.call(function) == INVALID


def test_codes_need_both_lists_of_absmax(loaded):
    problem = Problem(loaded, state=torch.uint8)
    assert problem.call("rsaft_sam_adamw_step") == 0
    for name in ("exp_avg_absmax", "exp_avg_sq_absmax"):
        for dtype in (ABSENT, BF16):
            problem.struct.dtypes[ROW[name]] = dtype
            assert problem.call("rsaft_sam_adamw_step") == INVALID
        problem.struct.dtypes[ROW[name]] = F32


@pytest.mark.parametrize("function", ["rsaft_finish_norm", "rsaft_adamw_coefficients"])
def test_as_many_tables_as_a_launch_takes(loaded, function):
    problem = Problem(loaded)
    assert problem.call(function, count=16) == 0
    for count in (0, -1, 17):
        assert problem.call(function, count=count) == INVALID
    problem.tables[1] = None
    assert problem.call(function, count=2) == INVALID
    for field in ("hyper", "skip", "skipped"):
        problem = Problem(loaded)
        setattr(problem.inputs, field, None)
        assert problem.call(function) == INVALID, field


def test_slots_that_cannot_be_are_refused(loaded):
    problem = Problem(loaded)
    for changes in (dict(groups=-1), dict(rho=None)):
        assert problem.call("rsaft_finish_norm", **changes) == INVALID
    assert problem.call("rsaft_finish_norm", rho=None, groups=0) == 0
    problem.counts[0] = -1
    assert problem.call("rsaft_finish_norm") == INVALID


def test_images(loaded):
    out, grad = torch.full((2, 7), math.nan), torch.randn(2, 7)
    workspace = torch.zeros(2, dtype=torch.float64)

    def call(**changes):
        arguments = dict(out=out.data_ptr(), images=None, grad=grad.data_ptr(), out_dtype=F32, grad_dtype=F32)
        arguments |= dict(samples=2, elements=7, radius=-1.0, sign=0, workspace=workspace.data_ptr())
        return loaded.rsaft_perturb_images(*{**arguments, **changes}.values(), None)

    bad = [dict(out=None), dict(grad=None), dict(workspace=None), dict(samples=-1), dict(elements=-1)]
    bad += [dict(out_dtype=dtype) for dtype in (ABSENT, U8, 9)] + [dict(grad_dtype=dtype) for dtype in (ABSENT, U8)]
    bad += [dict(elements=2**63 - 32768)]
    for changes in bad:
        assert call(**changes) == INVALID, changes
        assert out.isnan().all()
    assert call(samples=0, out=None) == 0 and call(elements=0, grad=None) == 0
    assert call() == 0
    torch.testing.assert_close(out, -grad / grad.norm(dim=1, keepdim=True))
