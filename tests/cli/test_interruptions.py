"""A run killed, terminated and interrupted as a process of its own: the command line's, or a fork of one that has
everything imported."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from builders.fork_server import ForkServer
from builders.messages import says
from builders.recipes import Tiny, recipe, start_cli, write_recipe
from safetensors.torch import load_file

from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.logging import read_metrics

pytestmark = pytest.mark.slow  # nine runs

STEPS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def prepare(tiny: Tiny, tmp_path: Path, name: str, **overrides) -> tuple[Path, Path]:
    """Folder and recipe of a run."""
    out = tmp_path / name
    raw = recipe(tiny, out, max_steps=STEPS, checkpoint_every=2, keep_checkpoints=2, ema={"decay": 0.9}, **overrides)
    return out, write_recipe(tmp_path / f"{name}.yaml", raw)


def wait_for_update(running: Callable[[], bool], out: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        records = read_metrics(out)
        if records and records[-1]["step"] >= step:
            return
        assert running(), f"ended before update {step}"
        time.sleep(0.005)
    raise AssertionError(f"update {step} did not come")


@pytest.fixture(scope="module")
def unbroken(server, tiny, tmp_path_factory) -> Path:
    """The run that nothing disturbs."""
    out, file = prepare(tiny, tmp_path_factory.mktemp("unbroken"), "run")
    done = server.run(["train", file])
    assert done.code == 0, done.said
    return out


def assert_same_end(out: Path, unbroken: Path) -> None:
    """The same bits: weights, optimizer state, running mean, exported LoRA, and every logged figure but the time."""
    last = f"checkpoints/step_{STEPS}"
    for name in ("weights", "optimizer", "ema"):
        one, two = (load_file(run / last / f"{name}.safetensors") for run in (out, unbroken))
        assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one), name
    for name in (f"{last}/state.json", "lora/pytorch_lora_weights.safetensors"):
        assert (out / name).read_bytes() == (unbroken / name).read_bytes()
    logs = [[{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(run)] for run in (out, unbroken)]
    assert logs[0] == logs[1] and [record["step"] for record in logs[0]] == list(range(1, STEPS + 1))


def test_killed_at_a_random_moment_and_resumed_it_ends_with_the_same_bits(server, tiny, tmp_path, unbroken):
    out, file = prepare(tiny, tmp_path, "killed")
    child = server.start(["train", file])
    wait_for_update(lambda: child.running, out, random.SystemRandom().randint(1, STEPS - 1))
    time.sleep(random.SystemRandom().uniform(0, 0.3))
    child.send_signal(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL or (out / "lora").is_dir()
    done = server.run(["train", file, "resume=auto"])
    assert done.code == 0, done.said
    assert_same_end(out, unbroken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_update_saves_and_says_how_to_go_on(server, tiny, tmp_path, unbroken, number, code):
    out, file = prepare(tiny, tmp_path, "stopped")
    process = start_cli(["train", file], cwd=tmp_path)
    wait_for_update(lambda: process.poll() is None, out, 2)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == code
    stopped = read_metrics(out)[-1]["step"]
    assert 2 <= stopped < STEPS
    folder, passed_over = checkpoints.newest(out / "checkpoints")
    assert folder.name == f"step_{stopped}" and not passed_over
    assert re.search(rf"rsaft-fast: {number.name}: finishing update \d, then saving; again to stop", error), error
    said = error.strip().splitlines()[-1]
    assert said == (f"rsaft-fast: stopped by {number.name} after update {stopped} of {STEPS}; go on with resume={out}")
    done = server.run(["train", file, f"resume={out}"])
    assert done.code == 0, done.said
    assert says(folder, f"update {stopped}").search(done.said)
    assert_same_end(out, unbroken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once_and_leaves_whole_checkpoints(tiny, tmp_path, number, code):
    # Updates long enough to be caught inside, which is where the one after a checkpoint is.
    out, file = prepare(tiny, tmp_path, "aborted", sampler={"steps": 150})
    process = start_cli(["train", file], cwd=tmp_path)
    wait_for_update(lambda: process.poll() is None, out, 2)
    while checkpoints.newest(out / "checkpoints")[0] is None:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code, error
    assert "interrupted at once" in error and "Traceback" not in error
    folder, passed_over = checkpoints.newest(out / "checkpoints")
    assert folder.name == "step_2" and not passed_over
    assert len(read_metrics(out)) == 2
