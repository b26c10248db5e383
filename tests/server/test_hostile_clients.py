"""Clients that are silent, slow, many or greedy: they end, and the others do not notice. Everything on 127.0.0.1."""

from __future__ import annotations

import base64
import http.client
import io
import json
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median

import pytest
import torch
from builders.messages import says
from builders.reward_server import TOKEN, Mean, detail, request, serving
from PIL import Image
from safetensors.torch import save

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import wire
from rsaft_fast.rewards.remote import RemoteReward
from rsaft_fast.server import Limits, app, bodies, connections_that_fit

# Short enough to wait for.
HASTY = {"idle": 0.4, "head": 0.4, "grace": 0.4, "ending": 0.4, "min_rate": 1000.0}
HEADERS = {"Authorization": f"Bearer {TOKEN}", wire.PROTOCOL_HEADER: str(wire.PROTOCOL)}


@pytest.fixture(scope="module")
def hasty():
    with serving({"mean": Mean()}, **HASTY) as url:
        yield url


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def head(path="/mean", length=1000, token=TOKEN):
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: here",
        f"Authorization: Bearer {token}",
        f"{wire.PROTOCOL_HEADER}: {wire.PROTOCOL}",
        f"Content-Type: {wire.TENSORS}",
        f"Content-Length: {length}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def drip(connection, first, drop, seconds=3.0):
    """Send `first`, then `drop` twenty times a second; the answer until the server hangs up, and after how long."""
    connection.settimeout(0.05)
    began, answer = time.monotonic(), b""
    connection.sendall(first)
    while time.monotonic() - began < seconds:
        try:
            connection.send(drop)
            data = connection.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            break
        if not data:
            break
        answer += data
    else:
        pytest.fail(f"still open after {seconds} s")
    return answer, time.monotonic() - began


@pytest.mark.parametrize(
    "first, drop",
    [
        (b"", b""),
        (b"", b"\r\n"),
        (b"GET / HT", b""),
        (b"GET / HTTP/1.1\r\nHost: here\r\n", b"X"),
        (b"GET / HTTP/1.1\r\nHost: here\r\nX: ", b"x"),
        # A request that was answered, and then the same again.
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", b""),
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", b"G"),
    ],
    ids=["silent", "lines", "half", "name", "value", "idle", "again"],
)
def test_who_asks_for_nothing_is_hung_up_on(hasty, first, drop):
    with connect(hasty) as connection:
        _, seconds = drip(connection, first, drop)
    assert seconds < 2


def test_a_slow_body_is_told_so(hasty):
    with connect(hasty) as connection:
        answer, seconds = drip(connection, head(), b"x")
    status, _, body = answer.partition(b"\r\n\r\n")
    assert b" 408 " in status and b"1000 bytes a second" in body and seconds < 2
    # Who is refused does not stay by going on to send.
    with connect(hasty) as connection:
        answer, seconds = drip(connection, head(token="wrong"), b"x")
    assert b" 401 " in answer and seconds < 2
    with serving({"mean": Mean()}, timeout=0.6, **(HASTY | {"min_rate": 0.0})) as url, connect(url) as connection:
        answer, _ = drip(connection, head(), b"x")
    assert b" 408 " in answer and b"the limit is 0.6 s" in answer


def test_silent_connections_give_way_to_those_that_ask():
    with ExitStack() as stack:
        url = stack.enter_context(serving({"mean": Mean()}, max_connections=20))
        waiting = stack.enter_context(connect(url))
        waiting.sendall(head(length=400))
        silent = [stack.enter_context(connect(url)) for _ in range(100)]
        for connection in silent[::3]:
            connection.sendall(b"GET / HT")
        seconds = []
        for _ in range(20):
            began = time.monotonic()
            assert request(url, method="GET", path="/")[0] == 200
            seconds.append(time.monotonic() - began)
        assert max(seconds) < 1
        # The one whose request is under way kept its place.
        body = wire.encode_request(torch.zeros(1, 3, 4, 4), ["2"]).ljust(400)
        waiting.sendall(body)
        assert waiting.recv(100).startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize("soft, hard, fitting", [(256, 256, True), (256, 4096, True), (45, 45, False)])
def test_connections_leave_room_for_files(monkeypatch, soft, hard, fitting):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    raised = []
    if fitting:
        count = connections_that_fit(Limits(max_connections=10_000))
        assert 8 <= count < hard - 60 and raised == ([(hard, hard)] if soft < hard else [])
    else:
        with pytest.raises(UserError, match=says("files", 45, 8, "ulimit -n")):
            connections_that_fit(Limits())


