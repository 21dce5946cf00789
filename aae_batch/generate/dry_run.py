"""What a job would do, found out with no more of the model than its tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from aae_batch.dataset.reader import Dataset
from aae_batch.generate.records import make_plan
from aae_batch.generate.settings import JobSettings
from aae_batch.manifest.check import check_row, check_settings
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row import Row
from aae_batch.sampling.model.loading import load_tokenizer, load_vae_scale_factor, named
from aae_batch.sampling.phrases import conjuncts, noun_phrases
from aae_batch.sampling.words import Tokenizer, resolve_subjects, token_table
from aae_batch.store.open import open_storage

PROMPTS_SHOWN = 3
FAILURES_SHOWN = 10


def dry_run(settings: JobSettings, write: Callable[[str], None]) -> int:
    """Say what would be done. Returns how many rows would fail.

    Raises:
        AaeBatchError: the job would not start.
    """
    endpoint = settings.s3_endpoint
    with open_manifest(settings.manifest, endpoint) as manifest:
        storage = open_storage(settings.output, endpoint)
        plan = make_plan(settings, manifest, storage)
        if settings.retry_failed:
            plan = plan.retrying(Dataset(storage))
        tokenizer = load_tokenizer(settings.model, revision=settings.revision, s3_endpoint=endpoint)
        factor = load_vae_scale_factor(
            settings.model, revision=settings.revision, s3_endpoint=endpoint
        )
        check_settings(tokenizer, settings.guidance)
        write(f"model: {named(settings.model)}")
        shards = -(-len(manifest) // plan.shard_size)
        left = plan.ledger()
        write(f"{len(manifest)} rows in {shards} shards of {plan.shard_size}")
        write(
            f"{shards - len(left.todo)} shards done, {len(left.todo)} left ({left.rows_left} rows)"
        )
        failures: Counter[str] = Counter()
        for row in manifest.rows():
            if row.index < PROMPTS_SHOWN:
                write(f"row {row.id}: {row.request.prompt!r}")
                write(f"  tokens: {token_table(tokenizer, row.request.prompt)}")
            error = check_row(tokenizer, row, settings.guidance, factor)
            if error is None and row.index < PROMPTS_SHOWN:
                _tell_phrases(tokenizer, row, settings, write)
            if error is not None:
                failures[type(error).__name__] += 1
                if failures.total() <= FAILURES_SHOWN:
                    write(f"would fail: {error}")
        if not failures:
            write("no row would fail")
        for kind, count in failures.most_common():
            write(f"{count} rows would fail with {kind}")
        return failures.total()


def _tell_phrases(
    tokenizer: Tokenizer, row: Row, settings: JobSettings, write: Callable[[str], None]
) -> None:
    """Say what a method that encodes phrases by themselves makes of the prompt."""
    finders = {
        "composable-diffusion": ("conjuncts", conjuncts),
        "structure-diffusion": ("noun phrases", noun_phrases),
    }
    method = _method(row, settings)
    if method in finders:
        name, find = finders[method]
        phrases = find(tokenizer, row.request.prompt, resolve_subjects(tokenizer, row.request))
        write(f"  {name}: {', '.join(repr(phrase.text) for phrase in phrases)}")


def _method(row: Row, settings: JobSettings) -> str:
    return row.request.method or settings.guidance.method
