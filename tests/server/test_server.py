"""A real server on a free port: the scores' bits, concurrent clients, and what can be wrong on either side."""

from __future__ import annotations

import base64
import http.client
import http.server
import io
import json
import os
import pickle
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders.messages import says
from builders.recipes import config
from builders.reward_server import QUICK, TOKEN, Mean, detail, request, serving
from PIL import Image
from safetensors.torch import save

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import RewardSettings, load_reward, wire
from rsaft_fast.rewards import remote as remote_module
from rsaft_fast.rewards.remote import RemoteReward
from rsaft_fast.train.inputs import check_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_scores_are_the_local_ones_bit_for_bit(server, local, dtype, count):
    remote = RemoteReward(f"{server}/clip", TOKEN, patience=QUICK)
    images = (torch.rand(count, 3, 21, 18) * 1.2 - 0.1).to(dtype)
    prompts = ["a red ox", "", "ein Mädchen mit 漢字 " * 20][:count]
    scores = remote.score(images, prompts)
    expected = local.score(images, prompts).detach()
    assert scores.dtype == expected.dtype and torch.equal(scores, expected)
    assert not remote.differentiable
    assert asdict(remote.spec) == json.loads(json.dumps(asdict(local.spec)))  # tuples become lists


def test_what_exceeds_a_request_goes_in_several(server, local):
    remote = RemoteReward(f"{server}/clip", TOKEN)
    images, prompts = torch.rand(9, 3, 18, 18), [str(i) for i in range(9)]
    parts = [local.score(images[i : i + 4], prompts[i : i + 4]).detach() for i in (0, 4, 8)]
    assert torch.equal(remote.score(images, prompts), torch.cat(parts))
    # 27 kB a picture: the bytes allow one at a time.
    large = torch.rand(2, 3, 48, 48)
    assert torch.equal(remote.score(large, ["x", "y"])[1], local.score(large[1:], ["y"])[0].detach())
    with pytest.raises(UserError, match=says(120000, 60000, "--max-bytes")):
        remote.score(torch.rand(1, 3, 100, 100), ["x"])


def test_pictures_come_as_png_too(server, local):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((20, 30, 3), (25, 16, 3))]
    files = []
    for array in arrays:
        Image.fromarray(array).save(stream := io.BytesIO(), "PNG")
        files.append(base64.b64encode(stream.getvalue()).decode())
    body = json.dumps({"prompts": ["blue", "a red ox"], "images": files}).encode()
    status, answer = request(server, body=body, kind="application/json; charset=utf-8")
    tensors = [torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255 for array in arrays]
    expected = [local.score(image, [prompt]).item() for image, prompt in zip(tensors, ["blue", "a red ox"])]
    assert status == 200 and json.loads(answer)["scores"] == expected
    body = json.dumps({"prompts": [""], "images": files[:1]}).encode()
    assert json.loads(request(server, path="/mean", body=body, kind=wire.JSON)[1]) == {"scores": [None]}
    # Where JSON has no word for it, tensors have.
    assert RemoteReward(f"{server}/mean", TOKEN).score(torch.rand(1, 3, 4, 4), [""]).isnan().all()


def test_concurrent_clients_each_get_their_own(local):
    curious = Mean(seconds=0.02)
    with serving({"mean": curious, "clip": local}) as url:
        remotes = {name: RemoteReward(f"{url}/{name}", TOKEN) for name in ("mean", "clip")}

        def ask(seed):
            name = ("mean", "clip")[seed % 2]
            size = (6, 10)[seed % 3 == 0]
            images = torch.rand(1 + seed % 3, 3, size, size, generator=torch.Generator().manual_seed(seed))
            prompts = [str(seed)] * len(images)
            truth = {"mean": Mean(), "clip": local}[name].score(images, prompts)
            return (remotes[name].score(images, prompts) - truth).abs().max().item()

        with ThreadPoolExecutor(12) as pool:
            errors = list(pool.map(ask, range(48)))
    assert max(errors) < 1e-5
    # Those that waited together went together.
    assert max(curious.calls) > 3 and len(curious.calls) < 24


