"""Trackers through accelerate: wandb without a network gets every figure and grid, and a broken one ends no run."""

from __future__ import annotations

import json
import struct
import typing

import pytest
from accelerate import tracking
from builders.messages import says
from builders.recipes import config

from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import Tracker as Names
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.logging import read_metrics
from rsaft_fast.train.loop import train


def test_every_tracker_of_accelerate_has_its_name_here():
    assert set(typing.get_args(Names)) == set(tracking.LOGGER_TYPE_TO_CLASS)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(tiny, out, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(UserError, match=says("logging.trackers", "aim", "pip install aim")):
        check_config(config(tiny, out, logging__trackers=["aim"]))
    assert check_config(config(tiny, out, logging__trackers=["tensorboard"])).prompts


@pytest.mark.slow
def test_wandb_gets_the_recipe_every_figure_and_the_grids(tiny, out, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = config(
        tiny, out, logging__trackers=["wandb"], logging__tensorboard=False, samples={"every": 2, "count": 1}
    )
    said: list[str] = []
    train(logged, log=said.append)
    assert not [line for line in said if "warning" in line]
    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    history, keys = [], {}
    for record in records_of(file):
        if record.history.item:
            history.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        for item in (*record.run.config.update, *record.config.update):
            keys[item.key] = json.loads(item.value_json)
    figures = {row["_step"]: row for row in history}
    for record in read_metrics(out):
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                assert figures[record["step"]][name] == pytest.approx(value), name
    assert keys["sampler.steps"] == 2 and keys["reward.path"] == str(tiny.clip)
    assert list(out.glob("wandb/offline-run-*/files/media/images/samples_*.png"))


def records_of(file):
    """What an offline run wrote: protobuf messages in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, offset, whole = file.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        left = 2**15 - offset % 2**15
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        if left < 7 or kind == 0:  # the rest of a block is empty
            offset += left
            continue
        whole += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tiny, out, monkeypatch):
    class Broken:
        requires_logging_directory = False

        def __init__(self, project, **options):
            assert project == "rsaft_fast"

        def store_init_configuration(self, values):
            pass

        def log(self, values, step):
            raise ConnectionError("the cable is out")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    said: list[str] = []
    outcome = train(config(tiny, out, logging__trackers=["wandb"], max_steps=3), log=said.append)
    assert outcome.step == 3 and len(read_metrics(out)) == 3
    assert sum(bool(says("warning", "wandb", "cable").search(line)) for line in said) == 1
