"""Expands a prompt template with named lists into all of its prompts.

In `"a {animal} and a {color} {object}"` each placeholder takes every entry of the list of that name.
Numbered placeholders of one list, `{animal.1}` and `{animal.2}`, take different entries, and each
combination of entries occurs once, in the order of the list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, product
from math import comb, prod

import pyarrow as pa

from aae_batch.columns import MANIFEST_COLUMNS, RESERVED
from aae_batch.errors import ManifestError
from aae_batch.manifest.build.prompt import MOST_PROMPTS, Prompt, Prompts

_GAP = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.\d+)?")
_TAKEN = frozenset(column.name for column in MANIFEST_COLUMNS) | RESERVED


def expand(
    templates: Sequence[str], lists: Mapping[str, Sequence[str]], subjects: Sequence[str] = ()
) -> Prompts:
    """Return all prompts of the templates, filling placeholders with every combination of entries.

    Args:
        subjects: subjects of every prompt, with the templates' placeholders, e.g. `["{animal}",
            "{color} {object}"]`. A template uses the subjects whose placeholders it has; with none of
            them, its prompts have no subjects.

    Returns:
        The prompts, which carry one column per placeholder, null if the template does not have it.

    Raises:
        ManifestError: a placeholder has no list, a list is empty or unused, or there are too many prompts.
    """
    gaps = {template: _gaps(template, lists) for template in templates}
    names = list(dict.fromkeys(name for some in gaps.values() for name in some))
    _check(names, lists, subjects)
    count = sum(
        prod(comb(len(lists[_list_of(group[0])]), len(group)) for group in _groups(own))
        for own in gaps.values()
    )
    if count > MOST_PROMPTS:
        raise ManifestError(
            f"The template makes {count:,} prompts, more than {MOST_PROMPTS:,}; shorten its lists."
        )
    prompts: list[Prompt] = []
    columns: dict[str, list[str | None]] = {name: [] for name in names}
    for template, own in gaps.items():
        named = [subject for subject in subjects if set(_GAP.findall(subject)) <= set(own)]
        for values in _fillings(own, lists):
            filled = tuple(_fill(subject, values) for subject in named)
            prompts.append(Prompt(_fill(template, values), subjects=filled or None))
            for name in names:
                columns[name].append(values.get(name))
    return Prompts(prompts, {name: pa.array(some, pa.string()) for name, some in columns.items()})


def _gaps(template: str, lists: Mapping[str, Sequence[str]]) -> list[str]:
    names = list(dict.fromkeys(_GAP.findall(template)))
    for name in names:
        if not _NAME.fullmatch(name) or not lists.get(_list_of(name)):
            have = ", ".join(lists) or "none"
            raise ManifestError(
                f"Template {template!r} has a placeholder {{{name}}} but no list for it; the lists are "
                f"{have}."
            )
        if name in _TAKEN:
            raise ManifestError(
                f"The list {name} has the name of a column of the manifest or the metadata; rename "
                f"it, e.g. to my_{name}."
            )
    if not template.strip():
        raise ManifestError('The template is empty; write e.g. "a {animal} and a {object}".')
    return names


def _check(names: list[str], lists: Mapping[str, Sequence[str]], subjects: Sequence[str]) -> None:
    unused = set(lists) - {_list_of(name) for name in names}
    if unused:
        raise ManifestError(
            f"No template uses the list {', '.join(sorted(unused))}; remove it, or write its name in "
            "braces where it belongs."
        )
    unknown = {name for subject in subjects for name in _GAP.findall(subject)} - set(names)
    if unknown:
        raise ManifestError(
            f"The subjects have a placeholder {{{min(unknown)}}} that no template has; the "
            f"placeholders are {', '.join(names) or 'none'}."
        )


def _list_of(name: str) -> str:
    return name.partition(".")[0]


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Group the placeholders that are filled together: numbered ones by list, each other one alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_list_of(name) + "." if "." in name else name, []).append(name)
    return list(groups.values())


def _fillings(names: Sequence[str], lists: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    groups = _groups(names)
    in_order = [name for group in groups for name in group]
    ways = [combinations(lists[_list_of(group[0])], len(group)) for group in groups]
    for chosen in product(*ways):
        yield dict(zip(in_order, chain(*chosen), strict=True))


def _fill(text: str, values: Mapping[str, str]) -> str:
    return _GAP.sub(lambda gap: values[gap[1]], text)
