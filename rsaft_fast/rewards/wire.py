"""What a reward server and its client say to each other: safetensors and JSON over HTTP, never a pickle.

Requests carry the header `X-RSAFT-Protocol` and `Authorization: Bearer <token>`.

  GET  /             what is served: {"protocol", "package", "rewards": {name: spec}, "max_pictures", "max_bytes",
                     "max_prompt"}
  POST /<name>       scores. Body of type `TENSORS`: safetensors with `images` (B, 3, H, W), floating point, nominally
                     0 to 1, and `prompts`, the UTF-8 bytes of a JSON list; the answer holds `scores` (B,).
                     Body of type `JSON`: {"prompts": [...], "images": [base64 of PNG, JPEG, WebP or BMP, ...]}; the
                     answer is {"scores": [...]}, null where a score is not finite.

With the header `X-RSAFT-Reward`, the fingerprint of what `GET /` said of the reward, a server that serves another one
under the same name by now refuses instead of scoring.

Errors are {"detail": "one line"}: 400 malformed, 401 token, 404 name, 408 a body that came too slowly, 409 another
protocol or reward, 413 too large, 422 refused by the reward, 503 busy or shutting down (worth another try).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from rsaft_fast.errors import UserError
from rsaft_fast.paths import require_utf8

PROTOCOL = 1
PROTOCOL_HEADER = "X-RSAFT-Protocol"
REWARD_HEADER = "X-RSAFT-Reward"
TENSORS, JSON = "application/x-safetensors", "application/json"
TOKEN_VARIABLE = "RSAFT_SERVER_TOKEN"

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SCORES = (torch.float32, torch.float64)
# JSON writes a character in at most two escapes of six bytes.
_BYTES_A_CHARACTER = 12


class TooLarge(UserError):
    """Well-formed, and beyond a limit of the server."""


def fingerprint(spec: Mapping[str, Any]) -> str:
    """Compute what two specs share only if they are one reward.

    Specs are dicts (of a dataclass or from JSON); where files lie does not count.
    """
    content = json.dumps(_placeless(spec), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _placeless(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _placeless(value) for key, value in content.items() if key != "source"}
    return [_placeless(value) for value in content] if isinstance(content, (list, tuple)) else content


def check_token(token: str, origin: str) -> None:
    """Refuse what cannot be a header's value; the token itself stays out of the message.

    Raises:
        UserError: empty, or other than printable ASCII without spaces.
    """
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{origin} has {len(token)} characters, not all of them printable ASCII without spaces; give the token as "
            "rsaft-fast serve printed it"
        )


def encode_request(images: torch.Tensor, prompts: Sequence[str]) -> bytes:
    """Images (B, 3, H, W) and B prompts as the body of a request; pixels travel bit for bit."""
    text = bytearray(json.dumps(list(prompts), ensure_ascii=False).encode("utf-8"))
    return save({"images": images.detach().cpu().contiguous(), "prompts": torch.frombuffer(text, dtype=torch.uint8)})


def decode_request(body: bytes, max_prompt: int) -> tuple[torch.Tensor, list[str]]:
    """The images and prompts of a request.

    Raises:
        UserError: anything but what `encode_request` makes.
        TooLarge: a prompt of more than `max_prompt` characters.
    """
    tensors = _load(body)
    if tensors.keys() != {"images", "prompts"}:
        raise UserError(f"the tensors are {', '.join(sorted(tensors)) or 'none'}; expected images and prompts")
    images, text = tensors["images"], tensors["prompts"]
    check_images(images)
    if text.dtype != torch.uint8 or text.ndim != 1:
        raise UserError(f"prompts is {_kind(text)}; expected the bytes of a JSON list, uint8 of one dimension")
    # Before it is parsed.
    if len(text) > 16 + len(images) * (max_prompt * _BYTES_A_CHARACTER + 16):
        raise TooLarge(f"{len(text)} bytes of prompts for {len(images)} images; {_limit(max_prompt)}")
    try:
        prompts = json.loads(bytes(text.numpy()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"prompts is not a JSON list in UTF-8 ({error})") from error
    return images, checked_prompts(prompts, len(images), max_prompt)


def encode_scores(scores: torch.Tensor) -> bytes:
    """Scores (B,) as the body of an answer, in fp32 at least."""
    scores = scores.detach().cpu()
    return save({"scores": scores.to(torch.promote_types(scores.dtype, torch.float32)).contiguous()})


def decode_scores(body: bytes, count: int) -> torch.Tensor:
    """The scores of an answer.

    Raises:
        UserError: anything but `count` scores in fp32 or float64.
    """
    tensors = _load(body)
    scores = tensors.get("scores")
    if len(tensors) != 1 or scores is None or scores.dtype not in _SCORES or scores.shape != (count,):
        kind = f"{len(tensors)} tensors" if len(tensors) != 1 or scores is None else _kind(scores)
        raise UserError(f"the answer holds {kind}; expected {count} scores in fp32 or float64 and nothing else")
    return scores


def checked_prompts(prompts: object, images: int, max_prompt: int) -> list[str]:
    """`prompts` if it is a list of one string an image, else `UserError`; `TooLarge` for one that is too long."""
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("prompts is not a list of strings")
    if len(prompts) != images:
        raise UserError(f"{len(prompts)} prompts for {images} images; give one prompt an image")
    check_texts(prompts, max_prompt)
    return prompts


def check_texts(prompts: Sequence[str], max_prompt: int) -> None:
    """Refuse prompts that are longer than `max_prompt` characters, or that no encoding can hold.

    Raises:
        UserError: one has half a character (of a surrogate pair).
        TooLarge: one is too long.
    """
    for index, prompt in enumerate(prompts):
        if len(prompt) > max_prompt:
            raise TooLarge(f"prompt {index} has {len(prompt)} characters; {_limit(max_prompt)}")
        try:
            require_utf8(prompt)
        except ValueError as error:
            raise UserError(f"in prompt {index}, {error}") from error


def _limit(max_prompt: int) -> str:
    return f"this server's limit is {max_prompt} characters a prompt (--max-prompt)"


def check_images(images: torch.Tensor) -> None:
    """Refuse anything but (B, 3, H, W) in floating point."""
    if images.dtype not in _FLOATS or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise UserError(f"images is {_kind(images)}; expected (B, 3, H, W) in floating point, nominally 0 to 1")


def _load(body: bytes) -> dict[str, torch.Tensor]:
    try:
        return load(body)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"the body is not safetensors ({type(error).__name__}: {error})") from error


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
