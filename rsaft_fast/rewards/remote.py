"""A reward that another process computes: the client of `rsaft-fast serve`. It needs none of the server's packages."""

from __future__ import annotations

import http.client
import json
import logging
import os
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal
from urllib.parse import quote

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rsaft_fast.errors import UnreachableError, UserError, describe_error, printable
from rsaft_fast.rewards import wire
from rsaft_fast.rewards.base import OffDevice, Reward, RewardSpec, check_prompts
from rsaft_fast.rewards.exchange import Oversized, exchange, parse_address
from rsaft_fast.rewards.settings import RewardSettings, register

log = logging.getLogger(__name__)

TOKEN_PREFIX = "RSAFT_"
# Seconds between two tries: a server that was only busy is asked soon, one that loads its weights not too often.
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0
_SAID_EVERY = 30.0
_WORTH_ANOTHER_TRY = (502, 503, 504)
# An honest answer is a few kB: what is served, or eight bytes a score.
_LONGEST_INFO = 2**20
_LONGEST_SCORES = 2**16
_DEEPEST_SPEC = 16


class RemoteReward(Reward):
    """Scores from a reward server; the picture goes there bit for bit, and no gradient comes back.

    Scoring changes nothing on the server, so a request whose answer was lost is simply sent again.

    Attributes:
        spec: the served reward's own, so that scores and calibrations are the same here and there.
    """

    differentiable = False
    elsewhere = True

    def __init__(self, url: str, token: str, *, timeout: float = 60.0, patience: float = 120.0):
        """Ask the server what it serves.

        Args:
            url: http://HOST:PORT/NAME; without NAME the only reward that is served.
            token: what the server was started with, or printed.
            timeout: seconds for one request to be sent, and again for its answer.
            patience: seconds during which a request that failed is tried again: a server that restarts loads its
                weights anew.

        Raises:
            UserError: no server, another protocol, a wrong token, or no reward of that name.
        """
        super().__init__()
        wire.check_token(token, "the token of the reward server")
        self.url, self._token, self.timeout, self.patience = url, token, timeout, patience
        self._address = parse_address(url)
        if not self._address.secure and not self._address.here:
            log.warning(
                "rsaft-fast: warning: %s is not on this machine: pictures, prompts and the token travel there "
                "unencrypted; take https, or a tunnel (ssh -L)",
                url,
            )
        info, specs = self._info()
        self.name = _pick(self._address.name, info.rewards, url)
        self.max_pictures, self.max_bytes, self.max_prompt = info.max_pictures, info.max_bytes, info.max_prompt
        self.spec = RewardSpec(**info.rewards[self.name].model_dump())
        self._fingerprint = wire.fingerprint(specs[self.name])

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Find now what the server would refuse later.

        Raises:
            UserError: a prompt that is too long for the server, or no text.
        """
        self._check_texts(prompts)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) of images (B, 3, H, W) in the served reward's score dtype, on the images' device.

        Raises:
            UnreachableError: a server that is gone.
            UserError: prompts that are not one string an image, a server that refuses, or that answers nonsense.
        """
        check_prompts(prompts, len(images))
        wire.check_images(images)
        self._check_texts(prompts)
        step = self._pictures_a_request(images)
        parts = [self._score(images[i : i + step], prompts[i : i + step]) for i in range(0, max(len(images), 1), step)]
        return torch.cat(parts).to(images.device)

    def _check_texts(self, prompts: Sequence[str]) -> None:
        try:
            wire.check_texts(prompts, self.max_prompt)
        except UserError as error:
            raise UserError(f"the reward server {self.url} takes no such prompt: {error}") from error

    def _score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        body = wire.encode_request(images, prompts)
        longest = _LONGEST_SCORES + 8 * len(images)
        answer = self._request("POST", f"/{quote(self.name, safe='')}", body, longest)
        try:
            return wire.decode_scores(answer, len(images))
        except UserError as error:
            raise UserError(f"the reward server {self.url} answered nonsense: {error}") from error

    def _pictures_a_request(self, images: torch.Tensor) -> int:
        bytes_each = images[:1].numel() * images.element_size()
        # A tenth is left for prompts and headers.
        fitting = self.max_bytes * 9 // 10 // bytes_each if bytes_each else self.max_pictures
        if fitting < 1:
            raise UserError(
                f"a picture of {bytes_each} bytes is too large for the reward server {self.url}; its limit is "
                f"{self.max_bytes} bytes a request: start it with a larger --max-bytes"
            )
        return min(fitting, self.max_pictures)

    def _info(self) -> tuple[_Info, dict[str, Any]]:
        """What the server says of itself, and its rewards' specs word for word."""
        content = self._request("GET", "/", None, _LONGEST_INFO)
        try:
            info = json.loads(content)
            spoken, package = info["protocol"], str(info["package"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"what answers at {self.url} is not a reward server (rsaft-fast serve)") from error
        # Both sides of the handshake: the server judged this client's protocol, this is the server's.
        if spoken != wire.PROTOCOL:
            raise UserError(
                f"the reward server {self.url} speaks protocol {_shown(spoken)} (rsaft_fast {_shown(package)}), this "
                f"client {wire.PROTOCOL}; install the same version of rsaft_fast on both sides"
            )
        try:
            return _Info.model_validate(info), info["rewards"]
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"what the server at {self.url} says of itself is not what a reward server (rsaft-fast serve) says: "
                f"{_shown(where)}: {_shown(first['msg'])}"
            ) from error

    def _request(self, method: str, path: str, body: bytes | None, longest: int) -> bytes:
        """The answer's body, after as many tries as it takes and `patience` allows."""
        began = time.monotonic()
        tries, wait, said = 0, _FIRST_WAIT, -_SAID_EVERY
        while True:
            problem = self._try(method, path, body, longest)
            if isinstance(problem, bytes):
                if said >= 0:
                    log.warning("rsaft-fast: the reward server %s answers again", self.url)
                return problem
            tries += 1
            waited = time.monotonic() - began
            if waited + wait > self.patience:
                raise UnreachableError(
                    f"the reward server {self.url} did not answer in {tries} tries over {waited:.1f} s ({problem}); "
                    "see whether rsaft-fast serve still runs there, and give the address that it printed; "
                    f"reward.patience, {self.patience:g} s, is how long it is waited for"
                )
            # Being told to come back in a moment is no news.
            if waited + wait >= 1 and waited - said >= _SAID_EVERY:
                said = waited
                log.warning(
                    "rsaft-fast: the reward server %s does not answer (%s); trying again for %.0f s",
                    self.url,
                    problem,
                    self.patience - waited,
                )
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _try(self, method: str, path: str, body: bytes | None, longest: int) -> bytes | str:
        """The answer's body, or what was wrong if another try may help."""
        headers = {
            "Authorization": f"Bearer {self._token}",
            wire.PROTOCOL_HEADER: str(wire.PROTOCOL),
            "Content-Type": wire.TENSORS,
        }
        if body is not None:
            headers[wire.REWARD_HEADER] = self._fingerprint
        try:
            status, content = exchange(self._address, method, path, headers, body, self.timeout, longest)
        except Oversized as error:
            raise UserError(f"what answers at {self.url} is not a reward server: its answer has {error}") from error
        except (OSError, http.client.IncompleteRead) as error:
            problem = _shown(describe_error(error))
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                raise UserError(f"{self.url} speaks no TLS, or shows a certificate of another ({problem})") from error
            return problem
        except (http.client.HTTPException, ValueError) as error:
            raise UserError(f"what answers at {self.url} speaks no HTTP ({type(error).__name__})") from error
        if status == 200:
            return content
        if status in _WORTH_ANOTHER_TRY:
            return f"{status}: {_detail(content)}"
        if 300 <= status < 400:
            raise UserError(
                f"the reward server {self.url} sends elsewhere ({status}), which is not followed: the token would go "
                "there too; give the final address"
            )
        raise UserError(f"the reward server {self.url} refuses ({status}): {_detail(content)}")


