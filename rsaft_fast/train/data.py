"""Prompts: where they come from, in which order, and their encodings. All of it follows from (seed, step)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch

from rsaft_fast import playground
from rsaft_fast.backbones import Backbone, Branch, Conditioning, PipelineBackbone
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation import prompts as prompt_files
from rsaft_fast.methods import Method
from rsaft_fast.sampling import NoiseSource, derive_rng
from rsaft_fast.step import MicroBatch
from rsaft_fast.train.config import PLAYGROUND, DataSettings, SamplerSettings


def load_prompts(source: str, column: str | None = None, held_out: bool = False) -> list[str]:
    """The prompts of a file, or of the playground (`held_out`: those it is judged on).

    Raises:
        UserError: no such file, or no prompts in it.
    """
    if source == PLAYGROUND and held_out:
        return playground.eval_prompts()
    return prompt_files.load_prompts(source, column)


def epoch_order(seed: int, size: int, first: int, count: int, stream: int = 0) -> list[int]:
    """Indices `first` to `first + count` of an endless sequence of permutations of range(size), one an epoch."""
    places = (divmod(n, size) for n in range(first, first + count))
    return [_permutation(seed, epoch, size, stream)[place] for epoch, place in places]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int, stream: int) -> list[int]:
    return derive_rng(seed, epoch, "prompts", stream).permutation(size).tolist()


def negative_texts(backbone: PipelineBackbone, sampler: SamplerSettings) -> list[str]:
    """What guidance steers away from: one text, "" for the model's own unconditional prompt, or none.

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
    """The conditioning of any batch of prompts, from encodings that lie on the host.

    Each prompt is encoded alone: its encoding does not depend on which others came with it. An empty text is the
    model's unconditional prompt.
    """

    def __init__(self, backbone: PipelineBackbone, rows: Mapping[str, Branch], sampler: SamplerSettings):
        """`rows`: `embed_text` of each prompt that will be asked for and of `negative_texts`, (1, ...) a tensor."""
        self.backbone, self.rows, self.sampler = backbone, rows, sampler
        self.guidance_scale = backbone.cfg_scale(sampler.guidance_scale, sampler.true_cfg_scale)
        self._negative = next((rows[text] for text in negative_texts(backbone, sampler)), None)

    @classmethod
    def encode(cls, backbone: PipelineBackbone, texts: Iterable[str], sampler: SamplerSettings) -> EncodedPrompts:
        """Encode now, by a backbone that has its text encoders."""
        wanted = dict.fromkeys([*texts, *negative_texts(backbone, sampler)])
        embed = lambda text: {n: t.cpu() for n, t in backbone.embed_text([text or None]).items()}  # noqa: E731
        return cls(backbone, {text: embed(text) for text in wanted}, sampler)

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """The conditioning of a batch of these texts, on the backbone's device."""
        rows = [self.rows[text] for text in texts]
        positive = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        negative = self._negative and {
            name: row.expand(len(texts), *row.shape[1:]) for name, row in self._negative.items()
        }
        branch = lambda text: self.backbone.branch(text, len(texts), self.sampler.guidance_scale)  # noqa: E731
        return Conditioning(branch(positive), negative and branch(negative), self.guidance_scale)


class PromptBatches:
    """The micro-batches of every update."""

    def __init__(self, settings: DataSettings, prompts: Sequence[str], method: Method, num_steps: int, seed: int):
        self.settings, self.prompts, self.method = settings, prompts, method
        self.num_steps, self.seed = num_steps, seed
        self.size = settings.batch_size * settings.accumulate

    def texts(self, step: int) -> list[str]:
        """The prompts of one update, in order."""
        return [self.prompts[i] for i in epoch_order(self.seed, len(self.prompts), step * self.size, self.size)]

    def visited(self, steps: range) -> list[str]:
        """Every prompt that these updates see, once."""
        # Two epochs' worth of draws holds a whole one, wherever it begins: whoever sees that many sees them all.
        enough = 2 * len(self.prompts) // self.size + 2
        return list(dict.fromkeys(text for step in steps[:enough] for text in self.texts(step)))

    def __call__(self, backbone: Backbone, encoded: EncodedPrompts, step: int) -> list[MicroBatch]:
        """The micro-batches of update `step`, their noise and plans drawn."""
        texts, batch_size = self.texts(step), self.settings.batch_size
        batches = []
        for index in range(self.settings.accumulate):
            samples = tuple(range(index * batch_size, (index + 1) * batch_size))
            prompts = [texts[i] for i in samples]
            noise = NoiseSource(self.seed, step, samples)
            plan_index = index if self.settings.plan_scope == "micro-batch" else 0
            plan = self.method.draw(self.num_steps, derive_rng(self.seed, step, "plan", plan_index))
            batches.append(MicroBatch(prompts, encoded(prompts), backbone.initial_latents(noise), noise, plan))
        return batches
