"""Prompts: where they come from, in which order, and their encodings. All of it follows from (seed, step)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from rsaft_fast import playground
from rsaft_fast.backbones import Backbone, Conditioning, PipelineBackbone
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation import prompts as prompt_files
from rsaft_fast.methods import Method
from rsaft_fast.sampling import NoiseSource, derive_rng
from rsaft_fast.step import MicroBatch
from rsaft_fast.train.config import PLAYGROUND, DataSettings


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


class EncodedPrompts:
    """Encodings of prompts, kept on the CPU, so that the text encoders can leave the device.

    Each prompt is encoded alone: its encoding does not depend on which others came with it. An empty text is the
    model's unconditional prompt.
    """

    def __init__(
        self,
        backbone: PipelineBackbone,
        texts: Iterable[str],
        negative_prompt: str = "",
        guidance_scale: float = 1.0,
        true_cfg_scale: float = 1.0,
    ):
        self.device = backbone.device
        self.guidance_scale = backbone.cfg_scale(guidance_scale, true_cfg_scale)
        if negative_prompt and backbone.embeds_guidance and self.guidance_scale == 1.0:
            raise UserError(
                "sampler.negative_prompt does nothing at sampler.true_cfg_scale 1: this model's guidance_scale is an "
                "embedding; raise true_cfg_scale, or leave the negative prompt out"
            )
        embed = lambda text: _on_cpu(backbone.embed([text or None], guidance_scale))  # noqa: E731
        self._rows = {text: embed(text) for text in dict.fromkeys(texts)}
        self._negative = None if self.guidance_scale == 1.0 else embed(negative_prompt)

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """The conditioning of a batch of these texts, on the backbone's device."""
        rows = [self._rows[text] for text in texts]
        positive = {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}
        negative = self._negative and {
            name: row.expand(len(texts), *row.shape[1:]).to(self.device) for name, row in self._negative.items()
        }
        return Conditioning(positive, negative, self.guidance_scale)


def _on_cpu(branch) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in branch.items()}


def unload_text_encoders(backbone: PipelineBackbone) -> None:
    """Free the text encoders: T5-XXL alone is 8.9 GiB in bf16."""
    names = [name for name in backbone.pipeline.components if name.startswith("text_encoder")]
    backbone.pipeline.register_modules(**dict.fromkeys(names))


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
        return list(dict.fromkeys(text for step in steps for text in self.texts(step)))

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
