"""Logging beside the training: nothing waits for a grid, nothing is lost, and no error goes unseen."""

from __future__ import annotations

import threading
import time

import pytest
from builders.messages import says
from builders.recipes import config
from PIL import Image

from rsaft_fast.background import Background
from rsaft_fast.errors import UserError
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train import run
from rsaft_fast.train.logging import RunLog, read_metrics
from rsaft_fast.train.loop import train


@pytest.fixture
def log(out):
    with RunLog(out, tensorboard=True) as log:
        log.open("seed: 0\n", 0, [])
        yield log


def picture() -> Image.Image:
    return Image.new("RGB", (8, 8), "#336699")


def test_a_grid_is_drawn_while_the_training_goes_on(log, out):
    may_draw, drawn_by = threading.Event(), []

    def draw():
        assert may_draw.wait(60)
        drawn_by.append(threading.current_thread())
        return picture()

    log.samples(draw, 1)
    log.metrics({"step": 1, "reward": 0.5})
    # On the disk already, whatever the grid does.
    assert read_metrics(out) == [{"step": 1, "reward": 0.5}] and not (out / "samples").exists()
    may_draw.set()
    log.flush()
    assert Image.open(out / "samples/step_1.png").size == (8, 8)
    assert drawn_by != [threading.main_thread()] and len(drawn_by) == 1


