"""Choosing a backend: order, forcing, and imports that survive without the optional ones."""

import contextlib
import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from builders.messages import says

from ops.tables import SIZES, bits, random_table, same_bits
from ops.test_adamw import scalars_for, take_step
from rsaft_fast import ops
from rsaft_fast.ops import backends, library, reference

CPU = torch.device("cpu")
NEXT = [name for name in ("triton", "torch") if name == "torch" or importlib.util.find_spec("triton")]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """As if csrc/ had not been compiled, whatever this installation holds."""
    monkeypatch.setenv(library.ENV, str(tmp_path / "absent.so"))
    library.forget()
    yield
    library.forget()


def test_describe_lists_every_backend_in_order(no_library):
    rows = backends.describe()
    assert [row.backend for row in rows] == ["cuda", "triton", "cpu", "torch"]
    assert all(row.why for row in rows)
    assert rows[-1].available
    for row, compiler in ((rows[0], "nvcc"), (rows[2], "C++ compiler")):
        assert not row.available and "not built" in row.why and compiler in row.why


class LibraryOfAnotherCard:
    """Built and served by its driver, but without code for the card; or with a card that fails."""

    def __init__(self, error: int, driver: int = 13010):
        self.error, self.driver = error, driver

    def rsaft_cuda_versions(self, runtime, driver) -> int:
        runtime._obj.value, driver._obj.value = 13000, self.driver
        return 0

    def rsaft_cuda_serves_device(self) -> int:
        return self.error

    def rsaft_cuda_architectures(self) -> bytes:
        return b"800,900,1000"

    def rsaft_error_string(self, error: int) -> bytes:
        return b"no kernel image" if error == 209 else b"out of memory"


@pytest.mark.parametrize(
    ("error", "capability", "index", "why"),
    [
        (209, (7, 5), 0, says("8.0, 9.0, 10.0", 7.5)),
        (209, (12, 0), None, says("8.0, 9.0, 10.0", "12.0", "RSAFT_ARCHITECTURES=120")),
        (2, (9, 0), 1, says("error 2", "out of memory")),
        (0, (9, 0), 0, None),
    ],
)
def test_a_card_that_the_library_has_no_code_for_falls_to_the_next(monkeypatch, error, capability, index, why):
    asked = []
    monkeypatch.delenv("RSAFT_BACKEND", raising=False)
    monkeypatch.setattr(library, "load", lambda wanted: LibraryOfAnotherCard(error))
    monkeypatch.setattr(torch.cuda, "device", lambda index: asked.append(index) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    library.why_not.cache_clear()
    try:
        device = torch.device("cuda" if index is None else f"cuda:{index}")
        obstacle = backends.why_not("cuda", device)
        assert (obstacle is None) == (why is None) and (why is None or re.search(why, obstacle))
        assert backends.choose(device) == ("cuda" if why is None else NEXT[0])
        assert set(asked) == {3 if index is None else index}
    finally:
        library.why_not.cache_clear()


@pytest.mark.parametrize(("driver", "why"), [(0, "no NVIDIA driver"), (12040, r"13\.0 .*12\.4: update the driver")])
def test_without_a_driver_that_fits_the_driver_is_named(monkeypatch, driver, why):
    """torch then sees no GPU, and the doctor asks about the CPU."""
    built = LibraryOfAnotherCard(0, driver)
    monkeypatch.setattr(library, "load", lambda wanted: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    library.why_not.cache_clear()
    try:
        (row,) = (row for row in backends.describe() if row.backend == "cuda")
        assert not row.available and re.search(why, row.why), row.why
    finally:
        library.why_not.cache_clear()


def test_the_answer_for_the_current_card_follows_it(monkeypatch):
    asked, current = [], [0]
    monkeypatch.delenv("RSAFT_BACKEND", raising=False)
    monkeypatch.setattr(library, "why_not", lambda kind, wanted, index: asked.append(index))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    for current[0] in (0, 1):
        backends.why_not("cuda", torch.device("cuda"))
        assert asked[-1] == current[0]


def test_an_error_of_the_library_for_host_memory_is_not_called_cudas(cpu_libraries, monkeypatch):
    monkeypatch.setenv(library.ENV, str(cpu_libraries / library.CPU_ANY))
    library.forget()
    try:
        with pytest.raises(library.LibraryError, match="^error 1: "):
            library.check(library.load("cpu"), 1)
    finally:
        library.forget()


@pytest.fixture
def free_choice(cpu_libraries, monkeypatch):
    """As if the CPU library were built for any processor, and nothing forced."""
    monkeypatch.setenv(library.ENV, str(cpu_libraries / library.CPU_ANY))
    monkeypatch.delenv("RSAFT_BACKEND", raising=False)
    library.forget()
    yield
    library.forget()


def test_the_cpu_takes_its_library_where_it_is_and_torch_for_float64(free_choice):
    assert backends.choose(CPU, (torch.float32, torch.bfloat16)) == backends.choose(CPU) == "cpu"
    assert backends.choose(CPU, (torch.float64,)) == backends.choose(torch.device("meta")) == "torch"
    assert "on cpu" in backends.why_not("cpu", torch.device("cuda"))


def test_the_cpu_takes_torch_by_itself_where_nothing_is_built(monkeypatch, no_library):
    monkeypatch.delenv("RSAFT_BACKEND", raising=False)
    assert backends.choose(CPU, (torch.float32,)) == "torch"


def test_a_float64_table_beside_others_steps_in_torch(free_choice):
    """One norm over both, made by what takes both."""
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0], dtype=torch.float64)]
    tables = [ops.TensorTable([torch.ones_like(g)]) for g in grads]
    for table, grad in zip(tables, grads):
        table.bind(grad=[grad], exp_avg=[torch.zeros_like(grad)], exp_avg_sq=[torch.zeros_like(grad)])
    scalars = ops.StepScalars("cpu")
    scalars.hyper.copy_(torch.tensor([[0.1, 0.9, 0.999, 0.0, 0.0, float("inf")]]))
    norm = ops.global_norm(tables, inputs=ops.StepInputs(scalars))
    ops.sam_adamw_step_(tables[0], scalars)
    ops.adamw_coefficients_(tables[1], norm, ops.StepInputs(scalars))
    assert norm.norm.item() == pytest.approx(5.0, rel=1e-12)
    assert tables[0]["weight"][0][0].item() == pytest.approx(0.9, rel=1e-6)


