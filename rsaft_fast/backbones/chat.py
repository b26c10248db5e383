"""Text encoders that are language models: a prompt reaches them as a message, in the tokenizer's template."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from rsaft_fast.backbones.pipeline import PipelineBackbone
from rsaft_fast.sampling.protocol import Branch

MOST_TOKENS = 512
"""What the pipelines of FLUX.2 and Z-Image read of a prompt in its template, at most."""


class ChatText(PipelineBackbone):
    """Part of a backbone whose one text encoder is a language model.

    Attributes:
        template: options of the tokenizer's `apply_chat_template`, as the pipeline sets them.
        calling: options of the text encoder's call that make or spare tensors, as the pipeline sets them.
    """

    template: ClassVar[Mapping[str, bool]]
    calling: ClassVar[Mapping[str, bool]] = MappingProxyType({"use_cache": False})

    @property
    def text_length(self) -> int:
        """Tokens of a prompt in its template, or fewer where the pipeline's own tokenizer stops earlier."""
        tokenizer = self.pipeline.tokenizer
        return MOST_TOKENS if tokenizer is None else min(MOST_TOKENS, tokenizer.model_max_length)

    @property
    def text_limits(self) -> dict[str, int]:
        return dict.fromkeys(super().text_limits, self.text_length)

    def conversation(self, prompt: str) -> Sequence[Mapping[str, Any]]:
        """The messages that the pipeline makes of a prompt."""
        return [{"role": "user", "content": prompt}]

    def tokenizer_of(self, encoder: str) -> Callable[..., Mapping[str, Any]] | None:
        tokenizer = super().tokenizer_of(encoder)
        return tokenizer and partial(self._tokens_in_template, tokenizer)

    def _tokens_in_template(self, tokenizer: Any, prompts: list[str], **options: Any) -> Mapping[str, Any]:
        template = partial(tokenizer.apply_chat_template, tokenize=False, **self.template)
        return tokenizer([template(self.conversation(prompt)) for prompt in prompts], **options)

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Branch:
        """`encode_text` by the pipeline's own code."""

    def encode_text(self, prompts: list[str]) -> Branch:
        return self._shapes(len(prompts)) if self.device.type == "meta" else self.encode_prompts(prompts)

    def _shapes(self, rows: int) -> Branch:
        """The longest texts as shapes, by a call like the pipeline's.

        That has a row of a mask for each text, at whose values transformers looks; at those of a whole one it does not.
        """
        length = self.text_length
        states = self.pipeline.text_encoder(
            input_ids=torch.empty(rows, length, dtype=torch.int64, device="meta"),
            attention_mask=torch.empty(rows, 1, length, length, dtype=torch.bool, device="meta"),
            output_hidden_states=True,
            **self.calling,
        ).hidden_states
        ((name, (_, width)),) = self.embedding_shapes.items()
        return {name: states[-1].repeat(1, 1, width // states[-1].shape[-1])}