def test_one_bad_request_does_not_spoil_its_neighbours():
    with serving({"mean": Mean(seconds=0.1)}) as url:
        remote = RemoteReward(url, TOKEN)

        def ask(prompt):
            try:
                return remote.score(torch.zeros(1, 3, 4, 4), [prompt]).item()
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, ["1", "forbidden", "2", "broken", "3", "4"]))
    assert [answers[i] for i in (0, 2, 4, 5)] == [1.0, 2.0, 3.0, 4.0]
    assert says(422, "a prompt is forbidden").search(answers[1])
    # What the inside says may be a secret of the server's machine.
    assert says(500, "(RuntimeError)").search(answers[3]) and "secret" not in answers[3]


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", "ü" * 8, None])
def test_a_wrong_token_gets_nothing(server, token):
    authorization = None if token is None else f"Bearer {token}".encode()
    for method, path in (("GET", "/"), ("POST", "/clip"), ("GET", "/docs"), ("GET", "/openapi.json")):
        status, text = detail(server, method=method, path=path, Authorization=authorization)
        assert status == 401 and "the token" in text
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert request(server, method="GET", path=path)[0] in (404, 405)


def test_the_client_says_what_is_wrong_with_its_token(server, monkeypatch):
    with pytest.raises(UserError, match=says(401, "token")):
        RemoteReward(server, "wrong")
    monkeypatch.delenv(wire.TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=says("RSAFT_SERVER_TOKEN", "export")):
        load_reward(RewardSettings(name="remote", path=f"{server}/clip"))
    monkeypatch.setenv("RSAFT_ANOTHER", TOKEN)
    reward = load_reward(RewardSettings(name="remote", path=f"{server}/clip", token_variable="RSAFT_ANOTHER"))
    assert reward.spec.name == "clip" and reward.spec.source == f"{server}/clip"


