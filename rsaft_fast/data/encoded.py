"""Conditioning of any batch, from encodings made once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import SamplerSettings
from rsaft_fast.sampling.branches import join_rows
from rsaft_fast.sampling.protocol import Backbone, Branch, Conditioning


def negative_texts(backbone: Backbone, sampler: SamplerSettings) -> list[str]:
    """List what guidance steers away from: one text, "" for the model's own unconditional prompt, or none.

    Raises:
        UserError: a negative prompt that nothing would use, or a guidance scale that the model does not have.
    """
    scale = backbone.cfg_scale(sampler.guidance_scale, sampler.true_cfg_scale)
    if scale != 1.0:
        return [sampler.negative_prompt]
    if sampler.negative_prompt and backbone.embeds_guidance:
        raise UserError(
            "sampler.negative_prompt does nothing at sampler.true_cfg_scale 1: this model's guidance_scale is an "
            "embedding; raise true_cfg_scale, or leave the negative prompt out"
        )
    return []


class EncodedPrompts:
    """Conditioning of any batch of prompts, from encodings that lie on the host.

    Each prompt is encoded alone: its encoding does not depend on which others came with it. An empty text is the
    model's unconditional prompt.
    """

    def __init__(self, backbone: Backbone, rows: Mapping[str, Branch], sampler: SamplerSettings):
        """`rows`: `embed_text` of each prompt that will be asked for and of `negative_texts`, (1, ...) a tensor."""
        self.backbone, self.rows, self.sampler = backbone, rows, sampler
        self.guidance_scale = backbone.cfg_scale(sampler.guidance_scale, sampler.true_cfg_scale)
        self._negative = next((rows[text] for text in negative_texts(backbone, sampler)), None)

    @classmethod
    def encode(cls, backbone: Backbone, texts: Iterable[str], sampler: SamplerSettings) -> EncodedPrompts:
        """Encode prompts now, by a backbone that has its text encoders."""
        wanted = dict.fromkeys([*texts, *negative_texts(backbone, sampler)])
        embed = lambda text: {n: t.cpu() for n, t in backbone.embed_text([text or None]).items()}  # noqa: E731
        return cls(backbone, {text: embed(text) for text in wanted}, sampler)

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """Give the conditioning of a batch of these texts, on the backbone's device."""
        rows = [self.rows[text] for text in texts]
        positive = join_rows(rows)
        negative = self._negative and {
            name: row.expand(len(texts), *row.shape[1:]) for name, row in self._negative.items()
        }
        branch = lambda text: self.backbone.branch(text, len(texts), self.sampler.guidance_scale)  # noqa: E731
        return Conditioning(branch(positive), negative and branch(negative), self.guidance_scale)
