"""Files that are no files: pipes, devices, folders, names that cannot be; and those that are too large."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from builders.messages import says

from rsaft_fast.errors import UserError
from rsaft_fast.reading import read_limited, read_text
from rsaft_fast.rewards.calibration import read_calibration
from rsaft_fast.rewards.geneval_tasks import load_tasks


def refused(path, limit=8) -> str:
    """What is said, which must come at once and be one line."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_text(path, "prompt file", limit)
    assert time.monotonic() - began < 2 and "\n" not in str(caught.value) and "\0" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    socket.socket(socket.AF_UNIX).bind(str(tmp_path / "socket"))
    for name, words in [
        ("pipe", "a pipe"),
        ("zero", "a device"),
        ("", "a folder"),
        ("loop", "/loop"),
        ("socket", "/socket"),
        ("absent", "No such file"),
        ("x" * 300, "name too long"),
        ("a\0b", "embedded null byte"),
        ("\ud800", "no file has such a name"),
    ]:
        assert words in refused(f"{tmp_path}/{name}"), name


@pytest.mark.parametrize("read", [read_calibration, lambda path: load_tasks(path, ["cow"])])
def test_every_reader_of_a_named_file_refuses_them(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, words in [
        ("pipe", "a pipe"),
        ("zero", "a device"),
        ("x" * 300, "name too long"),
        ("absent", "No such file"),
    ]:
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)


def test_a_pipe_that_somebody_writes_to_is_refused_too(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: os.close(os.open(tmp_path / "pipe", os.O_WRONLY)))
    writer.start()
    time.sleep(0.05)
    assert "a pipe" in refused(tmp_path / "pipe")
    writer.join(2)
    assert not writer.is_alive()


def test_the_limit_holds_for_files_that_announce_nothing(tmp_path):
    (tmp_path / "a").write_text("12345678")
    assert read_limited(tmp_path / "a", "file", 8) == b"12345678"
    assert says("bytes", 8, 7).search(refused(tmp_path / "a", 7))
    if os.path.exists("/proc/self/status"):
        assert os.stat("/proc/self/status").st_size == 0
        assert says("limit", 20).search(refused("/proc/self/status", 20))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"M\xe4dchen", says("/a'", "UTF-8", "byte 1")),
        ("ab".encode("utf-16"), says("/a'", "byte 0", "UTF-16")),
        ("a\nb".encode("utf-16-le"), says("line 1", "NUL")),
        (b"a\nb\0", says("line 2", "NUL")),
    ],
)
def test_other_encodings_are_named(tmp_path, content, words):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_text(tmp_path / "a", "prompt file", 99)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes("Mädchen".encode("utf-8-sig"))
    assert read_text(tmp_path / "a", "prompt file", 99) == "Mädchen"
