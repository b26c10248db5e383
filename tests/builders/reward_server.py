"""A reward server in a thread of its own, a reward of known scores, and requests written by hand."""

from __future__ import annotations

import http.client
import http.server
import json
import socket
import threading
import time
from contextlib import contextmanager

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import Reward, RewardSpec, wire
from rsaft_fast.server import Limits, make_app, make_server

TOKEN = "a-token-of-these-tests"
# Seconds of patience that make four tries: 0.1, 0.2 and 0.4 lie between them, and 0.8 is too much.
QUICK = 0.75


class Mean(Reward):
    """The mean of a picture plus its prompt's number; slow, moody and curious on demand."""

    differentiable = False

    def __init__(self, seconds=0.0):
        super().__init__()
        self.spec, self.seconds, self.calls = RewardSpec("mean", sha256="0" * 64), seconds, []

    def score(self, images, prompts):
        self.calls.append(len(images))
        time.sleep(self.seconds)
        if "forbidden" in prompts:
            raise UserError("a prompt is forbidden")
        if "broken" in prompts:
            raise RuntimeError("a secret of the inside")
        return images.mean((1, 2, 3)) + torch.tensor([float(p) if p else float("nan") for p in prompts])


@contextmanager
def serving(rewards, port=0, **limits):
    """The address of a server of its own in a thread."""
    listener = socket.create_server(("127.0.0.1", port))
    limits = Limits(**limits)
    server = make_server(make_app(rewards, TOKEN, torch.device("cpu"), limits), limits, log_level="critical")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def request(url, method="POST", path="/clip", body=b"", kind=wire.TENSORS, token=TOKEN, protocol=wire.PROTOCOL, **more):
    """A status and the answer, by hand."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    headers = {"Authorization": f"Bearer {token}", wire.PROTOCOL_HEADER: str(protocol), "Content-Type": kind} | more
    try:
        connection.request(method, path, body, {k: v for k, v in headers.items() if v is not None})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def detail(url, **options):
    status, body = request(url, **options)
    text = json.loads(body)["detail"]
    assert "\n" not in text
    return status, text