def test_a_kept_connection_is_no_slower_than_a_new_one(hasty):
    host = hasty.removeprefix("http://")
    body = wire.encode_request(torch.zeros(1, 3, 4, 4), ["2"])

    def ask(connection):
        began = time.perf_counter()
        connection.request("POST", "/mean", body, HEADERS | {"Content-Type": wire.TENSORS})
        assert connection.getresponse().read()
        return time.perf_counter() - began

    fresh, kept, keeping = [], [], http.client.HTTPConnection(host, timeout=5)
    for _ in range(60):  # by turns, so that both meet the same neighbours
        connection = http.client.HTTPConnection(host, timeout=5)
        fresh.append(ask(connection))
        connection.close()
        kept.append(ask(keeping))
    keeping.close()
    assert median(kept) <= 1.2 * median(fresh)


def long_prompts():
    text = json.dumps(["x" * 20_000_000])
    image = torch.zeros(1, 3, 4, 4)
    tensors = save({"images": image, "prompts": torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)})
    just = save({"images": image, "prompts": torch.tensor(list(b'["' + b"y" * 10_001 + b'"]'), dtype=torch.uint8)})
    Image.new("RGB", (4, 4)).save(stream := io.BytesIO(), "PNG")
    picture = base64.b64encode(stream.getvalue()).decode()
    return [
        (wire.TENSORS, tensors),
        (wire.TENSORS, just),
        (wire.JSON, json.dumps({"prompts": ["x" * 20_000_000], "images": [picture]}).encode()),
        (wire.JSON, json.dumps({"prompts": ["漢" * 10_001], "images": [picture]}).encode()),
    ]


@pytest.mark.parametrize("kind, body", long_prompts(), ids=["tensors", "just", "json", "escapes"])
def test_a_prompt_beyond_the_limit_is_refused(hasty, kind, body):
    began = time.monotonic()
    status, text = detail(hasty, path="/mean", body=body, kind=kind)
    assert status == 413 and says(10000, "--max-prompt").search(text) and time.monotonic() - began < 5


def test_the_client_knows_the_limit_of_prompts():
    with serving({"mean": Mean()}, max_prompt=20) as url:
        remote = RemoteReward(url, TOKEN)
        image = torch.zeros(1, 3, 4, 4)
        assert remote.score(image, ["2".rjust(20)]).item() == 2
        for act in (lambda: remote.score(image, ["2".rjust(21)]), lambda: remote.keep_prompts(["2", "2".rjust(21)])):
            with pytest.raises(UserError, match=says("prompt", 21, 20, "--max-prompt")):
                act()
        with pytest.raises(UserError, match=says("prompt 0", r"'\ud800'")):
            remote.score(image, ["a\ud800"])


@pytest.mark.parametrize("shape", [(1, 3, 1, 5000), (1, 3, 4000, 2)])
def test_thin_pictures_are_refused(hasty, shape):
    status, text = detail(hasty, path="/mean", body=wire.encode_request(torch.zeros(shape), ["1"]))
    assert status == 413 and f"{shape[3]}x{shape[2]} pixels" in text and says(10).search(text)
    Image.new("L", (shape[3], shape[2])).save(stream := io.BytesIO(), "PNG")
    body = json.dumps({"prompts": ["1"], "images": [base64.b64encode(stream.getvalue()).decode()]}).encode()
    assert detail(hasty, path="/mean", body=body, kind=wire.JSON)[0] == 413


@pytest.mark.parametrize(
    "body, status",
    [
        (b'{"images": [' + b"[]," * 700_000 + b'0], "prompts": []}', 400),
        (b'{"images": [1, 2], "prompts": ["a", "b"]}', 400),
        (b'{"images": {"a": 1}, "prompts": ["a"]}', 400),
        (b'{"images": ["\\ud800"], "prompts": ["a"]}', 400),
        (json.dumps({"images": [base64.b64encode(b"no picture").decode()], "prompts": ["a"]}).encode(), 400),
    ],
    ids=["bomb", "numbers", "object", "surrogate", "garbage"],
)
def test_what_is_refused_tells_nothing_of_the_inside(hasty, body, status):
    found, text = detail(hasty, path="/mean", body=body, kind=wire.JSON)
    assert found == status and " at 0x" not in text and len(text) <= 500


