"""Bodies of requests: received within their limits, and unpacked to pictures and prompts.

Unpacking belongs into a thread: a PNG of 20 million pixels takes a second, in which the event loop would answer nobody.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading

import torch
from starlette.requests import Request

from rsaft_fast.data.pictures import read_picture
from rsaft_fast.errors import UserError
from rsaft_fast.rewards import wire
from rsaft_fast.server.limits import Limits

Parts = list[tuple[torch.Tensor, list[str]]]
"""Pictures (B, 3, H, W) and their B prompts, those of one size together."""

_NO_LISTS = "the body is not {'prompts': [...], 'images': [base64, ...]}"


class SlowBody(Exception):
    """A body did not arrive in time."""


class Busy(Exception):
    """Too much is being served now, or the server is ending."""


class ByteLimit:
    """Limit of the bytes of bodies that are held at one time; several threads may take and give back."""

    def __init__(self, most: int):
        self.most, self.held = most, 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Take `size` bytes more.

        Raises:
            Busy: they do not fit.
        """
        with self._lock:
            if self.held + size > self.most:
                raise Busy(f"the server holds {self.held} bytes of other requests, and its limit is {self.most}")
            self.held += size

    def give_back(self, size: int) -> None:
        with self._lock:
            self.held -= size


async def receive(request: Request, body: io.BytesIO, limits: Limits, room: ByteLimit) -> None:
    """Read the request's body into `body`, holding its bytes of `room`; the caller gives them back.

    Raises:
        TooLarge: more than `limits.max_bytes`.
        SlowBody: it took longer than `limits.timeout`, or came slower than `limits.min_rate`.
        Busy: no room.
        ClientDisconnect: the client has gone.
    """
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limits.max_bytes:
        raise _too_large(limits)
    loop = asyncio.get_running_loop()
    began = loop.time()
    reading = asyncio.ensure_future(_read(request, body, limits, room))
    try:
        while True:
            left = began + limits.timeout - loop.time()
            done, _ = await asyncio.wait({reading}, timeout=max(0.0, min(limits.grace, left)))
            if done:
                return reading.result()
            waited = loop.time() - began
            if waited >= limits.timeout:
                raise SlowBody(f"the body took too long to arrive (the limit is {limits.timeout:g} s)")
            if body.tell() < limits.min_rate * waited:
                raise SlowBody(
                    f"the body came too slowly: {body.tell()} bytes in {waited:.0f} s (the limit is "
                    f"{limits.min_rate:g} bytes a second)"
                )
    finally:
        reading.cancel()


async def _read(request: Request, body: io.BytesIO, limits: Limits, room: ByteLimit) -> None:
    async for chunk in request.stream():
        if body.tell() + len(chunk) > limits.max_bytes:
            raise _too_large(limits)
        room.take(len(chunk))
        body.write(chunk)


def _too_large(limits: Limits) -> wire.TooLarge:
    return wire.TooLarge(f"the body is larger than this server's limit of {limits.max_bytes} bytes (--max-bytes)")


def unpack_tensors(body: bytes, limits: Limits) -> Parts:
    """Unpack images (B, 3, H, W) and B prompts of a safetensors body, in one part.

    Raises:
        UserError: malformed; `wire.TooLarge`: beyond a limit.
    """
    images, prompts = wire.decode_request(body, limits.max_prompt)
    _check_count(len(images), limits)
    _check_ratio(images, "images", limits)
    return [(images, prompts)]


def unpack_json(body: bytes, limits: Limits) -> Parts:
    """Unpack the pictures (1, 3, H, W) of a JSON body, each with its prompt; they may differ in size.

    Raises:
        UserError: malformed; `wire.TooLarge`: beyond a limit.
    """
    # A list of millions of small things would be gigabytes of Python objects before anything could be counted.
    most = limits.max_pictures * (limits.max_prompt + 8)
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > most:
        raise UserError(f"{_NO_LISTS} (more than {most} commas and brackets)")
    try:
        content = json.loads(body)
        texts, prompts = content["images"], content["prompts"]
        if not isinstance(texts, list):
            raise TypeError("images is no list")
        _check_count(len(texts), limits)
        files = [base64.b64decode(text, validate=True) for text in texts]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{_NO_LISTS} ({type(error).__name__}: {error})") from error
    prompts = wire.checked_prompts(prompts, len(files), limits.max_prompt)
    room, pictures = limits.max_bytes, []
    for number, file in enumerate(files):
        # In fp32, three channels.
        pictures.append(read_picture(io.BytesIO(file), f"number {number}", max_pixels=room // 12))
        _check_ratio(pictures[-1], f"picture number {number}", limits)
        room -= pictures[-1].numel() * 4
    return [(picture, [prompt]) for picture, prompt in zip(pictures, prompts)]


def _check_count(pictures: int, limits: Limits) -> None:
    if pictures > limits.max_pictures:
        raise wire.TooLarge(
            f"{pictures} pictures; this server's limit is {limits.max_pictures} a request (--max-pictures)"
        )


def _check_ratio(images: torch.Tensor, name: str, limits: Limits) -> None:
    short, long = sorted(images.shape[2:])
    if long > limits.max_ratio * short:
        raise wire.TooLarge(
            f"{name} of {images.shape[3]}x{images.shape[2]} pixels: one side is {long / short:.0f} times the other; "
            f"this server's limit is {limits.max_ratio:g}"
        )
