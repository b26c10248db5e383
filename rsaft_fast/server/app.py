"""The HTTP side of a reward server; `rewards.wire` says what travels."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.pictures import read_picture
from rsaft_fast.rewards import wire
from rsaft_fast.rewards.base import Reward
from rsaft_fast.server.batching import Batcher, Busy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one client may ask of the server.

    Attributes:
        max_pictures: of one request, and of one call of the reward.
        max_bytes: of a request's body, and of the pictures that it unpacks to.
        max_waiting: requests that may wait; the next is told to come back.
        timeout: seconds for a body to arrive, and again for its scores.
    """

    max_pictures: int = 64
    max_bytes: int = 256 * 2**20
    max_waiting: int = 64
    timeout: float = 300.0


def make_app(rewards: Mapping[str, Reward], token: str, device: torch.device, limits: Limits | None = None) -> FastAPI:
    """The application that serves these rewards by name; every request needs the token."""
    limits = limits or Limits()
    executor = ThreadPoolExecutor(1, "reward")
    batchers: dict[str, Batcher] = {}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for name, reward in rewards.items():
            batchers[name] = Batcher(reward, device, executor, limits.max_pictures, limits.max_waiting)
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers.values()]
        yield
        for task in tasks:
            task.cancel()
        executor.shutdown(wait=False, cancel_futures=True)

    # No pages of its own: documentation would answer without the token.
    app = FastAPI(lifespan=lifespan, openapi_url=None)

    app.add_middleware(Guard, token=token)

    @app.get("/")
    async def info() -> dict[str, Any]:
        return {
            "protocol": wire.PROTOCOL,
            "package": metadata.version("rsaft_fast"),
            "rewards": {name: asdict(reward.spec) for name, reward in rewards.items()},
            "max_pictures": limits.max_pictures,
            "max_bytes": limits.max_bytes,
        }

    @app.post("/{name}")
    async def score(name: str, request: Request) -> Response:
        if name not in batchers:
            raise HTTPException(404, f"no reward {name!r} here; there are {', '.join(batchers)}")
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind not in (wire.TENSORS, wire.JSON):
            raise HTTPException(400, f"a body of type {kind or 'none'}; send {wire.TENSORS} or {wire.JSON}")
        body = await _in_time(_body(request, limits), limits.timeout, 408, "the body took too long to arrive")
        if kind == wire.TENSORS:
            scores = await _scores(batchers[name], *_understood(wire.decode_request, body), limits)
            return Response(wire.encode_scores(scores), media_type=wire.TENSORS)
        pictures, prompts = _understood(_decode_json, body, limits)
        # Pictures of a JSON request may differ in size.
        parts = [await _scores(batchers[name], image, [prompt], limits) for image, prompt in zip(pictures, prompts)]
        values = [value if math.isfinite(value) else None for part in parts for value in part.tolist()]
        return JSONResponse({"scores": values})

    return app


class Guard:
    """Answers who has no token or speaks another protocol, before a byte of the body is read."""

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
        return JSONResponse({"detail": detail}, 401, {"WWW-Authenticate": "Bearer"})
    spoken = request.headers.get(wire.PROTOCOL_HEADER, "none")
    if spoken != str(wire.PROTOCOL):
        detail = (
            f"this server speaks protocol {wire.PROTOCOL} (rsaft_fast {metadata.version('rsaft_fast')}), the client "
            f"{spoken[:20]}; install the same version of rsaft_fast on both sides"
        )
        return JSONResponse({"detail": detail}, 409)
    return None


async def _body(request: Request, limits: Limits) -> bytes:
    too_large = HTTPException(413, f"the body is larger than this server's limit of {limits.max_bytes} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limits.max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.max_bytes:
            raise too_large
    return bytes(body)


async def _scores(batcher: Batcher, images: torch.Tensor, prompts: list[str], limits: Limits) -> torch.Tensor:
    if len(images) > limits.max_pictures:
        raise HTTPException(413, f"{len(images)} pictures; this server's limit is {limits.max_pictures} a request")
    try:
        return await _in_time(batcher.score(images, prompts), limits.timeout, 503, "the scores took too long")
    except HTTPException:
        raise
    except Busy as error:
        raise HTTPException(503, f"{error}; try again", {"Retry-After": "1"}) from error
    except UserError as error:
        raise HTTPException(422, str(error)) from error
    except Exception as error:
        # What went wrong inside belongs into this server's log; a client learns its kind.
        log.exception("scoring failed")
        raise HTTPException(500, f"scoring failed ({type(error).__name__}); the server's log says more") from error


async def _in_time(awaited: Awaitable, timeout: float, status: int, detail: str) -> Any:
    try:
        return await asyncio.wait_for(awaited, timeout)
    except asyncio.TimeoutError as error:
        raise HTTPException(status, f"{detail} (the limit is {timeout:g} s)") from error


def _understood(decode: Callable, *arguments) -> tuple:
    try:
        return decode(*arguments)
    except UserError as error:
        raise HTTPException(400, str(error)) from error


def _decode_json(body: bytes, limits: Limits) -> tuple[list[torch.Tensor], list[str]]:
    try:
        content = json.loads(body)
        files = [base64.b64decode(text, validate=True) for text in content["images"]]
        prompts = content["prompts"]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise UserError(
            f"the body is not {{'prompts': [...], 'images': [base64, ...]}} ({type(error).__name__}: {error})"
        ) from error
    prompts = wire.checked_prompts(prompts, len(files))
    if len(files) > limits.max_pictures:
        raise HTTPException(413, f"{len(files)} pictures; this server's limit is {limits.max_pictures} a request")
    room, pictures = limits.max_bytes, []
    for number, file in enumerate(files):
        # In fp32, three channels.
        pictures.append(read_picture(io.BytesIO(file), f"number {number}", max_pixels=room // 12))
        room -= pictures[-1].numel() * 4
    return pictures, prompts
