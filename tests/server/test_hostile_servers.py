"""What answers a client may be anything: nothing of it is believed, and all of it has an end. Everything on
127.0.0.1."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from builders.messages import says
from builders.reward_server import TOKEN, Mean, serving
from pydantic import ValidationError
from safetensors.torch import save

from rsaft_fast.cli import main
from rsaft_fast.errors import UserError
from rsaft_fast.rewards import RewardSettings, load_reward, wire
from rsaft_fast.rewards import remote as client
from rsaft_fast.rewards.remote import RemoteReward

INFO = {
    "protocol": wire.PROTOCOL,
    "package": "0.1.0",
    "rewards": {"mean": asdict(Mean().spec)},
    "max_pictures": 64,
    "max_bytes": 10**8,
    "max_prompt": 1000,
}
IMAGE = torch.zeros(1, 3, 4, 4)


def framed(body, status="200 OK", *headers):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def changed(**changes):
    return framed(json.dumps(INFO | changes).encode())


def spec(**changes):
    return changed(rewards={"mean": INFO["rewards"]["mean"] | changes})


def nested(levels):
    return {"a": nested(levels - 1)} if levels else 1


@contextmanager
def speaking(get=None, post=b"", endless=b"", pause=0.0):
    """A server that answers GET with `get` (as an honest one, if None), POST with `post`, and then `endless`."""
    get = changed() if get is None else get
    listener = socket.create_server(("127.0.0.1", 0))
    requests = []

    def answer(connection):
        with connection:
            connection.settimeout(5)
            try:
                heard = connection.recv(65536)
                requests.append(heard)
                posted = heard.startswith(b"POST")
                connection.sendall(post if posted else get)
                while endless and posted:
                    connection.sendall(endless)
                    time.sleep(pause)
                while posted and connection.recv(65536):  # so that hanging up does not reset what was said
                    pass
            except OSError:
                pass

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/mean", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


@pytest.mark.parametrize(
    "answer, words",
    [
        (changed(max_pictures="64"), "max_pictures"),
        (changed(max_pictures=0), "max_pictures"),
        (changed(max_pictures=True), "max_pictures"),
        (changed(max_bytes=1.5), "max_bytes"),
        (changed(max_bytes=None), "max_bytes"),
        (changed(max_bytes=-1), "max_bytes"),
        (changed(max_prompt="many"), "max_prompt"),
        (changed(rewards={}), "rewards"),
        (changed(rewards=["mean"]), "rewards"),
        (changed(rewards={"mean": "mean"}), "rewards.mean"),
        (spec(name=3), "rewards.mean.name"),
        (spec(name="a\nb"), "rewards.mean.name"),
        (spec(source="\x1b[2J"), "rewards.mean.source"),
        (spec(sha256="0" * 2000), "rewards.mean.sha256"),
        (spec(preprocessing=[1]), "rewards.mean.preprocessing"),
        (spec(preprocessing=nested(99)), says("rewards.mean.preprocessing", "nested", 16)),
        (framed(b"[" * 100_000), says("/mean", "not a reward server")),
        (framed(b'{"protocol": 1, "package": ' + b"9" * 5000 + b"}"), says("/mean", "not a reward server")),
        (framed(b"null"), says("/mean", "not a reward server")),
        (framed(b"\xff\xfe{"), says("/mean", "not a reward server")),
        (changed(protocol=1.5), says("protocol", 1.5, "same version")),
        (changed(protocol="1\x1b[2J\n" + "x" * 10_000), says("protocol 1?[2J x", "same version")),
        (framed(b" " * 2_000_000), says("/mean", 2000000, 1048576)),
        (framed(b'{"detail": "a\\n\\u001b[31mb"}', "403 No"), says(403, "a ?[31mb")),
        (framed(b'{"detail": ' + b"[" * 50_000, "400 No"), says(400, '{"detail": [[[')),
        (b"SSH-2.0-OpenSSH_9.6\r\n", says("/mean", "HTTP (")),
        (b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 200 + b"\r\n", says("/mean", "HTTP (")),
    ],
)
def test_what_a_server_says_of_itself_is_checked(answer, words):
    with speaking(answer) as (url, requests), pytest.raises(UserError, match=words) as caught:
        RemoteReward(url, TOKEN, timeout=5, patience=0)
    assert len(str(caught.value)) < 1200 and str(caught.value).replace("\n", "?").isprintable()
    assert len(requests) == 1


def test_a_later_version_may_say_more():
    with speaking(changed(more=1, rewards={"mean": INFO["rewards"]["mean"] | {"more": [1]}})) as (url, _):
        assert RemoteReward(url, TOKEN, patience=0).spec == Mean().spec
    lacking = {key: value for key, value in INFO.items() if key != "max_prompt"}
    with speaking(framed(json.dumps(lacking).encode())) as (url, _):
        assert RemoteReward(url, TOKEN, patience=0).max_pictures == 64


@pytest.mark.parametrize(
    "answer",
    [
        framed(save({"scores": torch.zeros(2)})),
        framed(save({"scores": torch.zeros(0)})),
        framed(save({"scores": torch.zeros(1, 1)})),
        framed(save({"scores": torch.zeros(())})),
        framed(save({"scores": torch.zeros(1, dtype=torch.int64)})),
        framed(save({"scores": torch.zeros(1, dtype=torch.bool)})),
        framed(save({"scores": torch.zeros(1, dtype=torch.float16)})),
        framed(save({"scores": torch.zeros(1, dtype=torch.complex64)})),
        framed(save({"score": torch.zeros(1)})),
        framed(save({"scores": torch.zeros(1), "more": torch.zeros(1)})),
        framed(b""),
        framed(b"\xff" * 64),
        framed(b'{"scores": [1.0]}'),
        framed(save({"scores": torch.zeros(100_000)})),
    ],
)
def test_scores_are_checked(answer):
    with speaking(post=answer) as (url, _):
        remote = RemoteReward(url, TOKEN, patience=0)
        with pytest.raises(UserError, match=r"/mean .*(nonsense|\b400\d\d\d bytes)") as caught:
            remote.score(IMAGE, ["1"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "first, endless, pause",
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, 0),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 65536, 0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 65536, 0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n", 0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", b"x", 0.05),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x", 0),
        (b"", b"x", 0.02),
        (b"HTTP/1.1 200 OK\r\n", b"x", 0.02),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n", b"x", 0.05),
    ],
    ids=["endless", "long", "negative", "chunks", "nonsense", "continue", "header", "line", "headers", "drip"],
)
def test_every_answer_has_an_end(first, endless, pause):
    with speaking(post=first, endless=endless, pause=pause) as (url, _):
        remote = RemoteReward(url, TOKEN, timeout=0.4, patience=0)
        began = time.monotonic()
        with pytest.raises(UserError):
            remote.score(IMAGE, ["1"])
        assert time.monotonic() - began < 2


def test_a_redirect_is_not_followed():
    with serving({"mean": Mean()}) as elsewhere:
        answer = framed(b"", "307 Temporary Redirect", f"Location: {elsewhere}/mean")
        with speaking(answer) as (url, _), pytest.raises(UserError, match=says(307, "token", "final address")):
            RemoteReward(url, TOKEN, patience=0)


def test_no_proxy_sees_the_token(monkeypatch):
    with speaking() as (proxy, heard), serving({"mean": Mean()}) as url:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.removesuffix("/mean"))
        monkeypatch.delenv("no_proxy", raising=False)
        assert RemoteReward(url, TOKEN).score(IMAGE, ["2"]).item() == 2
        assert heard == []


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "HOME", "rsaft_token", "XRSAFT_TOKEN"])
def test_only_this_projects_variables_are_sent(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(name, "a-secret-of-another-place")
    with speaking() as (url, heard):
        with pytest.raises(UserError, match=f"{name}.*only variables that begin with RSAFT_"):
            load_reward("remote", url, token_variable=name)
        with pytest.raises(ValidationError, match=f"{name}.*only variables that begin with RSAFT_"):
            RewardSettings(name="remote", path=url, token_variable=name)
        (tmp_path / "prompts.txt").write_text("a")
        reward = ["--reward", f"remote={url},token_variable={name}"]
        assert main(["score", str(tmp_path), *reward, "--output", str(tmp_path / "x.csv")]) == 2
        captured = capsys.readouterr()
        assert "token_variable" in captured.err and "RSAFT_" in captured.err
        assert "a-secret" not in captured.err + captured.out and heard == []


@pytest.mark.parametrize("token", ["a\r\nX-Evil: 1", "a\nb", "a b", "tökén", "\ud800", "\x7f" * 20, ""])
def test_a_token_that_is_no_header_stays_at_home(token, monkeypatch):
    with speaking() as (url, heard):
        with pytest.raises(UserError, match=says("token", len(token), "printable ASCII")) as caught:
            RemoteReward(url, token)
        assert heard == [] and (not token or token not in str(caught.value))


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@127.0.0.1:1/mean",
        "http://hunter2@127.0.0.1:1/mean",
        "http://:hunter2@127.0.0.1:1/mean",
        "http://u:hunter2@[::1/mean",
        "http://127.0.0.1:1/mean?token=hunter2",
        "http://127.0.0.1:1/mean\r\nX: 1",
        "http://127.0.0.1 :1/mean",
        "http://" + "a" * 70 + ".invalid/mean",
        "http://a..b/mean",
        "file:///etc/passwd",
        "http:///mean",
    ],
)
def test_an_address_that_is_none_is_refused_at_once(url):
    began = time.monotonic()
    with pytest.raises(UserError, match=says("address", "http://HOST:PORT/NAME")) as caught:
        RemoteReward(url, TOKEN)
    assert "hunter2" not in str(caught.value) and time.monotonic() - began < 0.5


@pytest.mark.parametrize(
    "url, warned",
    [
        ("http://192.0.2.1:8765/mean", True),
        ("http://gpu-box/mean", True),
        ("http://127.0.0.1.example.org/mean", True),
        ("https://192.0.2.1/mean", False),
        ("http://127.0.0.2:1/mean", False),
        ("http://localhost:1/mean", False),
        ("http://[::1]:1/mean", False),
    ],
)
def test_plain_http_to_another_machine_is_said(url, warned, monkeypatch, caplog):
    def unreachable(*arguments):
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(client, "exchange", unreachable)
    with pytest.raises(UserError, match=says(url, "1 tries", "reward.patience, 0 s,")):
        RemoteReward(url, TOKEN, patience=0)
    assert ("unencrypted" in caplog.text) == warned and TOKEN not in caplog.text


def test_a_server_that_comes_back_is_waited_for(caplog):
    with serving({"mean": Mean()}) as url:
        remote = RemoteReward(url, TOKEN, patience=20)
    port = int(url.rsplit(":", 1)[1])
    found = []
    asking = threading.Thread(target=lambda: found.append(remote.score(IMAGE, ["2"]).item()))
    with caplog.at_level(logging.WARNING):
        asking.start()
        time.sleep(1.2)
        with serving({"mean": Mean()}, port=port):
            asking.join(15)
    assert found == [2.0]
    assert "(ConnectionRefusedError" in caplog.text and "answers again" in caplog.text
    assert TOKEN not in caplog.text


def test_the_default_outlasts_a_restart():
    # A server loads gigabytes of weights before it answers again.
    assert RewardSettings(name="remote", path="http://127.0.0.1:1/mean").patience >= 60
    with pytest.raises(ValidationError, match=says("patience\n", 0, -1)):
        RewardSettings(name="remote", path="http://127.0.0.1:1/mean", patience=-1)
    with pytest.raises(ValidationError, match=says("patience is", "remote", "clip;")):
        RewardSettings(name="clip", path="x", patience=1)


def test_patience_of_a_recipe_reaches_the_client(monkeypatch):
    monkeypatch.setenv(wire.TOKEN_VARIABLE, TOKEN)
    settings = RewardSettings(name="remote", path="http://127.0.0.1:1/mean", patience=0.2)
    with pytest.raises(UserError, match=says("2 tries", "reward.patience", 0.2)):
        load_reward(settings)
