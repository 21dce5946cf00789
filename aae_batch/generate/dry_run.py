"""Show what a job would do, using only the model's tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.run_record import names_of_its_manifest
from aae_batch.errors import RowError, counted
from aae_batch.generate.records import make_plan
from aae_batch.generate.settings import JobSettings
from aae_batch.manifest.judge import Judge
from aae_batch.manifest.reader import open_manifest
from aae_batch.methods import METHODS
from aae_batch.sampling.model.loading import Index, check_local_files, index_of, named
from aae_batch.sampling.phrases import conjuncts, noun_phrases
from aae_batch.sampling.resolve import why_ignored
from aae_batch.sampling.words import resolve_subjects, token_tables
from aae_batch.store.open import open_storage

PROMPTS_SHOWN = 3
FAILURES_SHOWN = 10
PHRASES = {"conjuncts": ("conjuncts", conjuncts), "phrases": ("noun phrases", noun_phrases)}
"""For methods that encode phrases separately: the phrases' name, and the function that finds
them."""


def load_judge(settings: JobSettings, index: Index) -> Judge:
    """Check the model's files, as far as they are here, and load the judge of the run's rows.

    Raises:
        ModelError: the model is incomplete.
        SettingsError: the run's negative prompt has words that the model does not know.
    """
    check_local_files(settings.model, index, settings.variant)
    return Judge.load(settings.model, settings.guidance, index=index).by(settings.methods)


def dry_run(settings: JobSettings, write: Callable[[str], None]) -> int:
    """Write what would be done. Returns the number of rows that would fail.

    Raises:
        AaeBatchError: the job would not start.
    """
    storage = open_storage(settings.output, settings.s3_endpoint)
    may_have = names_of_its_manifest(Dataset(storage).run)
    with open_manifest(settings.manifest, settings.s3_endpoint, may_have) as manifest:
        plan = make_plan(settings, manifest, storage)
        if settings.retry_failed:
            plan = plan.retrying(Dataset(storage))
        judge = load_judge(
            settings,
            index_of(settings.model, revision=settings.revision, s3_endpoint=settings.s3_endpoint),
        )
        streams = judge.streams
        write(f"model: {named(settings.model, settings.lora)}")
        if settings.acceptance is not None:
            write(str(settings.acceptance))
        shards = -(-len(manifest) // plan.shard_size)
        left = plan.ledger()
        in_shards = f"{counted(shards, 'shard')} of {plan.shard_size}"
        write(f"{counted(len(manifest), 'row')} in {in_shards}")
        write(
            f"{counted(shards - len(left.todo), 'shard')} done, {len(left.todo)} left "
            f"({counted(left.rows_left, 'row')})"
        )
        failures: Counter[str] = Counter()
        ignored: Counter[str] = Counter()
        for row in manifest.rows():
            prompt, is_shown = row.request.prompt, row.index < PROMPTS_SHOWN
            if is_shown:
                write(f"row {row.id}: {prompt!r}")
                for table in token_tables(streams, prompt):
                    where = f" of {table.name}" if len(streams) > 1 else ""
                    cut = ", and the rest is cut off" if table.is_cut else ""
                    write(f"  tokens{where}: {table}{cut}")
            try:
                own, _ = judge.resolve(row)
            except RowError as error:
                failures[type(error).__name__] += 1
                if failures.total() <= FAILURES_SHOWN:
                    write(f"would fail: {error}")
                continue
            if why := why_ignored(own, judge.family):
                ignored[why] += 1
            texts = METHODS[own.method].texts
            if is_shown and texts in PHRASES:
                name, find = PHRASES[texts]
                phrases = find(streams, prompt, resolve_subjects(streams, row.request))
                write(f"  {name}: {', '.join(repr(phrase.text) for phrase in phrases)}")
        for why, count in ignored.items():
            write(f"warning: the negative_prompt of {counted(count, 'row')} {why}")
        if not failures:
            write("no row would fail")
        for kind, count in failures.most_common():
            write(f"{counted(count, 'row')} would fail with {kind}")
        return failures.total()
