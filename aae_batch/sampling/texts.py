"""Which texts a sample is denoised under, and what is made of the predictions.

What a method does to the latents besides is the engine's.

- `whole`: the prompt.
- `conjuncts`: each conjunct of the prompt by itself, and their scores are added (composable-diffusion, Liu
  et al. 2022, arXiv 2206.01714).
- `phrases`: the prompt, whose values in cross-attention also come from its noun phrases
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
    """A text as a row of the UNet's batch: `keys` and `values`, [tokens, width], are what
    cross-attention makes its keys and its values of. They differ in structure-diffusion alone."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Condition(Text):
    """A text to be drawn.

    Attributes:
        positions: of the prompt's tokens that are this text's own; in it they stand at 1, 2, ...
        words_end: the position in it at which the softmax over words ends.
    """

    positions: range
    words_end: int


@dataclass(frozen=True)
class Conditioning:
    """All texts of a sample.

    Attributes:
        conditions: one, or the conjuncts.
        negative: what to move away from; None where there is no classifier-free guidance.
        weight: of each condition.
    """

    conditions: tuple[Condition, ...]
    negative: Text | None
    weight: float

    def combine(self, negative: Tensor | None, conditional: Tensor) -> Tensor:
        """`e + sum_i w (e_i - e)`, the conjunction of Liu et al. (their equation 11).

        Of a single condition it is classifier-free guidance, and without a negative text the
        condition's own prediction. It is linear, so it holds for predictions of v as for those of
        the noise.

        Args:
            negative: the prediction for the negative text, [channels, height, width].
            conditional: those for the conditions, [conditions, channels, height, width].
        """
        if negative is None:
            return conditional[0]
        return negative + (self.weight * (conditional - negative)).sum(dim=0)


def condition(
    model: StableDiffusion, prompt: str, config: GuidanceConfig, subjects: Sequence[Subject]
) -> Conditioning:
    """The texts that the configured method denoises `prompt` under.

    The conjuncts of composable-diffusion have `guidance_scale` as their weight each, as in the
    authors' implementation. Where that is 1 or less, which switches classifier-free guidance off,
    they have the weight 1.
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
    """Maps of conditions as maps of their prompts: each word's from the condition it stands in.

    Args:
        maps: [conditions of all texts, height, width, tokens].

    Returns:
        [texts, height, width, tokens]; 0 at tokens of the prompt that no condition has.
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
    """What structure-diffusion makes its values of: the mean over `W_p, W_1, ..., W_k`.

    `W_p` is the prompt, `W_i` the prompt with the i-th noun phrase's own encoding at its place. Feng
    et al. (section 3.2) take the mean of `M V_i` in each cross-attention layer, with the map `M` of
    the prompt's keys and the values `V_i = W_i W_V`. Both products are linear, and so that is
    `M (mean W_i) W_V`: one sequence of values, and no more work than for the prompt alone.

    Args:
        prompt: [tokens, width].
        phrases: the positions of each in the prompt, and its encoding, [tokens, width].
    """
    sequences = [prompt]
    for positions, encoded in phrases:
        aligned = prompt.clone()
        aligned[positions.start : positions.stop] = encoded[1 : 1 + len(positions)]
        sequences.append(aligned)
    return torch.stack(sequences).mean(dim=0)
