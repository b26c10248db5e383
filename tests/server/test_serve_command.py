"""`rsaft-fast serve` as a process of its own, and what it refuses."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from builders.messages import says
from builders.recipes import environment
from builders.reward_server import Mean
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.commands.serve import _announce, _listen
from rsaft_fast.rewards import wire


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(folder, local, tmp_path, capsys, monkeypatch):
    command = [sys.executable, "-m", "rsaft_fast", "serve", "--reward", f"pickscore={folder}", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().split()[-1]
        token = process.stdout.readline().strip().partition("=")[2]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/pickscore", address) and len(token) >= 32
        rng = np.random.default_rng(1)
        for name in "ab":
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
        (tmp_path / "prompts.txt").write_text("a red ox\n")
        monkeypatch.setenv(wire.TOKEN_VARIABLE, token)
        common = [str(tmp_path), "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
        for reward, name in ((f"remote={address}", "there"), (f"pickscore={folder}", "here")):
            assert main(["score", *common, "--reward", reward, "--output", str(tmp_path / f"{name}.csv")]) == 0
        columns = [
            [line.rsplit(",", 1)[1] for line in (tmp_path / f"{name}.csv").read_text().splitlines()[1:]]
            for name in ("there", "here")
        ]
        assert columns[0] == columns[1] and len(columns[0]) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert token not in process.stderr.read()
        again = [
            "score",
            *common,
            "--reward",
            f"remote={address},patience=0.2",
            "--output",
            str(tmp_path / "again.csv"),
        ]
        assert main(again) == 2
        assert "2 tries" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()


def test_the_command_refuses_what_cannot_work(folder, monkeypatch, capsys):
    def attempt(*arguments):
        assert main(["serve", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
        return captured.err

    reward = ["--reward", f"clip={folder}"]
    taken = socket.create_server(("127.0.0.1", 0))
    assert str(taken.getsockname()[1]) in attempt(*reward, "--port", str(taken.getsockname()[1]))
    taken.close()
    assert "two rewards" in attempt(*reward, "--reward", f"clip={folder},scale=cosine")
    monkeypatch.setenv(wire.TOKEN_VARIABLE, "short")
    assert says("token", 5, 16).search(attempt(*reward, "--port", "0"))


def test_listening_beyond_this_machine_is_warned_of(capsys):
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        with _listen(host, 0) as listener:
            _announce(listener, {"mean": Mean()}, None)
        printed = capsys.readouterr().out
        assert ("loopback" in printed) == warned
        assert f"http://{host}:" in printed and wire.TOKEN_VARIABLE not in printed
