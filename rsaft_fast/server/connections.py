"""Connections of the server: whatever a client draws out has an end.

uvicorn ends a connection that is idle after an answer, and nothing else: one that never sends a byte, or a header at a
byte a minute, stays for ever. The states below each have an end, and when all places are taken, a new connection takes
that of one that asks for nothing.
"""

from __future__ import annotations

import asyncio
import math
import socket
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rsaft_fast.server.limits import Limits, accepted_at_once, connections_that_fit

IDLE, HEAD, BODY, SCORING, ENDING = "idle", "head", "body", "scoring", "ending"
# Those in whose states no request is being served.
_SPARE = (IDLE, HEAD, ENDING)
# Connections that the system keeps until they are accepted.
_WAITING = 1024


class Connection(H11Protocol):
    """HTTP/1.1 connection of uvicorn over h11, with an end to every state.

    idle: no byte of a request yet; head: a part of its headers; body: the headers, and a part of the body; scoring: all
    of it, until the answer is written; ending: answered before the body had come, or refused.
    """

    def __init__(self, *arguments: Any, limits: Limits, most: int, **options: Any):
        """`most` connections at one time; `connections`, uvicorn's own set of them, is shared by all."""
        super().__init__(*arguments, **options)
        self.limits, self.most = limits, most
        self.since = 0.0
        self._watched = ""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def state(self) -> str:
        """State of the exchange."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        if theirs is h11.IDLE and ours is h11.IDLE:
            return HEAD if self.conn.trailing_data[0] else IDLE
        if ours in (h11.SEND_RESPONSE, h11.SEND_BODY):
            return BODY if theirs is h11.SEND_BODY else SCORING
        return ENDING

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connected = transport.get_extra_info("socket")
        if connected is not None and connected.family in (socket.AF_INET, socket.AF_INET6):
            # An answer is two writes. Without this the second waits for the client's delayed acknowledgement of the
            # first, 40 ms; asyncio sets it only on sockets that were made with the protocol's number.
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch()
        if len(self.connections) > self.most:  # some of them may be on their way out
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def shutdown(self) -> None:
        """End the connection: what is being scored is answered, what has not wholly come is not waited for."""
        if self.state == SCORING:
            super().shutdown()
        else:
            self.transport.abort()

    def _watch(self) -> None:
        state = self.state
        if state == self._watched:
            return
        self._watched, self.since = state, self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        limits = self.limits
        # The last two are ended by the application, with a word; here only if the client does not read it.
        last = 2 * limits.timeout + limits.ending
        seconds = {IDLE: limits.idle, HEAD: limits.head, ENDING: limits.ending, BODY: last, SCORING: last}[state]
        # abort, not close: close waits until the client has read what is still to be written.
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _make_room(self) -> None:
        """Close the one that has asked for nothing for longest, if there are too many."""
        alive: list[Any] = [connection for connection in self.connections if not connection.transport.is_closing()]
        if len(alive) > self.most:
            spare = [connection for connection in alive if connection._watched in _SPARE and connection is not self]
            min(spare, key=lambda connection: connection.since, default=self).transport.abort()


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio takes one number for how many it accepts at once and for how many the system lets wait. A client for
        # which there is no room to wait tries again after a second.
        for listener in sockets or []:
            listener.listen(_WAITING)


def make_server(app: Any, limits: Limits, **options: Any) -> uvicorn.Server:
    """Make a uvicorn that serves `app` within `limits`; `options` are further ones of `uvicorn.Config`.

    Raises:
        UserError: this process may hardly open a connection.
    """
    most = connections_that_fit(limits)
    config = uvicorn.Config(
        app,
        http=partial(Connection, limits=limits, most=most),  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="on",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        access_log=False,
        backlog=accepted_at_once(most),
        timeout_keep_alive=math.ceil(limits.idle),
        timeout_graceful_shutdown=math.ceil(limits.timeout),
        **options,
    )
    return _Server(config)
