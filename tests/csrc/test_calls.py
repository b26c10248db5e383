"""How the library is called: what is kept between calls belongs to the objects that it was kept for."""

import copy
import ctypes
import io
import subprocess
from pathlib import Path

import pytest
import torch
from builders.messages import says
from ops.tables import bits, random_table, same_bits
from ops.test_adamw import scalars_for, take_step

from rsaft_fast import ops
from rsaft_fast.ops import cuda, library


@pytest.fixture(autouse=True)
def host(host_library, monkeypatch):
    monkeypatch.setenv("RSAFT_BACKEND", "cuda")
    monkeypatch.setenv(library.ENV, str(host_library))
    library.forget()
    yield
    library.forget()


def test_the_structs_are_those_of_the_header(tmp_path):
    """Sizes and offsets as the C compiler has them."""
    names = [name for name, _ in cuda._Table._fields_]
    prints = [f'printf("%zu\\n", offsetof(rsaft_table, {name}));' for name in names]
    prints += [f'printf("%zu\\n", offsetof(rsaft_step_inputs, {name}));' for name, _ in cuda._Inputs._fields_]
    prints += ['printf("%zu\\n%zu\\n", sizeof(rsaft_table), sizeof(rsaft_step_inputs));']
    source = '#include <cstddef>\n#include <cstdio>\n#include "rsaft.h"\nint main() {' + "\n".join(prints) + "}"
    (tmp_path / "layout.cpp").write_text(source)
    include = Path(__file__).parents[2] / "csrc"
    subprocess.run(["g++", f"-I{include}", tmp_path / "layout.cpp", "-o", tmp_path / "layout"], check=True)
    said = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout.split()
    ours = [getattr(cuda._Table, name).offset for name in names]
    ours += [getattr(cuda._Inputs, name).offset for name, _ in cuda._Inputs._fields_]
    ours += [ctypes.sizeof(cuda._Table), ctypes.sizeof(cuda._Inputs)]
    assert [int(word) for word in said] == ours


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_writes_to_its_own_memory(how):
    norm, scalars = ops.GradientNorm("cpu"), scalars_for("cpu")
    table, _ = random_table("cpu", torch.float32, torch.Generator().manual_seed(1), [(300,)])
    take_step(table, scalars, first=norm, restore=False)
    ops.global_norm(table, rho=1.0, out=norm)
    before = norm.values.clone(), scalars.skip.clone()
    if how == "deepcopy":
        other_norm, other_scalars = copy.deepcopy((norm, scalars))
    else:
        file = io.BytesIO()
        torch.save((norm, scalars), file)
        file.seek(0)
        other_norm, other_scalars = torch.load(file, weights_only=False)
    other, _ = random_table("cpu", torch.float32, torch.Generator().manual_seed(2), [(300,)])
    other["grad"][0][7] = float("nan")
    ops.global_norm(other, rho=1.0, out=other_norm, inputs=ops.StepInputs(other_scalars))
    ops.sam_adamw_step_(other, other_scalars)
    assert other_norm.found_inf == 1 and other_scalars.skip == 1
    assert torch.equal(norm.values, before[0]) and norm.found_inf == 0 and torch.equal(scalars.skip, before[1])


def test_lists_that_come_and_go_are_followed():
    """A struct a set of bound lists: a master bound later counts, a released gradient list is refused."""
    table, _ = random_table("cpu", torch.bfloat16, torch.Generator().manual_seed(3), [(300,)])
    norm = ops.global_norm(table, rho=1.0)
    ops.sam_perturb_(table, norm)
    ops.sam_restore_(table, norm)
    old = bits(table["weight"])
    masters = [w.float() + 0.5 for w in table["weight"]]
    table.bind(master=masters)
    ops.sam_restore_(table, norm)
    assert same_bits(bits(table["weight"]), bits([m.bfloat16() for m in masters]))
    table.release("master")
    table["backup"][0].view(torch.int16).copy_(old[0])
    ops.sam_restore_(table, norm)
    assert same_bits(bits(table["weight"]), old)
    table.release("grad")
    with pytest.raises(library.LibraryError, match=says("error 1", "invalid argument")):
        cuda.sam_perturb_(table, norm)
    assert same_bits(bits(table["weight"]), old)


def test_scalars_of_another_step_are_not_those_of_the_last():
    """Flags at new addresses (a GradScaler makes them anew) take the place of the old ones."""
    table, _ = random_table("cpu", torch.float32, torch.Generator().manual_seed(4), [(300,)])
    scalars = scalars_for("cpu")
    for flag in (1.0, 0.0, None, 1.0):
        take_step(table, scalars, found_inf=None if flag is None else torch.tensor(flag))
        assert scalars.skip.item() == (flag or 0.0)


def test_more_tables_than_a_launch_takes_are_refused():
    tables = [random_table("cpu", torch.float32, torch.Generator(), [(3,)])[0] for _ in range(17)]
    with pytest.raises(ValueError, match=says("tables", 17, 16)):
        ops.global_norm(tables)


def test_images_in_two_groups_are_perturbed_as_each_alone():
    images, grad = torch.rand(3, 3 * 1024 * 1024), torch.randn(3, 3 * 1024 * 1024)  # 12.6 MB each, two a group
    moved = ops.perturb_images(images, grad, 0.1)
    for sample in range(3):
        one = slice(sample, sample + 1)
        assert torch.equal(moved[one], ops.perturb_images(images[one].clone(), grad[one].clone(), 0.1))
