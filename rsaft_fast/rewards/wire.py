"""What a reward server and its client say to each other: safetensors and JSON over HTTP, never a pickle.

Requests carry the header `X-RSAFT-Protocol` and `Authorization: Bearer <token>`.

  GET  /             what is served: {"protocol", "package", "rewards": {name: spec}, "max_pictures", "max_bytes"}
  POST /<name>       scores. Body of type `TENSORS`: safetensors with `images` (B, 3, H, W), floating point, nominally
                     0 to 1, and `prompts`, the UTF-8 bytes of a JSON list; the answer holds `scores` (B,).
                     Body of type `JSON`: {"prompts": [...], "images": [base64 of PNG, JPEG, WebP or BMP, ...]}; the
                     answer is {"scores": [...]}, null where a score is not finite.

Errors are {"detail": "one line"}: 400 malformed, 401 token, 404 name, 409 another protocol, 413 too large, 422 refused
by the reward, 503 busy or shutting down (worth another try).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from rsaft_fast.errors import UserError

PROTOCOL = 1
PROTOCOL_HEADER = "X-RSAFT-Protocol"
TENSORS, JSON = "application/x-safetensors", "application/json"
TOKEN_VARIABLE = "RSAFT_SERVER_TOKEN"

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def encode_request(images: torch.Tensor, prompts: Sequence[str]) -> bytes:
    """Images (B, 3, H, W) and B prompts as the body of a request; pixels travel bit for bit."""
    text = bytearray(json.dumps(list(prompts), ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return save({"images": images.detach().cpu().contiguous(), "prompts": torch.frombuffer(text, dtype=torch.uint8)})


def decode_request(body: bytes) -> tuple[torch.Tensor, list[str]]:
    """The images and prompts of a request.

    Raises:
        UserError: anything but what `encode_request` makes.
    """
    tensors = _load(body)
    if tensors.keys() != {"images", "prompts"}:
        raise UserError(f"the tensors are {', '.join(sorted(tensors)) or 'none'}; expected images and prompts")
    images, text = tensors["images"], tensors["prompts"]
    check_images(images)
    if text.dtype != torch.uint8 or text.ndim != 1:
        raise UserError(f"prompts is {_kind(text)}; expected the bytes of a JSON list, uint8 of one dimension")
    try:
        prompts = json.loads(bytes(text.numpy()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"prompts is not a JSON list in UTF-8 ({error})") from error
    return images, checked_prompts(prompts, len(images))


def encode_scores(scores: torch.Tensor) -> bytes:
    """Scores (B,) as the body of an answer."""
    return save({"scores": scores.detach().cpu().contiguous()})


def decode_scores(body: bytes, count: int) -> torch.Tensor:
    """The scores of an answer.

    Raises:
        UserError: anything but `count` floating-point scores.
    """
    scores = _load(body).get("scores")
    if scores is None or scores.dtype not in _FLOATS or scores.shape != (count,):
        kind = "nothing" if scores is None else _kind(scores)
        raise UserError(f"the answer holds {kind}; expected {count} scores")
    return scores


def checked_prompts(prompts: object, images: int) -> list[str]:
    """`prompts` if it is a list of one string an image, else `UserError`."""
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("prompts is not a list of strings")
    if len(prompts) != images:
        raise UserError(f"{len(prompts)} prompts for {images} images; give one prompt an image")
    return prompts


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
