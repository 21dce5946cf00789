"""`aae-batch status`: how far is the job?"""

from __future__ import annotations

from aae_batch.cli.common import Output, S3Endpoint, errors_in_a_sentence
from aae_batch.errors import OutputError


def status(output: Output, s3_endpoint: S3Endpoint = None) -> None:
    """Say how far OUTPUT is, while its job runs or afterwards."""
    with errors_in_a_sentence():
        _status(output, s3_endpoint)


def _status(output: str, endpoint: str | None) -> None:
    import time

    from aae_batch.dataset.reader import Dataset
    from aae_batch.dataset.status import status
    from aae_batch.store.open import open_storage

    dataset = Dataset(open_storage(output, endpoint))
    run = dataset.run
    if run is None:
        raise OutputError(f"There is no run in {output}: check the path, or wait until it begins.")
    print(status(run, dataset.shards(), dataset.progress, dataset.summary, time.time()))
