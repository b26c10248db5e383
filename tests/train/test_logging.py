"""Logging beside the training: nothing waits for a grid, nothing is lost, and no error goes unseen."""

from __future__ import annotations

import threading
import time

import pytest
from builders.recipes import config
from PIL import Image

from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train import loop
from rsaft_fast.train.background import BackgroundWriter
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


@pytest.mark.parametrize("call", ["metrics", "samples", "flush", "close"])
def test_an_error_in_the_background_is_raised_by_the_next_call_and_once(log, out, call):
    log.samples(broken, 1)
    log._writer._jobs.join()
    following = {
        "metrics": lambda: log.metrics({"step": 1, "reward": 1.0}),
        "samples": lambda: log.samples(picture, 2),
        "flush": log.flush,
        "close": log.close,
    }[call]
    with pytest.raises(OSError, match="no space left"):
        following()
    if call != "close":
        log.samples(picture, 3)
        log.flush()
        assert (out / "samples/step_3.png").is_file()


def test_a_line_of_figures_is_written_although_the_grid_before_it_failed(log, out):
    log.samples(broken, 1)
    log._writer._jobs.join()
    with pytest.raises(OSError):
        log.metrics({"step": 1, "reward": 1.0})
    assert read_metrics(out) == [{"step": 1, "reward": 1.0}]


def test_what_ends_a_run_is_not_hidden_by_the_log(out):
    with pytest.raises(ZeroDivisionError), RunLog(out, tensorboard=False) as log:
        log.open("seed: 0\n", 0, [])
        log.samples(broken, 1)
        1 / 0  # noqa: B018


def test_the_queue_is_bounded():
    writer, release, done = BackgroundWriter(most_waiting=2), threading.Event(), []
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
    compose, write, synced, seen = loop.compose_grid, checkpoints.write_atomically, [], []

    def slowly(*arguments):
        time.sleep(0.3)
        return compose(*arguments)

    def watched(path, text):
        if path.name == checkpoints.MARKER:
            step = int(path.parent.name.removeprefix("step_"))
            seen.append((step, (out / f"samples/step_{step}.png").is_file(), len(read_metrics(out)), len(synced)))
        return write(path, text)

    fsync = loop.RunLog.flush
    monkeypatch.setattr(loop.RunLog, "flush", lambda log: (fsync(log), synced.append(1))[0])
    monkeypatch.setattr(loop, "compose_grid", slowly)
    monkeypatch.setattr(checkpoints, "write_atomically", watched)
    train(config(tiny, out, max_steps=2, checkpoint_every=1, samples={"every": 1, "count": 1}))
    assert seen == [(1, True, 1, 1), (2, True, 2, 2)]


def test_a_grid_that_cannot_be_written_ends_the_run_with_its_own_error(tiny, out, monkeypatch):
    monkeypatch.setattr(loop, "compose_grid", lambda *arguments: broken())
    with pytest.raises(OSError, match="no space left"):
        train(config(tiny, out, max_steps=2, checkpoint_every=1, samples={"every": 1, "count": 1}))
    assert checkpoints.newest(out / "checkpoints")[0] is None, "nothing was declared complete"