def test_a_half_surrogate_is_malformed(hasty):
    text = torch.tensor(list(b'["\\ud800"]'), dtype=torch.uint8)
    status, text = detail(hasty, path="/mean", body=save({"images": torch.zeros(1, 3, 4, 4), "prompts": text}))
    assert status == 400 and says("prompt 0", r"'\ud800'").search(text)


def test_others_are_answered_while_a_picture_is_unpacked(monkeypatch):
    began = threading.Event()

    def slow(*arguments, **options):
        began.set()
        time.sleep(0.5)
        return torch.zeros(1, 3, 4, 4)

    monkeypatch.setattr(bodies, "read_picture", slow)
    body = json.dumps({"prompts": ["3"], "images": [base64.b64encode(b"x").decode()]}).encode()
    with serving({"mean": Mean()}) as url, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(request, url, path="/mean", body=body, kind=wire.JSON)
        assert began.wait(5)
        for _ in range(3):
            assert request(url, method="GET", path="/")[0] == 200
        assert RemoteReward(url, TOKEN).score(torch.zeros(1, 3, 4, 4), ["2"]).item() == 2
        assert not answer.done()
        assert json.loads(answer.result()[1]) == {"scores": [3.0]}


def test_who_has_gone_is_not_computed_for():
    reward = Mean(seconds=0.3)
    body = wire.encode_request(torch.zeros(1, 3, 4, 4), ["2"])
    with serving({"mean": reward}, max_pictures=1) as url:
        for _ in range(6):
            with connect(url) as connection:
                connection.sendall(head(length=len(body)) + body)
                time.sleep(0.02)
        remote = RemoteReward(url, TOKEN)
        assert remote.score(torch.zeros(1, 3, 4, 4), ["2"]).item() == 2
    assert len(reward.calls) <= 3


def test_bodies_together_have_a_limit_too():
    with serving({"mean": Mean()}, max_held_bytes=3000) as url, connect(url) as one, connect(url) as two:
        one.sendall(head(length=2500) + b"x" * 2400)
        time.sleep(0.1)
        two.sendall(head(length=2500) + b"x" * 2400)
        assert b" 503 " in two.recv(1000)
        one.sendall(b"x" * 100)
        assert b" 400 " in one.recv(1000)
        # What was held is free again.
        assert request(url, path="/mean", body=wire.encode_request(torch.zeros(1, 3, 8, 8), ["2"]))[0] == 200


def test_a_body_is_held_for_as_long_as_its_thread_reads_it(monkeypatch):
    """Although its client has gone, and whoever comes next finds no room."""
    began, go_on, unpack = threading.Event(), threading.Event(), app._UNPACK[wire.TENSORS]

    def slow(body, limits):
        began.set()
        go_on.wait(5)
        return unpack(body, limits)

    monkeypatch.setitem(app._UNPACK, wire.TENSORS, slow)
    body = wire.encode_request(torch.zeros(1, 3, 8, 8), ["2"])
    with serving({"mean": Mean()}, max_held_bytes=len(body) + 100) as url:
        try:
            with connect(url) as connection:
                connection.sendall(head(length=len(body)) + body)
                assert began.wait(5)
            time.sleep(0.2)
            assert request(url, path="/mean", body=body)[0] == 503
        finally:
            go_on.set()
        time.sleep(0.1)
        assert request(url, path="/mean", body=body)[0] == 200


def test_the_end_waits_for_no_half_request():
    with ExitStack() as stack:
        with serving({"mean": Mean()}) as url:
            for first in (b"", b"GET / HT", head() + b"half"):
                stack.enter_context(connect(url)).sendall(first)
            time.sleep(0.1)
            began = time.monotonic()
        assert time.monotonic() - began < 2


def test_another_reward_under_the_same_name_does_not_score(hasty):
    remote = RemoteReward(hasty, TOKEN)
    image = torch.zeros(1, 3, 4, 4)
    assert remote.score(image, ["2"]).item() == 2
    other = Mean()
    other.spec = type(other.spec)("mean", sha256="1" * 64)
    with serving({"mean": other}) as url:
        # As if that one had been started at the address of the first.
        remote._address = RemoteReward(url, TOKEN)._address
        with pytest.raises(UserError, match=says(409, "mean", "another reward")):
            remote.score(image, ["2"])