@contextmanager
def answering(status, body):
    """Something else that speaks HTTP."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_another_version_is_said_on_both_sides(server):
    for protocol in (wire.PROTOCOL + 1, "none", None):
        header = {wire.PROTOCOL_HEADER: None if protocol is None else str(protocol)}
        status, text = detail(server, **header)
        assert status == 409 and says(f"protocol {wire.PROTOCOL}", "(rsaft_fast ").search(text)
        assert "same version of rsaft_fast" in text
    info = {"protocol": 99, "package": "9.9", "rewards": {}, "max_pictures": 1, "max_bytes": 1}
    with answering(200, json.dumps(info).encode()) as url:
        with pytest.raises(UserError, match=says("protocol 99", "(rsaft_fast 9.9)", 1, "same version")):
            RemoteReward(url, TOKEN)
    for body in (b"<html>hello</html>", b"[]", b"{}"):
        with answering(200, body) as url, pytest.raises(UserError, match=says(url, "not a reward server")):
            RemoteReward(url, TOKEN)


def tensors(**changes):
    content = {
        "images": torch.rand(2, 3, 8, 8),
        "prompts": torch.tensor(list(b'["a", "b"]'), dtype=torch.uint8),
    }
    return save({name: value for name, value in (content | changes).items() if value is not None})


def prompts(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "body, words",
    [
        (b"", says("body", "safetensors")),
        (b"\x00" * 100, says("body", "safetensors")),
        (b"\xff" * 8, says("body", "safetensors")),
        (os.urandom(500), says("body", "safetensors")),
        (tensors()[:-1], says("body", "safetensors")),
        (tensors(images=None), says("the tensors are prompts;", "images and prompts")),
        (tensors(more=torch.zeros(1)), says("more", "images and prompts")),
        (tensors(images=torch.rand(2, 1, 8, 8)), says("images", "float32", "(2, 1, 8, 8)")),
        (tensors(images=torch.rand(3, 8, 8)), says("images", "(3, 8, 8)")),
        (tensors(images=torch.rand(2, 3, 0, 8)), says("images", "(2, 3, 0, 8)")),
        (tensors(images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), says("images", "uint8")),
        (tensors(prompts=torch.rand(3)), says("prompts", "float32")),
        (tensors(prompts=prompts("[")), says("prompts", "JSON list")),
        (tensors(prompts=prompts("[" * 5000)), says("prompts", "list")),
        (tensors(prompts=torch.full((4,), 255, dtype=torch.uint8)), says("prompts", "JSON list")),
        (tensors(prompts=prompts('"ab"')), says("prompts", "list of strings")),
        (tensors(prompts=prompts('["a", 3]')), says("prompts", "list of strings")),
        (tensors(prompts=prompts('["a"]')), says("prompts", 1, "images", 2)),
    ],
)
def test_a_malformed_body_is_one_clear_line(server, body, words):
    status, text = detail(server, body=body)
    assert status == 400 and words.search(text), text


def png(width, height):
    Image.new("L", (width, height)).save(stream := io.BytesIO(), "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize(
    "content, status, words",
    [
        (b"{", 400, says("body")),
        (b"[" * 50_000, 400, says("body")),
        (b"[]", 400, says("body")),
        ({"prompts": ["a"]}, 400, says("KeyError")),
        ({"prompts": ["a"], "images": ["!!"]}, 400, says("body")),
        ({"prompts": ["a"], "images": [base64.b64encode(b"no picture").decode()]}, 400, says("number 0", "PNG, JPEG")),
        ({"prompts": [3], "images": [png(4, 4)]}, 400, says("prompts", "list of strings")),
        ({"prompts": [], "images": [png(4, 4)]}, 400, says("prompts", 0, "images", 1)),
        # A small file of many pixels, and several that only together are too many.
        ({"prompts": ["a"], "images": [png(5000, 5000)]}, 400, says("5000x5000", 5000, "pixels")),
        ({"prompts": ["a"] * 2, "images": [png(60, 60)] * 2}, 400, says("number 1", "60x60", 1400, "pixels")),
        ({"prompts": ["a"] * 5, "images": [png(4, 4)] * 5}, 413, says("pictures", 5, 4)),
    ],
)
def test_malformed_json_is_one_clear_line(server, content, status, words):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    found, text = detail(server, body=body, kind=wire.JSON)
    assert found == status and words.search(text), text


def test_what_is_too_large_is_refused_before_it_is_read(server):
    status, text = detail(server, body=b"x" * 60_001)
    assert status == 413 and says(60000, "bytes").search(text)
    # A body that does not say how long it is.
    chunks = (b"x" * 10_000 for _ in range(7))
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=20)
    headers = {"Authorization": f"Bearer {TOKEN}", wire.PROTOCOL_HEADER: "1", "Content-Type": wire.TENSORS}
    connection.request("POST", "/clip", chunks, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    five = wire.encode_request(torch.rand(5, 3, 4, 4), ["x"] * 5)
    status, text = detail(server, body=five)
    assert status == 413 and says("pictures", 5, 4).search(text)


def test_a_pickle_is_never_opened(server, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for kind in (wire.TENSORS, wire.JSON, "application/octet-stream", "application/x-pickle", ""):
        status, _ = detail(server, body=pickle.dumps(Trap()), kind=kind)
        assert status == 400
    assert not (tmp_path / "executed").exists()


def test_names_and_addresses(server, local):
    assert detail(server, path="/nothing")[0] == 404
    for path, words in (("", says("several", "clip, mean")), ("/clop", says("'clop'", "clip, mean"))):
        with pytest.raises(UserError, match=words):
            RemoteReward(server + path, TOKEN)
    with serving({"hpsv2.1": local}) as url:
        assert RemoteReward(url, TOKEN).name == "hpsv2.1"
    for bad in ("clip", "ftp://a/b", "http://", "http://a:b/", "http://u:p@h/x", "http://h/a/b", "http://h:99999/x"):
        with pytest.raises(UserError, match=says("address", "http://HOST:PORT/NAME")):
            RemoteReward(bad, TOKEN)


@contextmanager
def flaky(url, refusals):
    """A relay that hangs up on the first connections, by turns before and in the middle of the answer."""
    host, port = url.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    seen = []

    def relay():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            seen.append(client)
            if len(seen) <= refusals:
                if len(seen) % 2:
                    client.recv(100)
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
                client.close()
                continue
            upstream = socket.create_connection((host, int(port)))
            threading.Thread(target=pump, args=(client, upstream), daemon=True).start()
            threading.Thread(target=pump, args=(upstream, client), daemon=True).start()

    def pump(source, sink):
        with suppress(OSError):  # the other direction has closed its sink, which is this one's source
            while data := source.recv(65536):
                sink.sendall(data)
        sink.close()

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.fixture
def own_clock(monkeypatch):
    """The client's time passes in its waits alone: how often it asks does not depend on who else holds the cores."""
    now = [0.0]

    def wait(seconds):
        now[0] += seconds

    monkeypatch.setattr(remote_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=wait))


