"""Which texts a sample is denoised with, and how their predictions combine.

The engine does the rest of a method. `Method.texts` is one of:

- `whole`: the prompt.
- `conjuncts`: each conjunct of the prompt separately, with their scores added
  (composable-diffusion, Liu et al. 2022, arXiv 2206.01714).
- `phrases`: the prompt, with cross-attention values that also come from its noun phrases
  (structure-diffusion, Feng et al. 2023, arXiv 2212.05032).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aae_batch.methods import METHODS
from aae_batch.request import Request
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.family import TEXT, Bag, Network
from aae_batch.sampling.objectives.maps import on_device
from aae_batch.sampling.phrases import Phrase, conjuncts, noun_phrases, whole
from aae_batch.sampling.resolve import as_read, resolve
from aae_batch.sampling.words import Subject, TokenTable, token_tables


@dataclass(frozen=True)
class Text:
    """An encoded text, one row of the network's batch.

    Attributes:
        bag: what the network takes.
        values: [tokens, width], the source of the cross-attention values, which only in
            structure-diffusion is not that of the keys; None if it is.
    """

    bag: Bag
    values: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Condition(Text):
    """A positive text condition.

    Attributes:
        positions: per stream, the positions in the prompt of this text's tokens.
        starts: per stream, the position of the first of them in the text itself.
        words: per stream, the positions in this text that compete in the softmax over words.
    """

    positions: tuple[range, ...]
    starts: tuple[int, ...]
    words: tuple[range, ...]


@dataclass(frozen=True)
class Conditioning:
    """All texts of a sample.

    Attributes:
        conditions: the prompt, or its conjuncts.
        negative: what to move away from; None without classifier-free guidance.
        weight: the weight of each condition.
        rescale: as `guidance_rescale`.
    """

    conditions: tuple[Condition, ...]
    negative: Text | None
    weight: float
    rescale: float = 0.0

    def combine(self, negative: Tensor | None, conditional: Tensor) -> Tensor:
        """Return `e + sum_i w (e_i - e)`, the conjunction of Liu et al. (their equation 11).

        With a single condition this is classifier-free guidance; without a negative text it is the
        condition's own prediction. It is linear, so it holds for predictions of v as well as of the
        noise.

        Of it, the share `rescale` gets the standard deviation of the conditions' mean (Lin et al. 2023,
        arXiv 2305.08891, section 3.4).

        Args:
            negative: the prediction for the negative text, [channels, height, width].
            conditional: the predictions for the conditions, [conditions, channels, height, width].
        """
        if negative is None:
            return conditional[0]
        guided = negative + (self.weight * (conditional - negative)).sum(dim=0)
        if self.rescale == 0:
            return guided
        rescaled = guided * (conditional.mean(dim=0).std() / guided.std())
        return self.rescale * rescaled + (1 - self.rescale) * guided


def condition(
    model: Network, prompt: str, config: GuidanceConfig, subjects: Sequence[Subject]
) -> Conditioning:
    """Return the texts with which the configured method denoises `prompt`.

    In composable-diffusion each conjunct has the weight of classifier-free guidance, as in the
    authors' implementation, or 1 if that is switched off.
    """
    phrases, nouns = _phrases(model, prompt, config, subjects)
    conditions = tuple(_alone(model, phrase, config) for phrase in phrases)
    if nouns:
        encoded = [
            (phrase.positions[0], model.encode(phrase.text, config)[TEXT]) for phrase in nouns
        ]
        (one,) = conditions
        conditions = (replace(one, values=with_phrases(one.bag[TEXT], encoded)),)
    negative = None
    if _has_negative(model, config, len(conditions)):
        negative = Text(model.encode_negative(config))
    weight = max(1.0, model.facts.classifier_free(config))
    return Conditioning(conditions, negative, weight, config.guidance_rescale)


def combine(
    texts: Sequence[Conditioning], negatives: Tensor, conditional: Tensor
) -> Sequence[Tensor]:
    """Return `Conditioning.combine` of several samples, each [channels, height, width]: all at once if each has a
    negative text and one condition, as in classifier-free guidance.

    Args:
        negatives: the predictions for the negative texts, of those that have one.
        conditional: the predictions for the conditions of all.
    """
    if all(text.negative and len(text.conditions) == 1 and text.rescale == 0 for text in texts):
        weights = on_device([text.weight for text in texts], negatives.device, negatives.dtype)
        return (negatives + weights[:, None, None, None] * (conditional - negatives)).unbind()
    rest = iter(negatives)
    parts = conditional.split([len(text.conditions) for text in texts])
    return [
        text.combine(next(rest) if text.negative else None, part)
        for text, part in zip(texts, parts, strict=True)
    ]


def _phrases(
    model: Network, prompt: str, config: GuidanceConfig, subjects: Sequence[Subject]
) -> tuple[tuple[Phrase, ...], tuple[Phrase, ...]]:
    """Return what is denoised, and the noun phrases whose values go into it."""
    streams, texts = model.streams, METHODS[config.method].texts
    if texts == "conjuncts":
        return conjuncts(streams, prompt, subjects), ()
    nouns = noun_phrases(streams, prompt, subjects) if texts == "phrases" else ()
    return (whole(token_tables(streams, prompt)),), nouns


def texts_of(model: Network, request: Request, config: GuidanceConfig) -> list[str]:
    """Return the texts that `condition` will encode.

    Raises:
        RowError: the request cannot be sampled.
    """
    request = as_read(request)
    config, subjects = resolve(request, config, model.streams, model.facts, model.sizes)
    phrases, nouns = _phrases(model, request.prompt, config, subjects)
    texts = [phrase.text for phrase in (*phrases, *nouns)]
    has_negative = _has_negative(model, config, len(phrases))
    return [*texts, config.negative_prompt or ""] if has_negative else texts


def _has_negative(model: Network, config: GuidanceConfig, conditions: int) -> bool:
    """True if a sample moves away from a text: composed conditions always do."""
    return model.facts.rows(config) > 1 or conditions > 1


def _alone(model: Network, phrase: Phrase, config: GuidanceConfig) -> Condition:
    tables = token_tables(model.streams, phrase.text)
    trims = model.trims_text(config)
    return Condition(
        model.encode(phrase.text, config),
        positions=phrase.positions,
        starts=tuple(table.first for table in tables),
        words=tuple(range(table.first, table.end if trims else _last(table)) for table in tables),
    )


def _last(table: TokenTable) -> int:
    """Return where the positions end that compete as in diffusers: before the last, if there is a
    start token."""
    return table.stop - (table.tokens[0].kind == "start")


def columns(conditions: Iterable[Condition]) -> list[int]:
    """Return the positions whose maps count for some of these texts."""
    return sorted({i for one in conditions for words in one.words for i in words})


def as_mask(ranges: Sequence[Sequence[range]], tokens: int, device: torch.device) -> Tensor:
    """Return positions as [rows, tokens], True at those in one of a row's ranges."""
    rows = [[any(i in some for some in row) for i in range(tokens)] for row in ranges]
    return on_device(rows, device)


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
    assembled = maps.new_zeros(len(texts), *maps.shape[1:])
    by_text = maps.split([len(text.conditions) for text in texts])
    for of_prompt, rows, text in zip(assembled, by_text, texts, strict=True):
        for of_condition, own in zip(rows, text.conditions, strict=True):
            for place, start in zip(own.positions, own.starts, strict=True):
                of_own = of_condition[..., start : start + len(place)]
                of_prompt[..., place.start : place.stop] = of_own
    return assembled


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
