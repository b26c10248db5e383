"""One process in a folder: who holds it is named, a dead one holds nothing, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading

import pytest
from builders.messages import says
from builders.recipes import config

from rsaft_fast.commands.output import output_folder
from rsaft_fast.data.encodings import EncodingCache
from rsaft_fast.errors import UserError
from rsaft_fast.lock import LOCK, FolderHeldError, sole_writer
from rsaft_fast.train import run
from rsaft_fast.train.loop import train


def in_threads(work, count=4):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_the_holder_is_named_and_what_was_made_goes_again(tmp_path):
    folder = tmp_path / "a" / "b"
    with sole_writer(folder, "output_dir"):
        with pytest.raises(FolderHeldError) as raised, sole_writer(folder, "output_dir"):
            pass
        assert f"process {os.getpid()} on {socket.gethostname()} since 2" in str(raised.value)
        assert str(folder) in str(raised.value)
        # By another way to the same folder, too.
        (tmp_path / "link").symlink_to(tmp_path / "a")
        with pytest.raises(FolderHeldError), sole_writer(tmp_path / "link" / "b", "output_dir"):
            pass
    assert not (tmp_path / "a").exists()
    with sole_writer(folder, "output_dir"):
        (folder / "kept").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_process_that_died_holds_nothing(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2020-01-01 00:00:00"}))
    child = os.fork()
    if child == 0:
        held = sole_writer(tmp_path, "output_dir")
        held.__enter__()
        os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    with sole_writer(tmp_path, "output_dir"):
        pass
    assert not (tmp_path / LOCK).exists()


def test_many_at_once_are_one_after_the_other(tmp_path):
    inside, most, errors, done = [], [], [], []

    def work():
        for _ in range(40):
            try:
                with sole_writer(tmp_path / "run", "output_dir"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    done.append(1)
            except FolderHeldError:
                pass
            except Exception as error:
                errors.append(error)

    in_threads(work)
    assert not errors and max(most) == 1 and len(done) >= 40
    assert not list(tmp_path.glob("run/*"))


def test_a_file_system_without_locks_is_said_and_goes_on(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / LOCK).write_text(json.dumps({"pid": 77, "host": "elsewhere", "since": "2020-01-01 00:00:00"}))
    said = []
    with sole_writer(tmp_path, "output_dir", said.append):
        assert len(said) == 1 and "no locks" in said[0] and "process 77 on elsewhere" in said[0]


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"[1]", b'{"pid": "x"}'])
def test_a_holder_that_left_no_name_is_a_holder(tmp_path, content):
    with sole_writer(tmp_path, "output_dir"):
        (tmp_path / LOCK).write_bytes(content)
        with (
            pytest.raises(FolderHeldError, match=says("output_dir", tmp_path, "a process")),
            sole_writer(tmp_path, "output_dir"),
        ):
            pass


def test_a_folder_that_cannot_be_made_is_an_error_not_an_endless_try(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(OSError), sole_writer(tmp_path / "link", "output_dir"):
        pass


def test_a_second_run_is_refused_before_anything_is_loaded(tiny, out, monkeypatch):
    monkeypatch.setattr(run.Run, "load", lambda run: pytest.fail("loaded"))
    for resume in (None, "auto"):
        with (
            sole_writer(out, "output_dir"),
            pytest.raises(UserError, match=says("output_dir", out, f"process {os.getpid()} on")),
        ):
            train(config(tiny, out, resume=resume))
    assert not out.exists()


def test_two_commands_at_once_write_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with output_folder(None, "samples") as one, output_folder(None, "samples") as two:
        assert (one.name, two.name) == ("samples", "samples-2")
        with (
            pytest.raises(UserError, match=says("--output", "samples", f"process {os.getpid()} on")),
            output_folder("samples", "samples"),
        ):
            pass
        (one / "a.png").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]
    with pytest.raises(UserError, match=says("--output", "samples", "empty")), output_folder("samples", "samples"):
        pass
    with output_folder(None, "samples") as third:
        assert third.name == "samples-2"


def test_many_writers_of_one_encoding_leave_a_whole_one(tmp_path, monkeypatch):
    import torch

    # As on two machines: the same process number.
    monkeypatch.setattr(os, "getpid", lambda: 1)
    cache, errors = EncodingCache(tmp_path), []
    row = {"embeds": torch.arange(50_000.0).view(1, -1)}

    def work():
        try:
            for _ in range(20):
                cache.write("ab" * 32, row)
                assert torch.equal(cache.read("ab" * 32)["embeds"], row["embeds"])
        except Exception as error:
            errors.append(error)

    in_threads(work)
    assert not errors
    assert [path.name for path in (tmp_path / "ab").iterdir()] == ["ab" * 32 + ".safetensors"]
