"""A reward that another process computes: the client of `rsaft-fast serve`. Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import wire
from rsaft_fast.rewards.base import Reward, RewardSpec, check_prompts
from rsaft_fast.rewards.files import first_line

# Waits between tries, in seconds: a server that restarts is back within them, one that is gone is soon known to be.
WAITS = (0.5, 1.0, 2.0)
_WORTH_ANOTHER_TRY = (502, 503, 504)


class RemoteReward(Reward):
    """Scores from a reward server; the picture goes there bit for bit, and no gradient comes back.

    Scoring changes nothing on the server, so a request whose answer was lost is simply sent again.

    Attributes:
        spec: the served reward's own, so that scores and calibrations are the same here and there.
    """

    differentiable = False

    def __init__(self, url: str, token: str, *, timeout: float = 60.0, waits: Sequence[float] | None = None):
        """Ask the server what it serves.

        Args:
            url: http://HOST:PORT/NAME; without NAME the only reward that is served.
            token: what the server was started with, or printed.
            timeout: seconds to wait for one answer.
            waits: seconds between two tries, one try more than there are waits; None is `WAITS`.

        Raises:
            UserError: no server, another protocol, a wrong token, or no reward of that name.
        """
        super().__init__()
        self.url, self._token, self.timeout, self._waits = url, token, timeout, tuple(WAITS if waits is None else waits)
        self._host, self._secure, name = _parts(url)
        info = self._info()
        self.name = _pick(name, info["rewards"], url)
        self.max_pictures, self.max_bytes = info["max_pictures"], info["max_bytes"]
        self.spec = RewardSpec(**info["rewards"][self.name])

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) of images (B, 3, H, W) in the served reward's score dtype, on the images' device.

        Raises:
            UserError: prompts that are not one string an image, a server that is gone, or that refuses.
        """
        check_prompts(prompts, len(images))
        wire.check_images(images)
        step = self._pictures_a_request(images)
        parts = [self._score(images[i : i + step], prompts[i : i + step]) for i in range(0, max(len(images), 1), step)]
        return torch.cat(parts).to(images.device)

    def _score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        body = self._request("POST", f"/{quote(self.name, safe='')}", wire.encode_request(images, prompts))
        try:
            return wire.decode_scores(body, len(images))
        except UserError as error:
            raise UserError(f"the reward server {self.url} answered nonsense: {error}") from error

    def _pictures_a_request(self, images: torch.Tensor) -> int:
        bytes_each = images[:1].numel() * images.element_size()
        # A tenth is left for prompts and headers.
        fitting = int(0.9 * self.max_bytes) // bytes_each if bytes_each else self.max_pictures
        if fitting < 1:
            raise UserError(
                f"a picture of {bytes_each} bytes is too large for the reward server {self.url}; its limit is "
                f"{self.max_bytes} bytes a request: start it with a larger --max-bytes"
            )
        return min(fitting, self.max_pictures)

    def _info(self) -> dict[str, Any]:
        try:
            info = json.loads(self._request("GET", "/"))
            # Both sides of the handshake: the server judged this client's protocol, this is the server's.
            if info["protocol"] != wire.PROTOCOL:
                raise UserError(
                    f"the reward server {self.url} speaks protocol {info['protocol']} (rsaft_fast {info['package']}), "
                    f"this client {wire.PROTOCOL}; install the same version of rsaft_fast on both sides"
                )
            return {key: info[key] for key in ("rewards", "max_pictures", "max_bytes")}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"what answers at {self.url} is not a reward server (rsaft-fast serve)") from error

    def _request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The answer's body, after as many tries as it takes and `waits` allow."""
        problem = ""
        for wait in (*self._waits, None):
            try:
                status, content = self._send(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {first_line(error)}"
            else:
                if status == 200:
                    return content
                if status not in _WORTH_ANOTHER_TRY:
                    raise UserError(f"the reward server {self.url} refuses ({status}): {_detail(content)}")
                problem = f"{status}: {_detail(content)}"
            if wait is not None:
                time.sleep(wait)
        raise UserError(
            f"the reward server {self.url} did not answer in {len(self._waits) + 1} tries ({problem}); see whether "
            "rsaft-fast serve still runs there, and give the address that it printed"
        )

    def _send(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = make(self._host, timeout=self.timeout)
        headers = {
            "Authorization": f"Bearer {self._token}",
            wire.PROTOCOL_HEADER: str(wire.PROTOCOL),
            "Content-Type": wire.TENSORS,
        }
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def load_remote(
    path: str, *, token_variable: str = wire.TOKEN_VARIABLE, timeout: float = 60.0, device: torch.device | str = "cpu"
) -> RemoteReward:
    """The reward at a server's address.

    Args:
        path: http://HOST:PORT/NAME.
        token_variable: the environment variable that holds the token; a recipe must not.
        timeout: see `RemoteReward`.
        device: unused; scores come back to where the pictures are.

    Raises:
        UserError: no token, or see `RemoteReward`.
    """
    _parts(path)
    token = os.environ.get(token_variable, "")
    if not token:
        raise UserError(
            f"reward {path}: the environment variable {token_variable} is not set; export the token that rsaft-fast "
            "serve printed"
        )
    return RemoteReward(path, token, timeout=timeout)


def _parts(url: str) -> tuple[str, bool, str]:
    """Host with port, whether it is https, and the reward's name or ""."""
    try:
        split = urlsplit(url)
        valid = split.scheme in ("http", "https") and bool(split.hostname) and split.port != 0
    except ValueError:
        valid = False
    if not valid or split.query or split.fragment or split.username or "/" in split.path.strip("/"):
        raise UserError(f"{url!r} is not the address of a reward server; expected http://HOST:PORT/NAME")
    return split.netloc, split.scheme == "https", unquote(split.path.strip("/"))


def _pick(name: str, rewards: Mapping[str, Any], url: str) -> str:
    if name in rewards:
        return name
    if not name and len(rewards) == 1:
        return next(iter(rewards))
    served = ", ".join(rewards)
    asked = f"serves no {name!r}" if name else "serves several rewards"
    raise UserError(f"the reward server {url} {asked}; it has {served}: end the address with one of them")


def _detail(content: bytes) -> str:
    try:
        return str(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode("utf-8", "replace").strip() or "no reason given"
