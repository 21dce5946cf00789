"""Which texts a sample is denoised with, and how their predictions combine.

The engine does the rest of a method. `Method.texts` is one of:

- `whole`: the prompt.
- `conjuncts`: each conjunct of the prompt separately, with their scores added
  (composable-diffusion, Liu et al. 2022, arXiv 2206.01714).
- `phrases`: the prompt, with cross-attention values that also come from its noun phrases
  (structure-diffusion, Feng et al. 2023, arXiv 2212.05032).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aae_batch.methods import METHODS
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.unet import StableDiffusion
from aae_batch.sampling.phrases import Phrase, conjuncts, noun_phrases
from aae_batch.sampling.words import Subject, token_table


@dataclass(frozen=True)
class Text:
    """An encoded text, one row of the UNet's batch.

    Cross-attention computes its keys from `keys` and its values from `values`, both
    [tokens, width]. They differ only in structure-diffusion.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Condition(Text):
    """A positive text condition.

    Attributes:
        positions: the positions in the prompt of this text's tokens, which stand at 1, 2, ... in
            the text itself.
        words_end: the position in this text at which the softmax over words ends.
    """

    positions: range
    words_end: int


@dataclass(frozen=True)
class Conditioning:
    """All texts of a sample.

    Attributes:
        conditions: the prompt, or its conjuncts.
        negative: what to move away from; None without classifier-free guidance.
        weight: the weight of each condition.
    """

    conditions: tuple[Condition, ...]
    negative: Text | None
    weight: float

    def combine(self, negative: Tensor | None, conditional: Tensor) -> Tensor:
        """Return `e + sum_i w (e_i - e)`, the conjunction of Liu et al. (their equation 11).

        With a single condition this is classifier-free guidance; without a negative text it is the
        condition's own prediction. It is linear, so it holds for predictions of v as well as of the
        noise.

        Args:
            negative: the prediction for the negative text, [channels, height, width].
            conditional: the predictions for the conditions, [conditions, channels, height, width].
        """
        if negative is None:
            return conditional[0]
        return negative + (self.weight * (conditional - negative)).sum(dim=0)


def condition(
    model: StableDiffusion, prompt: str, config: GuidanceConfig, subjects: Sequence[Subject]
) -> Conditioning:
    """Return the texts with which the configured method denoises `prompt`.

    In composable-diffusion each conjunct has the weight `guidance_scale`, as in the authors'
    implementation, or 1 if `guidance_scale` is 1 or less, which switches classifier-free guidance
    off.
    """
    tokenizer, texts = model.tokenizer, METHODS[config.method].texts
    if texts == "conjuncts":
        phrases = conjuncts(tokenizer, prompt, subjects)
    else:
        phrases = (Phrase(prompt, range(1, token_table(tokenizer, prompt).end)),)
    conditions = tuple(_alone(model, phrase, config) for phrase in phrases)
    if texts == "phrases":
        nouns = noun_phrases(tokenizer, prompt, subjects)
        encoded = [(phrase.positions, model.encode(phrase.text)) for phrase in nouns]
        (whole,) = conditions
        conditions = (replace(whole, values=with_phrases(whole.keys, encoded)),)
    is_guided = config.guidance_scale > 1
    negative = None
    if is_guided or len(conditions) > 1:
        empty = model.encode(config.negative_prompt or "")
        negative = Text(empty, empty)
    return Conditioning(conditions, negative, config.guidance_scale if is_guided else 1.0)


def _alone(model: StableDiffusion, phrase: Phrase, config: GuidanceConfig) -> Condition:
    encoded = model.encode(phrase.text)
    table = token_table(model.tokenizer, phrase.text)
    trims = model.is_version_2 if config.normalize_eot is None else config.normalize_eot
    return Condition(encoded, encoded, phrase.positions, table.end if trims else table.length - 1)


def over_prompt(maps: Tensor, texts: Sequence[Conditioning]) -> Tensor:
    """Assemble the conditions' maps into maps of their prompts: each word's map comes from its
    condition.

    Args:
        maps: [conditions of all texts, height, width, tokens].

    Returns:
        [texts, height, width, tokens]; 0 at prompt tokens that no condition contains.
    """
    if len(maps) == len(texts):
        return maps
    whole = maps.new_zeros(len(texts), *maps.shape[1:])
    by_text = maps.split([len(text.conditions) for text in texts])
    for of_prompt, rows, text in zip(whole, by_text, texts, strict=True):
        for of_condition, own in zip(rows, text.conditions, strict=True):
            where = slice(own.positions.start, own.positions.stop)
            of_prompt[..., where] = of_condition[..., 1 : 1 + len(own.positions)]
    return whole


def with_phrases(prompt: Tensor, phrases: Sequence[tuple[range, Tensor]]) -> Tensor:
    """Return structure-diffusion's source of values: the mean over `W_p, W_1, ..., W_k`.

    `W_p` is the prompt, `W_i` the prompt with the i-th noun phrase's own encoding in its place.
    Feng et al. (section 3.2) take the mean of `M V_i` in each cross-attention layer, with the map
    `M` of the prompt's keys and the values `V_i = W_i W_V`. Both products are linear, so this
    equals `M (mean W_i) W_V`: one sequence of values, at the cost of the prompt alone.

    Args:
        prompt: [tokens, width].
        phrases: each phrase's positions in the prompt, and its encoding, [tokens, width].
    """
    sequences = [prompt]
    for positions, encoded in phrases:
        aligned = prompt.clone()
        aligned[positions.start : positions.stop] = encoded[1 : 1 + len(positions)]
        sequences.append(aligned)
    return torch.stack(sequences).mean(dim=0)
