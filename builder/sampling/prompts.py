"""Prompts become embeddings once per phase; afterwards the text encoders may be dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builder.errors import BuilderError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PromptEmbedding:
    """What the denoiser gets of a prompt: the states of its tokens [tokens, width], and one vector for all [width].

    The vector has width 0 in a family that has none.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor

    def to(self, *args: Any, **kwargs: Any) -> PromptEmbedding:
        return PromptEmbedding(self.hidden.to(*args, **kwargs), self.pooled.to(*args, **kwargs))


@dataclass(frozen=True)
class PromptEmbeddings:
    """The embedding of each phase's prompt, by code, and of the one negative prompt."""

    positive: dict[str, PromptEmbedding]
    negative: PromptEmbedding

    def to(self, *args: Any, **kwargs: Any) -> PromptEmbeddings:
        return PromptEmbeddings(
            {code: embedding.to(*args, **kwargs) for code, embedding in self.positive.items()},
            self.negative.to(*args, **kwargs),
        )


def encode_prompts(pipeline: Any, prompts: dict[str, str], negative_prompt: str) -> PromptEmbeddings:
    """Encode the prompt of each phase code with the pipeline's own text encoders, where and as precise as they are.

    An empty negative prompt is what the family takes for none: SDXL zeros (where the pipeline's
    `force_zeros_for_empty_prompt` says so), Stable Diffusion 1.5 the embedding of "", as when a diffusers pipeline is
    called without a negative prompt.
    BuilderError when two different prompts have the same embedding: their phases could not be told apart.
    """
    import torch

    from builder.models.families import family_of

    family = family_of(pipeline)
    with torch.inference_mode():
        positive = {code: PromptEmbedding(*family.encode(pipeline, prompt)) for code, prompt in prompts.items()}
        without = family.encode(pipeline, negative_prompt) if negative_prompt else family.unconditional(pipeline)
    _require_distinct(positive, prompts)
    return PromptEmbeddings(positive, PromptEmbedding(*without))


def _require_distinct(embeddings: dict[str, PromptEmbedding], prompts: dict[str, str]) -> None:
    import torch

    codes = list(embeddings)
    for i, first in enumerate(codes):
        for second in codes[:i]:
            same = torch.equal(embeddings[first].hidden, embeddings[second].hidden)
            if same and prompts[first] != prompts[second]:
                raise BuilderError(
                    f"the text encoders cannot tell the prompts of {second} and {first} apart: "
                    f"'{prompts[second]}' and '{prompts[first]}'",
                    "put the words that differ first (77 tokens are read), or words that the tokenizer knows",
                )
