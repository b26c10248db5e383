"""Choosing a backend: order, forcing, and imports that survive without the optional ones."""

import subprocess
import sys

import pytest
import torch

from rsaft_fast import ops
from rsaft_fast.ops import backends, library

CPU = torch.device("cpu")


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
    assert [row.backend for row in rows] == ["cuda", "triton", "torch"]
    assert all(row.why for row in rows)
    assert rows[-1].available
    assert not rows[0].available and "not built" in rows[0].why


def test_the_cpu_takes_torch_by_itself(monkeypatch):
    monkeypatch.delenv("RSAFT_BACKEND", raising=False)
    assert backends.choose(CPU, (torch.float64,)) == "torch"


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch, no_library):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("RSAFT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="RSAFT_BACKEND=triton is forced, but Triton needs a CUDA device.*cpu"):
        ops.image_delta(torch.randn(2, 3), 0.1)
    monkeypatch.setenv("RSAFT_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="RSAFT_BACKEND=cuda is forced, but .*not built"):
        ops.image_delta(torch.randn(2, 3), 0.1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("RSAFT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16, not torch.float64"):
        ops.image_delta(torch.randn(2, 3, dtype=torch.float64), 0.1)


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("RSAFT_BACKEND", "tritton")
    with pytest.raises(ValueError, match="'tritton'.*cuda, triton, torch"):
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
    assert "[[-0.5, -0.5, -0.5, -0.5]]" in out and "available=False" in out and "triton is not installed" in out


def test_importing_loads_neither_triton_nor_dynamo():
    out = run(
        "import sys, rsaft_fast.ops, rsaft_fast.optim\n"
        "print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    )
    assert out.strip() == "[]"
