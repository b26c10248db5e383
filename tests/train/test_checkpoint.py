"""A checkpoint is whole or is never loaded: cut short at every write, at every byte count, altered, or unmarked."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from builders.messages import says

from rsaft_fast.errors import UserError
from rsaft_fast.files import write_atomically
from rsaft_fast.train.checkpoint import Checkpoint, find_fault, newest, pack, read, unpack, write


def make(step: int, seed: int = 0) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed + step)
    weights = {
        "a.lora_A": torch.randn(3, 5, generator=generator),
        "b": torch.randn(4, 2, 3, 3, generator=generator).bfloat16().to(memory_format=torch.channels_last),
        "empty": torch.empty(0, 4),
    }
    moments = {0: {"exp_avg": torch.randn(3, 5, generator=generator), "step": torch.tensor(float(step))}}
    groups = [{"lr": 1e-5 / 3, "betas": (0.9, 0.999), "params": [0], "fused": None, "rho": float("inf")}]
    return Checkpoint(
        step,
        weights,
        {"state": moments, "param_groups": groups, "skipped": torch.tensor(2)},
        {"mean": {"a.lora_A": torch.randn(3, 5, generator=generator)}},
        info={"torch": "x"},
    )


def export(folder: Path) -> None:
    (folder / "lora").mkdir()
    (folder / "lora" / "file.bin").write_bytes(bytes(range(100)))


def assert_equal(ours: Checkpoint, other: Checkpoint) -> None:
    assert (ours.step, ours.info) == (other.step, other.info)
    for a, b in ((ours.weights, other.weights), (ours.copies["mean"], other.copies["mean"])):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name])
    (one, tree), (two, other_tree) = pack(ours.optimizer), pack(other.optimizer)
    assert tree == other_tree and one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_written_is_read_back(tmp_path):
    saved = make(4)
    folder = write(tmp_path, saved, "seed: 0\n", export)
    assert folder.name == "step_4" and find_fault(folder) is None
    assert (folder / "config.yaml").read_text() == "seed: 0\n"
    assert_equal(read(folder), saved)
    assert isinstance(read(folder).optimizer["param_groups"][0]["betas"], tuple)
    assert list(read(folder).optimizer["state"]) == [0]
    listed = json.loads((folder / "COMPLETE").read_text())
    assert set(listed) == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"COMPLETE"}


def test_no_ema_is_none(tmp_path):
    saved = make(1)
    saved.copies = {}
    assert read(write(tmp_path, saved, "")).copies == {}


def test_tensors_that_share_memory_are_saved(tmp_path):
    saved = make(1)
    saved.weights = {"a": saved.weights["a.lora_A"], "tied": saved.weights["a.lora_A"]}
    loaded = read(write(tmp_path, saved, ""))
    assert torch.equal(loaded.weights["a"], loaded.weights["tied"])


def test_pack_refuses_what_json_cannot_hold():
    with pytest.raises(TypeError, match=says("a.1", "dtype")):
        pack({"a": [1, torch.float32]})
    with pytest.raises(TypeError, match="function"):
        pack(lambda: None)
    tree = {"x": [1, (2.5, None, True)], 3: {"y": torch.arange(3)}}
    tensors, document = pack(tree)
    again = unpack(json.loads(json.dumps(document)), tensors)
    assert again["x"] == tree["x"] and torch.equal(again[3]["y"], tree[3]["y"])


def each_file(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def two(tmp_path) -> Path:
    """Two complete checkpoints, of steps 2 and 4."""
    write(tmp_path / "run", make(2), "seed: 0\n", export)
    write(tmp_path / "run", make(4), "seed: 0\n", export)
    return tmp_path / "run"


def damaged_copies(root: Path, tmp_path: Path):
    """(what was done, copy of root with it done to step_4), for every file: gone, shorter, longer, a bit flipped."""
    rng = random.Random(5)
    for name in each_file(root / "step_4"):
        if name == "config.yaml":
            continue  # for people, and theirs to write in
        size = (root / "step_4" / name).stat().st_size
        lengths = {0, 1, size - 1, *(rng.randrange(size) for _ in range(4))}
        damages = [("gone", None), ("longer", size + 1), *(("cut", length) for length in sorted(lengths))]
        damages += [("flipped", rng.randrange(size)) for _ in range(4)]
        for kind, amount in damages:
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(root, copy)
            path = copy / "step_4" / name
            if kind == "gone":
                path.unlink()
            elif kind == "flipped":
                content = bytearray(path.read_bytes())
                content[amount] ^= 1 << rng.randrange(8)
                path.write_bytes(content)
            else:
                path.write_bytes((path.read_bytes() + b"\0")[:amount])
            yield f"{name} {kind} {amount}", copy


def test_a_checkpoint_that_is_cut_or_altered_anywhere_is_never_loaded(two, tmp_path):
    tried = 0
    for what, copy in damaged_copies(two, tmp_path):
        tried += 1
        if what.startswith("COMPLETE longer"):
            continue  # tested below: a marker with more in it is no JSON
        found, lines = newest(copy)
        # A bit flipped inside the marker may leave its meaning as it was (white space): then all files are intact.
        if found != copy / "step_2":
            assert what.startswith("COMPLETE flipped"), what
            assert_equal(read(found), make(4))
            continue
        assert len(lines) == 1 and "step_4" in lines[0], what
        with pytest.raises(UserError, match=says(copy / "step_4", "cannot be used")):
            read(copy / "step_4")
        assert_equal(read(found), make(2))
    assert tried > 50


def test_a_marker_with_something_behind_it_is_no_marker(two):
    marker = two / "step_4" / "COMPLETE"
    marker.write_text(marker.read_text() + "\0")
    assert "damaged" in find_fault(two / "step_4")
    marker.write_text("{}")
    assert "empty" in find_fault(two / "step_4")
    marker.write_text("[1]")
    assert "damaged" in find_fault(two / "step_4")


@pytest.mark.slow
def test_killed_at_every_write_it_leaves_the_old_or_the_new(tmp_path):
    """The process dies at its n-th fsync or rename, for every n, while step_4 is being written."""
    outcomes = []
    for n in range(1, 100):
        root = tmp_path / f"run{n}"
        write(root, make(2), "", export, keep=1)
        child = os.fork()
        if child == 0:
            _die_at(n)
            write(root, make(4), "", export, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found, _ = newest(root)
        assert_equal(read(found), make(int(found.name.removeprefix("step_"))))
        outcomes.append(found.name)
        # A later run writes over whatever was left.
        write(root, make(4, seed=9), "", export, keep=1)
        assert_equal(read(root / "step_4"), make(4, seed=9))
        assert sorted(p.name for p in root.iterdir()) == ["step_4"]
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert outcomes[0] == "step_2" and outcomes[-1] == "step_4" and len(outcomes) > 8
    assert outcomes == sorted(outcomes)


def _die_at(n: int) -> None:
    """From now on, the n-th fsync, rename or replace of this process ends it instead."""
    left = [n]

    def dying(call):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapper

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, dying(getattr(os, name)))


def test_pruning_keeps_the_newest_and_clears_what_a_kill_left(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, make(step), "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_2", "step_3"]
    (tmp_path / ".step_9.tmp").mkdir()
    (tmp_path / "step_7").mkdir()
    (tmp_path / "notes").mkdir()
    write(tmp_path, make(5), "", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_3", "step_5"]


def test_a_damaged_later_checkpoint_never_pushes_out_a_good_one(two):
    (two / "step_4" / "weights.safetensors").write_bytes(b"x")
    write(two, make(3), "", keep=1)
    assert newest(two) == (two / "step_3", [])


def test_newest_of_nothing_is_none(tmp_path):
    assert newest(tmp_path / "absent") == (None, [])
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_3").write_text("a file")
    assert newest(tmp_path) == (None, [])


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    child = os.fork()
    if child == 0:
        _die_at(2)  # the rename, after the new content's fsync
        write_atomically(path, "new" * 1000)
        os._exit(0)
    os.waitpid(child, 0)
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
