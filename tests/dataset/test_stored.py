from __future__ import annotations

import pytest

from aae_batch.dataset.layout import attention_name, metadata_name
from aae_batch.dataset.layouts import shard_of
from aae_batch.dataset.reader import Dataset
from aae_batch.manifest.reader import open_manifest


@pytest.mark.parametrize("maps", ["last", "every:2"])
@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
def test_a_shard_written_again_from_its_outcomes_is_the_same(make_output, layout, maps):
    output = make_output(layout, attention_maps=maps)
    dataset = Dataset(output.storage)
    run = dataset.run
    assert run is not None
    names = [metadata_name(1), attention_name(1), *output.storage.list("images/")]
    before = {name: output.storage.read_bytes(name) for name in names}
    shard = shard_of(run, output.storage, 1)
    outcomes = shard.stored_outcomes(2)
    assert [outcome.index for outcome in outcomes] == [2, 3]
    assert [outcome.failed for outcome in outcomes] == [False, True]
    with open_manifest(output.manifest) as manifest:
        _, extras = manifest.read(2, 4)
    for name in names[:2]:
        output.storage.delete(name)
    shard.commit(outcomes, extras)
    assert {name: output.storage.read_bytes(name) for name in names} == before


def test_failed_rows_are_found_by_shard(make_output):
    assert Dataset(make_output().storage).failed_rows() == {1: [1]}
