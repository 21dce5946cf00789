from __future__ import annotations

import pyarrow as pa
import pytest

from aae_batch.dataset import layout
from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.layouts import Files, Table, Tar
from aae_batch.store.open import open_storage


def test_names_are_those_of_the_contract():
    assert layout.image_name(12, "cat") == "images/00012/cat.png"
    assert layout.attention_name(12) == "attention/00012.parquet"
    assert layout.metadata_name(12) == "metadata/00012.parquet"


def test_metadata_says_where_a_picture_is(tmp_path):
    storage = open_storage(tmp_path)
    jpeg = Files(storage, 12, "f", ImageFormat(kind="jpeg"))
    assert jpeg.file_name("cat") == "images/00012/cat.jpg"
    assert Tar(storage, 12, "f").file_name("cat") == "images/00012.tar#cat.png"
    assert Table(storage, 12, "f").file_name("cat") is None


def test_ids_with_dots_keep_keys_of_their_own_in_a_tar():
    assert layout.member_name("a.b", ".png") == "a%2Eb.png"


@pytest.mark.parametrize("shard", [0, 12, 99_999, 100_000])
def test_a_table_s_name_tells_its_shard(shard):
    assert layout.shard_of(layout.metadata_name(shard)) == shard


@pytest.mark.parametrize(
    "name", ["metadata/notes.txt", "metadata/.00001.parquet.1.part", "metadata/1.parquet"]
)
def test_other_files_are_no_shards(name):
    assert layout.shard_of(name) is None


def test_every_column_says_what_it_is():
    schema = layout.metadata_schema(pa.schema([]))
    for column in [*schema, layout.IMAGE_COLUMN, *layout.ATTENTION_SCHEMA]:
        assert column.metadata[b"description"].endswith(b"."), column.name


def test_a_manifest_s_own_columns_stand_between_its_others_and_the_run_s():
    names = layout.metadata_schema(pa.schema([("price", pa.float64())])).names
    assert names.index("prompt") < names.index("price") < names.index("status")