def test_a_lost_answer_is_asked_for_again(server, local, own_clock):
    with flaky(server, refusals=3) as (url, seen):
        remote = RemoteReward(f"{url}/clip", TOKEN, patience=QUICK)
        assert len(seen) == 4
        images = torch.rand(1, 3, 18, 18)
        assert torch.equal(remote.score(images, ["x"]), local.score(images, ["x"]).detach())
    with flaky(server, refusals=9) as (url, seen):
        with pytest.raises(UserError, match=says("4 tries", "reward.patience", 0.75)) as caught:
            RemoteReward(f"{url}/clip", TOKEN, patience=QUICK)
        # Whether the end of the connection or its reset arrives first is the system's to say.
        assert any(word in str(caught.value) for word in ("RemoteDisconnected", "ConnectionResetError"))
        assert len(seen) == 4


def test_a_server_that_dies_is_one_clear_line(local, own_clock):
    with serving({"clip": local}) as url:
        remote = RemoteReward(url, TOKEN, patience=QUICK)
        remote.score(torch.rand(1, 3, 18, 18), ["x"])
    with pytest.raises(UserError, match=says("4 tries", "ConnectionRefusedError", "reward.patience", 0.75)) as caught:
        remote.score(torch.rand(1, 3, 18, 18), ["x"])
    assert "\n" not in str(caught.value)


def test_slow_and_busy_servers():
    images = torch.zeros(1, 3, 4, 4)
    with serving({"mean": Mean(seconds=0.4)}, timeout=0.1) as url:
        with pytest.raises(UserError, match=says(503, "limit", 0.1)):
            RemoteReward(url, TOKEN, patience=0.3).score(images, ["1"])
    with serving({"mean": Mean(seconds=1.0)}) as url:
        with pytest.raises(UserError, match=says("1 tries", "TimeoutError")):
            RemoteReward(url, TOKEN, timeout=0.2, patience=0).score(images, ["1"])
    with serving({"mean": Mean(seconds=0.15)}, max_waiting=1, max_pictures=1) as url:
        patient = RemoteReward(url, TOKEN, patience=10)
        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(lambda i: patient.score(images, [str(i)]).item(), range(5)))
        assert answers == [0.0, 1.0, 2.0, 3.0, 4.0]
        hasty = RemoteReward(url, TOKEN, patience=0)

        def ask(i):
            try:
                return hasty.score(images, [str(i)]).item()
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(5) as pool:
            assert any("requests wait" in str(answer) for answer in pool.map(ask, range(5)))


def test_a_remote_reward_trains_by_nothing_that_needs_a_gradient(tiny, out):
    reward = {"name": "remote", "path": "http://127.0.0.1:1/clip"}
    with pytest.raises(UserError, match=says("reward.name remote", "gradient", "method.name draft")):
        check_config(config(tiny, out, reward=reward))
    parts = [{"path": "x"}, reward]
    with pytest.raises(UserError, match=says("reward.parts[1].name remote", "gradient")):
        check_config(config(tiny, out, reward={"name": "combination", "parts": parts}))
