"""What goes wrong in a run folder: forged checkpoints, disks that fail, names that are taken, numbers beyond sense."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
import torch
from builders.messages import says
from builders.recipes import config, recipe
from safetensors.torch import load_file, save_file

from rsaft_fast import files
from rsaft_fast.data.batches import PromptBatches
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.load import validate
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train import run, trainer
from rsaft_fast.train.logging import RunLog, read_metrics
from rsaft_fast.train.loop import train


@pytest.fixture(scope="module")
def once(tiny, tmp_path_factory) -> Path:
    """A run of two updates."""
    folder = tmp_path_factory.mktemp("once") / "run"
    train(config(tiny, folder, ema={"decay": 0.5}))
    return folder


@pytest.fixture
def finished(once, out) -> Path:
    """The checkpoint of a copy of it."""
    shutil.copytree(once, out)
    return out / "checkpoints/step_2"


def forge(folder: Path, name: str, content: bytes) -> None:
    """Change a file, and the marker with it."""
    (folder / name).write_bytes(content)
    marker = json.loads((folder / "COMPLETE").read_text())
    marker[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "COMPLETE").write_text(json.dumps(marker))


def forge_state(folder: Path, **changes) -> None:
    state = json.loads((folder / "state.json").read_text())
    forge(folder, "state.json", json.dumps({k: v for k, v in (state | changes).items() if v is not None}).encode())


def forge_tensors(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    forge(folder, name, (folder / name).read_bytes())


def resume(tiny, out: Path) -> str:
    """The one line with which a run refuses to go on; everything in its folder stays."""
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as raised:
        train(config(tiny, out, max_steps=3, resume="auto", ema={"decay": 0.5}))
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_newer_format_is_refused_and_never_passed_over(tiny, out, finished):
    # What older versions can read says so: further copies and an algorithm's state alone need the newest.
    assert json.loads((finished / "state.json").read_text())["format"] == 1
    newest = checkpoints.FORMAT
    forge_state(finished, format=newest + 1)
    line = resume(tiny, out)
    assert f"format {newest + 1}" in line and f"up to {newest}" in line and str(finished) in line


def test_a_checkpoint_from_before_there_was_a_number_loads(tiny, out, finished):
    forge_state(finished, format=None)
    state = json.loads((finished / "state.json").read_text())
    del state["info"]["optimizer"]
    forge(finished, "state.json", json.dumps(state).encode())
    assert train(config(tiny, out, max_steps=3, resume="auto", ema={"decay": 0.5})).step == 3


def first(tensors: dict) -> str:
    return next(name for name, tensor in tensors.items() if tensor.ndim == 2)


DAMAGES = {
    "step of another": lambda f: forge_state(f, step=7),
    "step no number": lambda f: forge_state(f, step="2"),
    "no info": lambda f: forge_state(f, info=[1]),
    "state no object": lambda f: forge(f, "state.json", b"[]"),
    "state no JSON": lambda f: forge(f, "state.json", b"\xff{"),
    "state too deep": lambda f: forge(f, "state.json", b'{"optimizer":' + b"[" * 10**5),
    "optimizer of nothing": lambda f: forge_state(f, optimizer={"dict": []}),
    "unknown kind": lambda f: forge_state(f, optimizer={"code": "x"}),
    "key that is none": lambda f: forge_state(f, optimizer={"dict": [[[1], {"value": 1}]]}),
    "tensor missing": lambda f: forge_tensors(f, "optimizer.safetensors", lambda t: t.pop(first(t))),
    "tensor too many": lambda f: forge_tensors(f, "optimizer.safetensors", lambda t: t.update(x=torch.zeros(1))),
    "moment of another shape": lambda f: forge_tensors(
        f, "optimizer.safetensors", lambda t: t.update({first(t): torch.zeros(1)})
    ),
    "weight missing": lambda f: forge_tensors(f, "weights.safetensors", lambda t: t.pop(first(t))),
    "weight too many": lambda f: forge_tensors(f, "weights.safetensors", lambda t: t.update(x=torch.zeros(1))),
    "weight of another shape": lambda f: forge_tensors(
        f, "weights.safetensors", lambda t: t.update({first(t): torch.zeros(1, 1)})
    ),
    "mean of another shape": lambda f: forge_tensors(
        f, "ema.safetensors", lambda t: t.update({first(t): torch.zeros(1, 1)})
    ),
    "weights cut": lambda f: forge(f, "weights.safetensors", (f / "weights.safetensors").read_bytes()[:-7]),
    "mean a pickle": lambda f: forge(f, "ema.safetensors", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "mean a folder": lambda f: ((f / "ema.safetensors").unlink(), (f / "ema.safetensors").mkdir()),
    "a name outside": lambda f: forge(f, "../../config.yaml", b"seed: 0"),
    "marker a folder": lambda f: ((f / "COMPLETE").unlink(), (f / "COMPLETE").mkdir()),
    "marker of one file": lambda f: (f / "COMPLETE").write_text('{"config.yaml": {"bytes": 1, "sha256": ""}}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_forged_checkpoint_is_refused_in_a_line(tiny, out, finished, damage):
    damage(finished)
    assert str(finished) in (line := resume(tiny, out)) or "the checkpoint's" in line


def test_the_state_of_another_order_of_parameters_is_refused(tiny, out):
    groups = {"groups": [{"match": "lora_A", "rho": 0.1}]}
    train(config(tiny, out, smoothing={"parameters": groups}))
    groups["groups"][0]["match"] = "lora_B"
    with pytest.raises(UserError, match=says("optimizer", "[32, 32]", "smoothing.parameters.groups")):
        train(config(tiny, out, max_steps=3, resume="auto", smoothing={"parameters": groups}))


def test_settings_of_the_optimizer_are_the_recipes_after_a_resume(tiny, out):
    train(config(tiny, out))
    seen = []
    optimizer, grids = {"lr": 1e-2, "weight_decay": 0.5}, {"every": 1, "count": 1}
    train(
        config(tiny, out, max_steps=3, resume="auto", optimizer=optimizer, samples=grids),
        on_samples=lambda trainer, images, step: seen.append(trainer.optimizer.param_groups[0]["weight_decay"]),
    )
    assert seen[-1] == 0.5


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_what_is_written_has_the_umasks_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = tmp_path / ".lora.tmp"
        (folder / "sub").mkdir(parents=True)
        for name in ("a.safetensors", "sub/b.safetensors"):
            save_file({"a": torch.zeros(2)}, folder / name)
        files.replace_folder(folder, tmp_path / "lora")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "lora").rglob("*") if p.is_file()}
    assert modes == {0o666 & ~umask} and len(list((tmp_path / "lora").rglob("*"))) == 3


def test_everything_in_a_run_folder_can_be_read_like_the_rest(tiny, out):
    train(config(tiny, out, parameters={"train": "full"}))
    assert len({stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()}) == 1
    assert len({stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_dir()}) == 1


def make_file(path: Path) -> None:
    path.write_text("kept")


def make_link(path: Path) -> None:
    path.symlink_to(path.parent)


@pytest.mark.parametrize(
    ("name", "make", "overrides"),
    [
        ("lora", make_file, {}),
        ("lora", make_link, {}),
        ("unet", make_file, {"parameters": {"train": "full"}}),
        ("checkpoints", make_file, {}),
        ("samples", make_file, {}),
        ("config.yaml", Path.mkdir, {}),
    ],
)
def test_a_name_that_is_taken_is_known_before_anything_is_loaded(tiny, out, monkeypatch, name, make, overrides):
    out.mkdir()
    make(out / name)
    monkeypatch.setattr(run, "Trainer", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(UserError, match=says("output_dir", out / name)):
        train(config(tiny, out, resume="auto", **overrides))
    assert [path.name for path in out.iterdir()] == [name]


def test_a_model_that_lies_where_the_trained_one_would_is_never_replaced(tiny, out):
    (out / "unet").mkdir(parents=True)
    (out / "unet/config.json").write_text("{}")
    with pytest.raises(UserError, match=says("output_dir", out / "unet")):
        train(config(tiny, out, parameters={"train": "full"}))
    assert (out / "unet/config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("section", "key", "value", "most"),
    [
        ("data", "batch_size", 10**12, 65536),
        ("data", "accumulate", 10**12, 65536),
        ("sampler", "steps", 10**9, 1000),
        ("method", "n_extra", 10**9, 1000),
        ("denoising", "levels", 10**9, 1000),
        ("denoising", "batch_size", 10**9, 65536),
        (None, "max_steps", 2**32, 2**32 - 2),
    ],
)
def test_numbers_that_nothing_could_hold_are_errors_at_once(tiny, out, section, key, value, most):
    raw = recipe(tiny, out, method={"name": "draft_lv"}, denoising={"images": "x"})
    (raw[section] if section else raw)[key] = value
    started = time.perf_counter()
    with pytest.raises(UserError, match=says(f"{section}.{key}" if section else key, value, f"{most:g}")):
        validate(raw, where="the recipe")
    assert time.perf_counter() - started < 1


def test_so_are_two_that_multiply_to_one(tiny, out):
    with pytest.raises(UserError, match=says("data.batch_size 4096", "data.accumulate 32", 131072, 65536)):
        train(config(tiny, out, data__batch_size=4096, data__accumulate=32))
    assert not out.exists()


@pytest.mark.parametrize("first_step", [0, 3])
def test_a_run_without_end_begins_at_once_with_every_prompt(tiny, out, first_step):
    settings = config(tiny, out, max_steps=10**9, data__batch_size=3)
    prompts = [str(n) for n in range(1000)]
    batches = PromptBatches(settings.data, prompts, 0)
    started = time.perf_counter()
    assert set(batches.visited(range(first_step, 10**9))) == set(prompts)
    assert time.perf_counter() - started < 1
    some = batches.visited(range(first_step, first_step + 2))
    assert some == [text for step in (first_step, first_step + 1) for text in batches.texts(step)]


@pytest.mark.slow
def test_a_grid_that_a_signal_kept_from_being_drawn_is_drawn_when_the_run_goes_on(tiny, tmp_path, monkeypatch):
    import signal

    grids = {"every": 2, "count": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config(tiny, whole, max_steps=4, checkpoint_every=3, samples=grids))
    honest = trainer.update

    def stopped(*args, **kwargs):
        if len(read_metrics(broken)) == 1:
            signal.raise_signal(signal.SIGTERM)
        return honest(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", stopped)
        outcome = train(config(tiny, broken, max_steps=4, checkpoint_every=3, samples=grids))
    assert outcome.step == 2 and not (broken / "samples/step_2.png").exists()
    seen = []
    train(
        config(tiny, broken, max_steps=4, checkpoint_every=3, samples=grids, resume="auto"),
        on_samples=lambda trainer, images, step: seen.append(step),
    )
    assert seen == [0, 2, 4]
    names = ("step_0.png", "step_2.png", "step_4.png")
    assert all((whole / "samples" / n).read_bytes() == (broken / "samples" / n).read_bytes() for n in names)


def full_disk(number: int = errno.ENOSPC):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE])
def test_a_checkpoint_that_cannot_be_written_is_told_with_what_is_safe(tiny, out, monkeypatch, number):
    honest, calls = checkpoints.save_file, []

    def fails_later(tensors, path):
        calls.append(path)
        if "step_2" in str(path):
            raise checkpoints.SafetensorError(f"Error while serializing: I/O error: no (os error {number})")
        honest(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", fails_later)
    with pytest.raises(UserError) as raised:
        train(config(tiny, out, max_steps=3, checkpoint_every=1))
    line = str(raised.value)
    assert os.strerror(number) in line and errno.errorcode[number] in line and "weights.safetensors" in line
    assert says(out / "checkpoints/step_1", "update 1 of 3").search(line) and "resume=auto" in line
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_1"]


def test_an_export_that_cannot_be_written_loses_neither_the_run_nor_the_one_before(tiny, out, monkeypatch):
    train(config(tiny, out))
    before = (out / "lora/pytorch_lora_weights.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "replace_folder", full_disk())
        with pytest.raises(UserError, match=says("ENOSPC", "step_3", "update 3 of 3", "resume=auto")):
            train(config(tiny, out, max_steps=3, resume="auto"))
    assert (out / "lora/pytorch_lora_weights.safetensors").read_bytes() == before and not list(out.glob(".*"))
    outcome = train(config(tiny, out, max_steps=3, resume="auto"))
    assert outcome.step == 3 and (out / "lora/pytorch_lora_weights.safetensors").read_bytes() != before


def test_a_log_that_cannot_be_written_is_told_with_what_is_safe(tiny, out, monkeypatch):
    honest = RunLog.metrics

    def fails_later(log, record):
        if record["step"] == 2:
            monkeypatch.setattr(log, "_metrics", open("/dev/full", "w"))
        honest(log, record)

    monkeypatch.setattr(RunLog, "metrics", fails_later)
    with pytest.raises(UserError, match=says("metrics.jsonl", "ENOSPC", "step_1", "update 1 of 3")):
        train(config(tiny, out, max_steps=3, checkpoint_every=1))
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp") or path.name == ".lock"]


def test_old_checkpoints_that_cannot_be_deleted_end_nothing(tiny, out, monkeypatch):
    monkeypatch.setattr(checkpoints, "prune", full_disk(errno.EACCES))
    said = []
    assert train(config(tiny, out, checkpoint_every=1), log=said.append).step == 2
    assert sum("could not be deleted" in line and "EACCES" in line for line in said) == 2


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(tiny, out, finished, monkeypatch):
    monkeypatch.setattr(checkpoints, "sha256_of", full_disk(errno.EIO))
    assert "EIO" in resume(tiny, out)
