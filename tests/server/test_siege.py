"""A minute of silent, slow and greedy clients against the command itself, by hand: pytest -m campaign."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
import threading
import time
from statistics import median

import pytest
from builders.recipes import environment
from builders.reward_server import TOKEN, request

from rsaft_fast.rewards import wire

FILES = 256
SECONDS = 60


@pytest.mark.campaign
def test_good_requests_keep_their_pace_for_a_minute():
    command = [sys.executable, "-m", "rsaft_fast", "serve", "--reward", "clip=playground/brittle", "--port", "0"]
    server = subprocess.Popen(
        [*command, "--device", "cpu"],
        env=environment() | {wire.TOKEN_VARIABLE: TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
    )
    stop = threading.Event()
    try:
        port = int(re.search(r":(\d+)/clip", server.stdout.readline())[1])
        url = f"http://127.0.0.1:{port}"

        def pace(seconds):
            times, end = [], time.monotonic() + seconds
            while time.monotonic() < end:
                began = time.perf_counter()
                assert request(url, method="GET", path="/")[0] == 200
                times.append(time.perf_counter() - began)
                time.sleep(0.02)
            return sorted(times)

        before = pace(5)
        authorization = f"Authorization: Bearer {TOKEN}\r\n{wire.PROTOCOL_HEADER}: 1\r\n"
        body = f"POST /clip HTTP/1.1\r\nHost: h\r\nContent-Type: {wire.TENSORS}\r\nContent-Length: 100000\r\n"
        # Of each kind so many, each begun anew when it is hung up on: what they say first, and then every second.
        kinds = [
            (200, b"", b""),
            (20, b"GET / HTTP/1.1\r\nHost: h\r\nX: ", b"x"),
            (10, body.encode() + b"\r\n", b"x"),
            (10, (body + authorization).encode() + b"\r\n", b"x"),
        ]
        besiegers = [
            threading.Thread(target=besiege, args=(port, first, drop, stop), daemon=True)
            for count, first, drop in kinds
            for _ in range(count)
        ]
        for besieger in besiegers:
            besieger.start()
        during = pace(SECONDS)
        print(f"median {median(before) * 1e3:.1f} ms before, {median(during) * 1e3:.1f} ms in the siege, of")
        print(f"{len(during)}; the slowest {during[-1] * 1e3:.0f} ms")
        assert median(during) <= 2 * median(before) + 0.005 and during[-1] < 2
        assert pace(1)
    finally:
        stop.set()
        server.terminate()
        errors = server.communicate(timeout=20)[1]
    assert "Traceback" not in errors


def besiege(port, first, drop, stop):
    while not stop.wait(0.05):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(first)
                while not stop.is_set():
                    if drop:
                        connection.send(drop)
                    try:
                        if not connection.recv(4096):
                            break
                    except TimeoutError:
                        pass
        except OSError:
            pass
