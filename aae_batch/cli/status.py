"""`aae-batch status`: print the progress of a job."""

from __future__ import annotations

from aae_batch.cli.common import Output
from aae_batch.cli.options import settings_command
from aae_batch.errors import OutputError


@settings_command()
def status(output: Output, s3_endpoint: str | None) -> None:
    """Print the progress of OUTPUT, while its job runs or afterwards.

    Examples:
    aae-batch status s3://bucket/output
    """
    import time

    from aae_batch.dataset import partial
    from aae_batch.dataset import status as progress
    from aae_batch.dataset.reader import Dataset
    from aae_batch.store.open import open_storage

    dataset = Dataset(open_storage(output, s3_endpoint))
    run = dataset.run
    if run is None:
        raise OutputError(f"There is no run in {output}: check the path, or wait until it begins.")
    shards, now = dataset.shards(), time.time()
    files = partial.kept(dataset.storage, run["fingerprint"])
    kept = sum(len(partial.statuses(files[shard])) for shard in files.keys() - {*shards})
    print(progress.status(run, shards, dataset.progress, dataset.summary, now, kept))
