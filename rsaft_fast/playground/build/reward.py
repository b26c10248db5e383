"""A CLIP-format proxy reward as a function of images with gradient."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from rsaft_fast.playground.build import text
from rsaft_fast.playground.build.settings import Proxy
from rsaft_fast.playground.scenes import IMAGE_SIZE

MEAN, STD = 0.5, 0.25


class ClipReward:
    """Proxy reward: exp(logit_scale) · cos(image embedding, text embedding), PickScore's convention."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def untrained(cls, settings: Proxy, length: int) -> "ClipReward":
        tokenizer = text.tokenizer(length)
        shared = {
            "hidden_size": settings.width,
            "intermediate_size": 4 * settings.width,
            "num_attention_heads": settings.heads,
            "hidden_act": "gelu",
        }
        words = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": length,
            "num_hidden_layers": settings.text_layers,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        pixels = {"image_size": IMAGE_SIZE, "patch_size": settings.patch, "num_hidden_layers": settings.layers}
        config = CLIPConfig(text_config=shared | words, vision_config=shared | pixels, projection_dim=settings.width)
        config._attn_implementation = "eager"  # fused attention has no second derivative
        return cls(CLIPModel(config).eval(), tokenizer)

    @classmethod
    def load(cls, folder: Path) -> "ClipReward":
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return cls(model.eval().requires_grad_(False), CLIPTokenizer.from_pretrained(folder))

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        CLIPImageProcessorPil(
            do_resize=True,
            do_center_crop=False,
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=[MEAN] * 3,
            image_std=[STD] * 3,
        ).save_pretrained(folder)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts as unit vectors (B, D)."""
        ids = text.token_ids(self.tokenizer, list(prompts))
        # Causal attention: what follows the first end token does not matter, so no mask is needed.
        return _unit(self.model.text_projection(self.model.text_model(ids).pooler_output))

    def score(self, images: Tensor, text_embeddings: Tensor) -> Tensor:
        """Score images (B, 3, 32, 32), clamped to [0, 1] here: (B,)."""
        pixels = (images.clamp(0, 1) - MEAN) / STD
        embedded = _unit(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
        return self.model.logit_scale.exp() * (embedded * text_embeddings).sum(1)

    def gradient(self, images: Tensor, text_embeddings: Tensor) -> Tensor:
        """Compute each image's gradient of its score."""
        pixels = images.detach().requires_grad_(True)
        return torch.autograd.grad(self.score(pixels, text_embeddings.detach()).sum(), pixels)[0]


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)
