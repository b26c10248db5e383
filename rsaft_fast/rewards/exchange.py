"""One request to a reward server and its answer, with an end to what the other side may draw out.

No redirect is followed and no proxy of the environment used: either would hand the token to another machine.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from rsaft_fast.errors import UserError

# Of status lines and headers, beside the body.
_HEADERS = 2**18


class Oversized(Exception):
    """An answer that is longer than any honest one."""


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        netloc: host and port.
        host: alone.
        secure: https.
        name: of the reward, or "".
    """

    netloc: str
    host: str
    secure: bool
    name: str

    @property
    def here(self) -> bool:
        """Whether it is this machine, as far as its name says."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")


def parse_address(url: str) -> Address:
    """The parts of http://HOST:PORT/NAME.

    Raises:
        UserError: any other address; a password in it stays out of the message.
    """
    # What may be a secret of its own is not shown.
    shown = "an address with a user, a password or an @" if "@" in url else repr(url[:200].partition("?")[0])
    wrong = UserError(f"{shown} is not the address of a reward server; expected http://HOST:PORT/NAME")
    try:
        split = urlsplit(url)
        host, port = split.hostname or "", split.port
        host.encode("idna")
    except ValueError as error:  # UnicodeError is one
        raise wrong from error
    valid = split.scheme in ("http", "https") and host and port != 0 and url.isprintable() and " " not in url
    if not valid or "@" in url or split.query or split.fragment or "/" in split.path.strip("/"):
        raise wrong
    return Address(split.netloc, host, split.scheme == "https", unquote(split.path.strip("/")))


def exchange(
    address: Address,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes | None,
    timeout: float,
    max_answer: int,
) -> tuple[int, bytes]:
    """Status and body of the answer.

    Args:
        timeout: seconds for the request to be sent, and again for all of the answer to arrive.
        max_answer: bytes of the answer's body.

    Raises:
        OSError, http.client.IncompleteRead: no answer, or half of one.
        Oversized: a longer answer.
        http.client.HTTPException, ValueError: an answer that is not HTTP.
    """
    make = http.client.HTTPSConnection if address.secure else http.client.HTTPConnection
    connection = make(address.netloc, timeout=timeout)
    connection.response_class = lambda sock, **options: _Answer(sock, timeout, max_answer + _HEADERS, **options)
    try:
        try:
            connection.request(method, path, body, dict(headers))
        except (BrokenPipeError, ConnectionResetError):
            # A server that refuses may answer before it has read everything.
            if connection.sock is None:
                raise
        response = connection.getresponse()
        if (response.length or 0) > max_answer:
            raise Oversized(f"{response.length} bytes; an honest answer has at most {max_answer}")
        content = bytearray()
        while chunk := response.read(min(65536, max_answer + 1 - len(content))):
            content += chunk
            if len(content) > max_answer:
                raise Oversized(f"more than {max_answer} bytes")
        if response.length:  # a read of so many bytes does not itself complain of fewer
            raise http.client.IncompleteRead(bytes(content), response.length)
        return response.status, bytes(content)
    finally:
        connection.close()


class _Answer(http.client.HTTPResponse):
    """An answer whose reads together have `timeout` seconds and `most` bytes, headers and framing included: a socket's
    own timeout begins anew at each byte, and http.client reads on through chunks of a negative length."""

    def __init__(self, sock: socket.socket, timeout: float, most: int, **options):
        super().__init__(sock, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Bounded(sock, time.monotonic() + timeout, most))


class _Bounded(io.RawIOBase):
    def __init__(self, sock: socket.socket, end: float, most: int):
        self._sock, self._end, self._left = sock, end, most
        self._stream = sock.makefile("rb", buffering=0)  # keeps the socket open as long as it is read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the answer took too long")
        self._sock.settimeout(seconds)
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise Oversized("no end")
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()