def test_everything_handed_over_is_there_after_close(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(out, tensorboard=True) as log:
        log.open("seed: 0\n", 0, [])
        for step in range(1, 13):
            log.metrics({"step": step, "reward": step / 4, "s1": None})
            log.samples(picture, step)
    assert len(list((out / "samples").iterdir())) == 12
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward")] == [(step, step / 4) for step in range(1, 13)]
    assert not [t for t in threading.enumerate() if t.name == "rsaft-fast writer"]


def broken() -> Image.Image:
    raise OSError("no space left on device")


def test_what_fails_beside_the_training_is_said_once_and_ends_nothing(out):
    said = []
    with RunLog(out, tensorboard=False, log=said.append) as log:
        log.open("seed: 0\n", 0, [])
        for step in (1, 2):
            log.samples(broken, step)
            log.metrics({"step": step, "reward": 1.0})
        log.samples(picture, 3)
        log.flush()
    assert len(said) == 1 and "sample grids" in said[0] and "no space left" in said[0]
    assert [record["step"] for record in read_metrics(out)] == [1, 2]
    assert [path.name for path in (out / "samples").iterdir()] == ["step_3.png"]


def test_a_tensorboard_that_cannot_be_written_ends_nothing(out):
    said = []
    out.mkdir()
    (out / "tensorboard").write_text("a file")
    with RunLog(out, tensorboard=True, log=said.append) as log:
        log.open("seed: 0\n", 0, [])
        log.metrics({"step": 1, "reward": 1.0})
        log.samples(picture, 1)
        log.flush()
    assert len(said) == 1 and "TensorBoard" in said[0]
    assert read_metrics(out) and (out / "samples/step_1.png").is_file()


@pytest.mark.parametrize("call", ["submit", "flush", "close"])
def test_an_error_in_the_background_is_raised_by_the_next_call_and_once(call):
    writer = Background("writer")
    writer.submit(broken)
    writer._jobs.join()
    with pytest.raises(OSError, match="no space left"):
        writer.submit(lambda: None) if call == "submit" else getattr(writer, call)()
    done = []
    writer.submit(lambda: done.append(1))
    writer.close()
    assert done == [1]


def test_what_ends_a_run_is_not_hidden_by_the_log(out):
    with pytest.raises(ZeroDivisionError), RunLog(out, tensorboard=False) as log:
        log.open("seed: 0\n", 0, [])
        log.samples(broken, 1)
        1 / 0  # noqa: B018


def test_the_queue_is_bounded():
    writer, release, done = Background("writer", most_waiting=2), threading.Event(), []
    for _ in range(3):  # one runs, two wait
        writer.submit(lambda: release.wait(60))
    fourth = threading.Thread(target=lambda: (writer.submit(lambda: None), done.append(1)))
    fourth.start()
    fourth.join(0.2)
    assert fourth.is_alive() and not done
    release.set()
    fourth.join(60)
    writer.close()
    assert done


def test_a_checkpoint_is_complete_only_when_the_log_before_it_is_on_the_disk(tiny, out, monkeypatch):
    compose, write, synced, seen = run.compose_grid, checkpoints.write_atomically, [], []

    def slowly(*arguments):
        time.sleep(0.3)
        return compose(*arguments)

    def watched(path, text):
        if path.name == checkpoints.MARKER:
            step = int(path.parent.name.removeprefix("step_"))
            seen.append((step, (out / f"samples/step_{step}.png").is_file(), len(read_metrics(out)), len(synced)))
        return write(path, text)

    fsync = run.RunLog.flush
    monkeypatch.setattr(run.RunLog, "flush", lambda log: (fsync(log), synced.append(1))[0])
    monkeypatch.setattr(run, "compose_grid", slowly)
    monkeypatch.setattr(checkpoints, "write_atomically", watched)
    train(config(tiny, out, max_steps=2, checkpoint_every=1, samples={"every": 1, "count": 1}))
    assert seen == [(1, True, 1, 1), (2, True, 2, 2)]


@pytest.mark.slow
def test_a_run_whose_grids_cannot_be_drawn_goes_on_and_draws_the_last_one_when_it_is_resumed(tiny, out, monkeypatch):
    grids = {"every": 1, "count": 1}
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(run, "compose_grid", lambda *arguments: broken())
        assert train(config(tiny, out, checkpoint_every=1, samples=grids), log=said.append).step == 2
    assert sum("no space left" in line for line in said) == 1
    assert checkpoints.newest(out / "checkpoints")[0].name == "step_2" and not (out / "samples").exists()
    train(config(tiny, out, checkpoint_every=1, samples=grids, resume="auto"))
    assert {path.name for path in (out / "samples").iterdir()} == {"step_0.png", "step_2.png"}


@pytest.mark.parametrize(
    ("content", "steps", "damaged"),
    [
        (b'{"step": 1}\n{"step": 2, "rew\n{"step": 3}\n', [1, 3], 1),
        (b'{"step": 1}\n\0\0\0\n\xff\xfe{}\n{"step": 4}\n', [1, 4], 2),
        (b'{"step": 1}\n' + b"\0" * (3 << 20) + b'\n{"step": 3}\n', [1, 3], 1),
        (b'[]\n"x"\n{"step": "1"}\n{"step": true}\n{"step": -1}\n{}\n{"step": 7}\n', [7], 6),
        (b"[" * 100_000 + b'\n{"step": 2}\n', [2], 1),
        (b'{"step": 1}\n{"step": 2, "re', [1], 0),
        (b"", [], 0),
    ],
)
def test_a_damaged_line_loses_no_other(out, content, steps, damaged):
    out.mkdir()
    (out / "metrics.jsonl").write_bytes(content)
    said = []
    assert [record["step"] for record in read_metrics(out, log=said.append)] == steps
    assert len(said) == bool(damaged) and all(says(damaged, "damaged").search(line) for line in said)


def test_metrics_that_are_no_file_of_lines_are_refused_before_anything_is_loaded(tiny, out, monkeypatch):
    train(config(tiny, out))
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").mkdir()
    monkeypatch.setattr(run, "Trainer", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(UserError, match=says("output_dir", "metrics.jsonl", "no file")):
        train(config(tiny, out, max_steps=3, resume="auto"))
    (out / "metrics.jsonl").rmdir()
    with (out / "metrics.jsonl").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(UserError, match=says("metrics.jsonl", 1099511627776)):
        train(config(tiny, out, max_steps=3, resume="auto"))


def test_a_resumed_run_keeps_a_copy_of_a_log_with_gaps(tiny, out):
    train(config(tiny, out))
    log = out / "metrics.jsonl"
    first, second = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first[:40] + b"\n" + second)
    said = []
    train(config(tiny, out, max_steps=3, resume="auto"), log=said.append)
    assert [record["step"] for record in read_metrics(out)] == [2, 3]
    assert (out / "superseded-1/metrics.jsonl").read_bytes() == first[:40] + b"\n" + second
    assert any(says(1, 2, "updates").search(line) for line in said)