@register
class RemoteSettings(RewardSettings):
    """A reward that a server computes (rsaft-fast serve).

    Attributes:
        path: http://HOST:PORT/NAME.
        token_variable: the environment variable that holds the server's token; its name begins with RSAFT_.
        timeout: seconds to wait for one answer.
        patience: seconds during which a server that does not answer is tried again.
    """

    name: Literal["remote"] = "remote"
    token_variable: str = Field(default=wire.TOKEN_VARIABLE, min_length=1)
    timeout: float = Field(default=60.0, gt=0)
    patience: float = Field(default=120.0, ge=0)

    differentiable: ClassVar[bool] = False

    @field_validator("token_variable")
    @classmethod
    def _ours(cls, name: str) -> str:
        try:
            check_token_variable(name)
        except UserError as error:
            raise ValueError(str(error)) from error
        return name

    def load(self, device: torch.device | str = "cpu") -> RemoteReward:
        """Ask the server what it serves; scores come back to where the pictures are.

        Raises:
            UserError: no token, or see `RemoteReward`.
        """
        parse_address(self.path)
        check_token_variable(self.token_variable)
        token = os.environ.get(self.token_variable, "")
        if not token:
            raise UserError(
                f"reward {self.path}: the environment variable {self.token_variable} is not set; export the token that "
                "rsaft-fast serve printed"
            )
        wire.check_token(token, f"the environment variable {self.token_variable}")
        return RemoteReward(self.path, token, timeout=self.timeout, patience=self.patience)

    def shapes(self, log: Callable[[str], None]) -> OffDevice:
        """Another process computes it."""
        return OffDevice(RewardSpec(self.name))


