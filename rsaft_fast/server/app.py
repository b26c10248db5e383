"""HTTP side of a reward server; `rewards.wire` says what travels."""

from __future__ import annotations

import asyncio
import hmac
import io
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rsaft_fast import __version__
from rsaft_fast.errors import UserError
from rsaft_fast.rewards import wire
from rsaft_fast.rewards.base import Reward
from rsaft_fast.server.batching import Batcher
from rsaft_fast.server.bodies import Busy, ByteLimit, Parts, SlowBody, receive, unpack_json, unpack_tensors
from rsaft_fast.server.limits import Limits

log = logging.getLogger(__name__)
_UNPACK = {wire.TENSORS: unpack_tensors, wire.JSON: unpack_json}
# Where in memory something lies helps who attacks the server, and nobody else.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LONGEST_DETAIL = 500


def make_app(rewards: Mapping[str, Reward], token: str, device: torch.device, limits: Limits | None = None) -> FastAPI:
    """Make the application that serves these rewards by name; every request needs the token."""
    limits = limits or Limits()
    scoring, unpacking = ThreadPoolExecutor(1, "reward"), ThreadPoolExecutor(2, "unpack")
    batchers: dict[str, Batcher] = {}
    prints = {name: wire.fingerprint(asdict(reward.spec)) for name, reward in rewards.items()}
    room = ByteLimit(limits.max_held_bytes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for name, reward in rewards.items():
            batchers[name] = Batcher(reward, device, scoring, limits.max_pictures, limits.max_waiting)
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers.values()]
        yield
        for task in tasks:
            task.cancel()
        for executor in (scoring, unpacking):
            executor.shutdown(wait=False, cancel_futures=True)

    # No pages of its own: documentation would answer without the token.
    app = FastAPI(lifespan=lifespan, openapi_url=None)

    app.add_middleware(Guard, token=token)

    @app.get("/")
    async def info() -> dict[str, Any]:
        return {
            "protocol": wire.PROTOCOL,
            "package": __version__,
            "rewards": {name: asdict(reward.spec) for name, reward in rewards.items()},
            "max_pictures": limits.max_pictures,
            "max_bytes": limits.max_bytes,
            "max_prompt": limits.max_prompt,
        }

    @app.post("/{name}")
    async def score(name: str, request: Request) -> Response:
        if name not in batchers:
            return _refused(404, f"no reward {name[:80]!r} here; there are {', '.join(batchers)}")
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind not in _UNPACK:
            return _refused(400, f"a body of type {kind[:80] or 'none'}; send {wire.TENSORS} or {wire.JSON}")
        if request.headers.get(wire.REWARD_HEADER, prints[name]) != prints[name]:
            return _refused(409, f"{name} is another reward than it was for this client; start the client anew")
        body, unpacked = io.BytesIO(), None
        try:
            await receive(request, body, limits, room)
            unpacked = unpacking.submit(_unpack, kind, body, limits)
            scores = await _in_time(_while_connected(request, _scores(batchers[name], unpacked)), limits.timeout)
        except Exception as error:
            return _answer_to(error)
        finally:
            if unpacked is None:
                _let_go(body, room)
            else:
                # Nobody waits for a thread whose client has gone, and it reads the body for as long as it runs.
                unpacked.add_done_callback(lambda _: _let_go(body, room))
        if kind == wire.TENSORS:
            return Response(wire.encode_scores(scores), media_type=wire.TENSORS)
        return JSONResponse({"scores": [value if math.isfinite(value) else None for value in scores.tolist()]})

    return app


class Guard:
    """Filter that refuses clients without a token or of another protocol before a byte of the body is read."""

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[wire.PROTOCOL_HEADER] = str(wire.PROTOCOL)
            await send(message)

        refusal = _refusal(Request(scope), self.token) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, marked)


def _refusal(request: Request, token: str) -> Response | None:
    given = request.headers.get("authorization", "")
    # Over bytes and in constant time: how long it takes must not tell how much of the token was right.
    if not hmac.compare_digest(given.encode("utf-8"), f"Bearer {token}".encode()):
        detail = "the token is missing or wrong; send the one that the server printed or was given"
        return _refused(401, detail, {"WWW-Authenticate": "Bearer"})
    spoken = request.headers.get(wire.PROTOCOL_HEADER, "none")
    if spoken != str(wire.PROTOCOL):
        return _refused(
            409,
            f"this server speaks protocol {wire.PROTOCOL} (rsaft_fast {__version__}), the client "
            f"{spoken[:20]}; install the same version of rsaft_fast on both sides",
        )
    return None


def _answer_to(error: Exception) -> Response:
    """Choose what the client learns of what went wrong with its request."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody reads it
    if isinstance(error, SlowBody):
        return _refused(408, str(error))
    if isinstance(error, wire.TooLarge):
        return _refused(413, str(error))
    if isinstance(error, _MalformedBody):
        return _refused(400, str(error))
    if isinstance(error, UserError):
        return _refused(422, str(error))
    if isinstance(error, Busy):
        return _refused(503, f"{error}; try again", {"Retry-After": "1"})
    if isinstance(error, asyncio.TimeoutError):
        return _refused(503, str(error))
    # What went wrong inside belongs into this server's log; a client learns its kind.
    log.error("scoring failed", exc_info=error)
    return _refused(500, f"scoring failed ({type(error).__name__}); the server's log says more")


def _refused(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    line = _ADDRESS.sub("", " ".join(detail.split()))
    return JSONResponse({"detail": line[:_LONGEST_DETAIL]}, status, dict(headers or {}))


class _MalformedBody(UserError):
    """The body breaks the protocol; a reward's own `UserError` is about what it holds."""


def _unpack(kind: str, body: io.BytesIO, limits: Limits) -> Parts:
    # Shares the memory of `body`: no copy.
    return _UNPACK[kind](body.getvalue(), limits)


def _let_go(body: io.BytesIO, room: ByteLimit) -> None:
    size = body.tell()
    # A call that was cancelled before it began still has it.
    body.close()
    room.give_back(size)


async def _scores(batcher: Batcher, unpacked: Future[Parts]) -> torch.Tensor:
    try:
        parts = await asyncio.wrap_future(unpacked)
    except wire.TooLarge:
        raise
    except UserError as error:
        raise _MalformedBody(str(error)) from error
    return torch.cat([await batcher.score(images, prompts) for images, prompts in parts] or [torch.zeros(0)])


async def _while_connected(request: Request, awaited: Awaitable[torch.Tensor]) -> torch.Tensor:
    """Await something, and give it up when the client goes, who would else be computed for while others wait."""
    answer, gone = asyncio.ensure_future(awaited), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _in_time(awaited: Awaitable[torch.Tensor], timeout: float) -> torch.Tensor:
    try:
        return await asyncio.wait_for(awaited, timeout)
    except TimeoutError as error:
        raise TimeoutError(f"the scores took too long (the limit is {timeout:g} s)") from error
