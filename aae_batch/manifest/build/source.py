"""Reads prompts from lines of text, a table, or a YAML file with a template and its lists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import yaml

from aae_batch.errors import ManifestError, OutputError, shown
from aae_batch.manifest.build.prompt import MOST_PROMPTS, Prompt, Prompts
from aae_batch.manifest.build.template import expand
from aae_batch.manifest.reader import FORMATS, Manifest, format_of, open_manifest
from aae_batch.store.base import expanded, is_url
from aae_batch.store.fetch import fetch
from aae_batch.store.scratch import scratch_folder

YAML = (".yaml", ".yml")
_SETTINGS = (
    "negative_prompt", "guidance_scale", "num_inference_steps", "height", "width", "seed", "method"
)  # fmt: skip
_ROWS_AT_ONCE = 10_000


def read_prompts(
    path: str,
    template: str | None = None,
    subjects: Sequence[str] = (),
    s3_endpoint: str | None = None,
) -> Prompts:
    """Read the prompts of a file, by its suffix.

    `.txt` has one prompt per line. Tables are those that a manifest may be; the columns of a row are kept
    with its prompt. `.yaml` has named lists, and optionally `template`, a text or a list
    of texts, and `subjects`.

    Args:
        path: path or URL of the file.
        template: overrides the template of a `.yaml` file.
        subjects: overrides the subjects of a `.yaml` file.

    Raises:
        ManifestError: the file cannot be read, one of its rows is invalid, or it has too many prompts.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in YAML:
        return _from_yaml(path, read_text(path, s3_endpoint), template, subjects)
    if template or subjects:
        raise ManifestError(
            f"A template takes its lists from a .yaml file, which {path} is not; write the lists "
            "into one, or leave --template and --subjects out."
        )
    if suffix == ".txt":
        lines = read_text(path, s3_endpoint).split(
            "\n"
        )  # not splitlines(): a prompt may contain U+2028
        prompts = [Prompt(line.strip()) for line in lines if line.strip()]
        _check_number(path, len(prompts))
        return Prompts(prompts)
    if format_of(path) or not suffix or os.path.isdir(expanded(path)):
        with open_manifest(path, s3_endpoint) as manifest:
            _check_number(path, len(manifest))
            return _from_table(manifest)
    raise ManifestError(f"Source {path} must end in one of {', '.join(('.txt', *FORMATS, *YAML))}.")


def _check_number(path: str, count: int) -> None:
    if count > MOST_PROMPTS:
        raise ManifestError(
            f"{path} has {count:,} prompts, more than {MOST_PROMPTS:,}; split it and make a manifest of "
            "each part."
        )


def read_text(path: str, s3_endpoint: str | None = None) -> str:
    """Read a text file from a path or a URL.

    Raises:
        ManifestError: the file cannot be read, or is not UTF-8.
    """
    try:
        if not is_url(path):
            return Path(expanded(path)).read_text(encoding="utf-8-sig")
        with scratch_folder() as folder:
            return fetch(path, folder, s3_endpoint).read_text(encoding="utf-8-sig")
    except UnicodeError:
        raise ManifestError(f"{path} is not UTF-8; save it as UTF-8 text.") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ManifestError(f"{path} cannot be read: {reason}.") from error
    except OutputError as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None


# --- a template ----------------------------------------------------------------------------------


def _from_yaml(path: str, text: str, template: str | None, subjects: Sequence[str]) -> Prompts:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ManifestError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ManifestError(f"{path} has no lists; write e.g. 'animal: [cat, dog]'.")
    own_template, own_subjects = content.pop("template", []), content.pop("subjects", [])
    templates = [template] if template else _texts(path, "template", own_template)
    if not templates:
        raise ManifestError(
            f"{path} has no template; write e.g. 'template: \"a {{animal}} and a {{object}}\"', or "
            "give --template."
        )
    lists = {str(name): _texts(path, str(name), some) for name, some in content.items()}
    return expand(templates, lists, list(subjects) or _texts(path, "subjects", own_subjects))


def _texts(path: str, name: str, value: Any) -> list[str]:
    """Return a list of texts; a single text becomes a list of one."""
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not isinstance(entry, str) or not entry.strip():
            raise ManifestError(
                f"{path}: {name} has an entry {shown(entry)}, which is not text; write it in quotes."
            )
    if len(set(entries)) < len(entries):
        raise ManifestError(f"{path}: {name} has an entry twice; keep one.")
    return entries


# --- a table -------------------------------------------------------------------------------------


def _from_table(manifest: Manifest) -> Prompts:
    own = manifest.own
    settings = [name for name in _SETTINGS if name in own]
    prompts: list[Prompt] = []
    carried: list[pa.Table] = []
    for start in range(0, len(manifest), _ROWS_AT_ONCE):
        rows, extras = manifest.read(start, min(start + _ROWS_AT_ONCE, len(manifest)))
        carried.append(extras)
        for row in rows:
            if row.error is not None:
                raise ManifestError(f"{manifest.path}, row {row.index + 1}: {row.error.reason}.")
            asked = row.request
            prompts.append(
                Prompt(
                    asked.prompt,
                    subjects=None if asked.subjects is None else tuple(asked.subjects),
                    token_indices=asked.token_indices,  # type: ignore[arg-type] # as read_row makes them
                    name=asked.id if "id" in own else None,
                    settings={name: getattr(asked, name) for name in settings},
                )
            )
    table = pa.concat_tables(carried)
    return Prompts(prompts, {name: table[name] for name in table.column_names})