def check_token_variable(name: str) -> None:
    """Refuse other variables than this project's.

    A recipe from a stranger names both the variable and the server that gets its value.

    Raises:
        UserError: a name that does not begin with `TOKEN_PREFIX`.
    """
    if not name.startswith(TOKEN_PREFIX):
        raise UserError(
            f"token_variable is {_shown(name)!r}, whose value would be sent to the server; only variables that begin "
            f"with {TOKEN_PREFIX} are: export the token as {wire.TOKEN_VARIABLE}"
        )


_Text = Field(default="", max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")


class _Spec(BaseModel):
    """A `RewardSpec` as a server sends it; what a later version adds is left out."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    name: str = _Text
    source: str = _Text
    sha256: str = _Text
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    licence: str = _Text
    converted_from: str = _Text

    @field_validator("preprocessing")
    @classmethod
    def _writable(cls, content: dict[str, Any]) -> dict[str, Any]:
        # It goes into files of results, whose writers follow it by recursion.
        if _deeper(content, _DEEPEST_SPEC):
            raise ValueError(f"nested deeper than {_DEEPEST_SPEC} levels")
        return content


class _Info(BaseModel):
    """What a server says of itself; what a later version adds is left out."""

    model_config = ConfigDict(strict=True, extra="ignore")

    rewards: dict[str, _Spec] = Field(min_length=1)
    max_pictures: int = Field(ge=1)
    max_bytes: int = Field(ge=1)
    # Servers of this protocol once had no such limit.
    max_prompt: int = Field(default=10_000, ge=1)


def _deeper(content: object, levels: int) -> bool:
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return bool(inside) and (levels == 0 or any(_deeper(part, levels - 1) for part in inside))


def _pick(name: str, rewards: Mapping[str, Any], url: str) -> str:
    if name in rewards:
        return name
    if not name and len(rewards) == 1:
        return next(iter(rewards))
    served = _shown(", ".join(rewards))
    asked = f"serves no {name[:80]!r}" if name else "serves several rewards"
    raise UserError(f"the reward server {url} {asked}; it has {served}: end the address with one of them")


def _detail(content: bytes) -> str:
    try:
        return _shown(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return _shown(content[:1000].decode("utf-8", "replace")) or "no reason given"


def _shown(text: object) -> str:
    """A stranger's text as one short line without control characters."""
    line = " ".join(str(text)[:1000].split())
    return printable(line, "?")[:300]