def test_processors_and_threads_agree_to_the_bit(cpu_libraries, monkeypatch):
    """The library for any processor and the one for AVX2, on one thread and on more: norm, sums, weights, codes."""
    seen = []
    threads = torch.get_num_threads()
    monkeypatch.setenv("RSAFT_BACKEND", "cpu")
    for path in sorted(cpu_libraries.glob("*.so")):
        if path.name == library.CPU_AVX2 and not library.has_avx2():
            continue
        monkeypatch.setenv(library.ENV, str(path))
        library.forget()
        for count in (1, 3):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(50)
            table, _ = random_table(
                "cpu", torch.bfloat16, generator, (*SIZES, (4 * ops.CHUNK + 9,)), state_bits=8, rounding_seed=3
            )
            first = ops.global_norm(table, rho=1.0)
            ops.sam_perturb_(table, first)
            take_step(table, scalars_for("cpu"), first=first, restore=True)
            lists = ("weight", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
            tensors = [t for name in lists for t in table[name]]
            seen.append(bits([first.values, table.perturbation_sums, *tensors]))
    torch.set_num_threads(threads)
    library.forget()
    assert len(seen) >= 2 and all(same_bits(seen[0], other) for other in seen[1:])


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch, no_library):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("RSAFT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=says("RSAFT_BACKEND=triton", "CUDA device", "cpu", "TRITON_INTERPRET=1")):
        ops.image_delta(torch.randn(2, 3), 0.1)
    monkeypatch.setenv("RSAFT_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=says("RSAFT_BACKEND=cuda", "not built", "nvcc")):
        ops.image_delta(torch.randn(2, 3), 0.1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("RSAFT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=says("float32", "bfloat16", "float16", "torch.float64")):
        ops.image_delta(torch.randn(2, 3, dtype=torch.float64), 0.1)


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("RSAFT_BACKEND", "tritton")
    with pytest.raises(ValueError, match=says("'tritton'", "cuda, triton, cpu, torch")):
        ops.image_delta(torch.randn(2, 3), 0.1)


def test_everything_works_where_triton_is_missing():
    out = run(
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch; from rsaft_fast import ops; from rsaft_fast.optim import SAMAdamW\n"
        "w = torch.nn.Parameter(torch.ones(3)); opt = SAMAdamW([w]); w.sum().backward(); opt.perturb(); opt.step()\n"
        "print(ops.image_delta(torch.ones(1, 4), 1.0).tolist(), ops.backends.describe()[1])"
    )
    assert "[[-0.5, -0.5, -0.5, -0.5]]" in out and "available=False" in out and "not installed" in out


def test_importing_loads_neither_triton_nor_dynamo():
    out = run(
        "import sys, rsaft_fast.ops, rsaft_fast.optim\n"
        "print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    )
    assert out.strip() == "[]"


@pytest.mark.parametrize("options", [{"state_bits": 8, "rounding_seed": 3}, {"master": True}, {"adaptive": True}])
def test_pieces_of_a_tensor_are_the_tensor(options, monkeypatch):
    """What torch does on the CPU piece by piece, to keep it in a cache, is what it does at once."""
    monkeypatch.setenv("RSAFT_BACKEND", "torch")
    seen = []
    for piece in (ops.CHUNK, 1 << 30):
        monkeypatch.setattr(reference, "PIECE", piece)
        table, _ = random_table(
            "cpu", torch.bfloat16, torch.Generator().manual_seed(51), (*SIZES, (2 * ops.CHUNK + 300,)), **options
        )
        table.steps.fill_(2)
        norm = ops.GradientNorm("cpu")
        norm.norm.fill_(1.0)
        norm.scale.fill_(1e-2)
        ops.sam_perturb_(table, norm)
        scalars = scalars_for("cpu")
        ops.adamw_coefficients_(table, norm, ops.StepInputs(scalars))
        grads = table["grad"]
        ops.sam_adamw_step_(table, scalars, first=norm, restore=True)
        ops.sam_adamw_step_tensor_(table, len(grads) - 1, grads[-1], scalars, first=norm, restore=False)
        written = [name for name in ("weight", "master", "exp_avg", "exp_avg_sq", "exp_avg_absmax") if name in table]
        seen.append((bits([t for name in written for t in table[name]]), table.perturbation_sums.sum(0)))
    assert same_bits(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-9, atol=0)
