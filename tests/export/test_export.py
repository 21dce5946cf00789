from __future__ import annotations

import io
from itertools import product
from pathlib import Path
from uuid import uuid4

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from PIL import Image
from typer.testing import CliRunner

from aae_batch import cli
from aae_batch.dataset import layout
from aae_batch.dataset.condition import Condition
from aae_batch.dataset.reader import Dataset
from aae_batch.errors import OutputError, SettingsError
from aae_batch.export.destination import MARKER, Marker, replaceable
from aae_batch.export.export import ExportSettings, export
from aae_batch.export.formats import FORMATS, Part, open_format
from aae_batch.export.score_columns import ScoreColumns
from aae_batch.export.selection import Best
from aae_batch.methods import BASELINE
from aae_batch.store.local import LocalStorage
from aae_batch.store.open import open_storage

OK = ["a", "b", "c", "d.1"]
REDS = [0, 40, 80, 160]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Of the library `datasets`, which would keep what it has read in the home folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(tmp_path):
    """`aae-batch export` of an output."""

    def run(output, *options, to=tmp_path / "dest"):
        arguments = ["export", output.storage.root, to, *options]
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return run


def load(folder: Path, *kind: str) -> datasets.Dataset:
    if kind:
        return datasets.load_dataset(*kind, data_dir=str(folder), split="train")
    return datasets.load_dataset(str(folder), split="train")


def score(output, shard: int, metric: str = "clip", **columns) -> None:
    """Write scores of the pictures of a shard, as `aae-batch evaluate` would."""
    rows = Dataset(output.storage).table(shard, ["id", "sha256", "status"])
    rows = rows.filter(pa.compute.equal(rows["status"], "ok")).select(["id", "sha256"])
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values[: rows.num_rows], pa.float32()))
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    output.storage.write_bytes(layout.metric_name(metric, shard), buffer.getvalue())


def add_column(output, column: str, values: pa.Array) -> None:
    """As if the manifest had had a column of its own; `values` has one for each row of a shard."""
    for name in output.storage.list(layout.METADATA):
        rows = pq.read_table(io.BytesIO(output.storage.read_bytes(name)))
        buffer = io.BytesIO()
        pq.write_table(rows.append_column(column, values[: rows.num_rows]), buffer)
        output.storage.write_bytes(name, buffer.getvalue())


# --- every format, from every layout -------------------------------------------------------------


@pytest.mark.parametrize("source", ["files", "webdataset", "parquet"])
def test_every_layout_becomes_a_dataset_of_the_hub(make_output, run, tmp_path, source):
    result = run(make_output(source), "--rows-per-file", 3)
    assert (result.exit_code, result.output.splitlines()[0]) == (
        0,
        f"4 of 5 rows exported to {tmp_path / 'dest'}",
    )
    files = sorted(path.name for path in (tmp_path / "dest" / "data").iterdir())
    assert files == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    rows = load(tmp_path / "dest")
    assert rows["id"][:] == OK
    assert [image.getpixel((0, 0))[0] for image in rows["image"]] == REDS
    assert rows[0]["subjects"] == ["cat", "dog"]
    assert rows[1]["token_indices"] == [[1, 2]]
    assert rows.column_names[:3] == ["image", "id", "prompt"]
    assert not {"status", "error", "file_name", "shard"} & set(rows.column_names)


def test_tars_are_those_of_webdataset(make_output, run, tmp_path):
    import webdataset

    assert run(make_output(), "--format", "webdataset", "--rows-per-file", 3).exit_code == 0
    tars = sorted(str(path) for path in (tmp_path / "dest").glob("train-*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert len(tars) == 2
    assert [sample["json"]["id"] for sample in samples] == OK
    rows = load(tmp_path / "dest")
    assert [row["id"] for row in rows["json"]] == OK
    assert [image.getpixel((0, 0))[0] for image in rows["png"]] == REDS


def extension(kind: pa.DataType, values: list) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


COLUMNS = {
    "uuid": extension(pa.uuid(), [b"0123456789abcdef", None]),
    "json": extension(pa.json_(), ['{"a": 1}', None]),
    "flag": extension(pa.bool8(), [1, None]),
    "tensor": extension(pa.fixed_shape_tensor(pa.float32(), [1]), [[1], None]),
    "view": pa.array([["a"], None], pa.list_view(pa.string_view())),
    "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int8())),
    "small": pa.array([1, None], pa.decimal32(3, 1)),
    "half": pa.array([1, None], pa.float16()),
    "word": pa.array(["a", None]).dictionary_encode(),
    "wide": pa.array([["a"], None], pa.large_list(pa.large_string())),
    "pair": pa.array([["a", "b"], None], pa.list_(pa.string(), 2)),
    "nested": pa.array([[{"a": 1.5}], None], pa.list_(pa.struct([("a", pa.float32())]))),
    "none": pa.nulls(2),
    "bytes": pa.array([b"a", None]),
    "fixed": pa.array([b"ab", None], pa.binary(2)),
    "large": pa.array([1, None], pa.decimal256(50, 1)),
    "day": pa.array([0, None], pa.date32()),
    "clock": pa.array([0, None], pa.time64("us")),
    "time": pa.array([0, None], pa.timestamp("ns", "UTC")),
    "span": pa.array([0, None], pa.duration("ms")),
    "": pa.array([0, 1], pa.uint64()),
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_export_with_columns_of_any_type_loads(make_output, run, tmp_path, format):
    output = make_output("parquet")
    for name, values in COLUMNS.items():
        add_column(output, name, values)
    result = run(output, "--format", format)
    assert result.exit_code == 0, result.output
    rows = load(tmp_path / "dest")
    row = rows[0]["json"] if format == "webdataset" else rows[0]
    assert row["uuid"] == "30313233-3435-3637-3839-616263646566"
    assert row["json"] == '{"a": 1}'
    assert row["map"] == [{"key": "a", "value": 1}]
    assert row["nested"] == [{"a": 1.5}]
    assert rows.num_rows == len(OK)


def test_tars_load_if_a_column_has_its_first_value_late(make_output, run, tmp_path):
    rows = [{"id": f"r{i}", "prompt": "a cat", "method": "stable-diffusion"} for i in range(8)]
    rows[7] |= {"negative_prompt": "blur", "subjects": ["cat"], "note": "late"}
    result = run(make_output("webdataset", rows=rows), "--format", "webdataset")
    assert result.exit_code == 0, result.output
    loaded = load(tmp_path / "dest")["json"]
    assert [row["negative_prompt"] for row in loaded] == [None] * 7 + ["blur"]
    assert (loaded[7]["subjects"], loaded[7]["note"]) == (["cat"], "late")


def test_columns_that_json_has_no_values_for_are_named_as_left_out_of_tars(
    make_output, run, tmp_path
):
    output = make_output()
    add_column(output, "made", pa.array([0, 1], pa.date32()))
    result = run(output, "--format", "webdataset")
    note = "The column made is left out, since JSON has no values of its type, date32[day]."
    assert note in result.output
    card = (tmp_path / "dest" / "README.md").read_text()
    assert "column made is left out" in card
    assert "| `made` |" not in card
    assert "| `seed` |" in card


@pytest.mark.parametrize("kind", [(), ("imagefolder",)])
def test_a_folder_of_images_has_their_columns(make_output, run, tmp_path, kind):
    result = run(make_output("webdataset"), "--format", "imagefolder", "--rows-per-file", 3)
    assert result.exit_code == 0
    rows = load(tmp_path / "dest", *kind)
    assert rows["id"][:] == OK
    assert [image.getpixel((0, 0))[0] for image in rows["image"]] == REDS
    assert rows[0]["subjects"] == ["cat", "dog"]


def test_images_that_would_be_one_file_are_not_exported_as_one(make_output, run, monkeypatch):
    output = make_output(
        "parquet", rows=[{"id": i, "prompt": "a", "method": BASELINE} for i in "aBb"]
    )
    assert run(output, "--format", "imagefolder").exit_code == 0
    inside = LocalStorage._path
    monkeypatch.setattr(LocalStorage, "_path", lambda self, name: inside(self, name.lower()))
    result = run(output, "--format", "imagefolder", "--force")
    assert result.exit_code == 2
    assert "B.png and b.png are one file on the disk of" in result.output


def test_plain_parquet_is_loaded_as_pictures(make_output, run, tmp_path):
    assert run(make_output(), "--format", "parquet").exit_code == 0
    rows = load(tmp_path / "dest", "parquet")
    assert [image.getpixel((0, 0))[0] for image in rows["image"]] == REDS


def test_pictures_are_not_compressed_again_and_a_reader_of_one_fetches_a_hundred(tmp_path):
    rows = pa.table({"id": [f"r{i}" for i in range(250)], "subjects": [["cat"]] * 250})
    written = open_format("parquet", open_storage(tmp_path), 1, ".png", rows.schema)
    written.write(Part(0, rows, [b"picture"] * 250))
    with pq.ParquetFile(tmp_path / "data" / "train-00000-of-00001.parquet") as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        columns = [groups[0].column(i) for i in range(file.metadata.num_columns)]
        paths = file.read(["image"])["image"].combine_chunks().field("path").to_pylist()
    assert [group.num_rows for group in groups] == [100, 100, 50]
    assert {column.path_in_schema: column.compression for column in columns} == {
        "image.bytes": "UNCOMPRESSED",
        "image.path": "ZSTD",
        "id": "ZSTD",
        "subjects.list.element": "ZSTD",
    }
    assert not columns[0].has_dictionary_page
    assert paths == [f"r{i}.png" for i in range(250)]


def test_more_parquet_files_than_readers_find_are_refused(tmp_path):
    schema = pa.schema([("id", pa.string())])
    open_format("parquet", open_storage(tmp_path), 100_000, ".png", schema)
    with pytest.raises(SettingsError, match="give larger --rows-per-file"):
        open_format("parquet", open_storage(tmp_path), 100_001, ".png", schema)


def test_an_export_in_the_place_of_another_is_loaded_as_itself(make_output, run, tmp_path):
    ids = ("test", "test-1")  # which are no names of splits here
    output = make_output(rows=[{"id": row_id, "prompt": "a cat"} for row_id in ids])
    for format, row_id in product(FORMATS, ids):
        options = ("--format", format, "--force", "--where", f"id = '{row_id}'")
        assert run(output, *options).exit_code == 0
        (row,) = load(tmp_path / "dest")
        assert (row["json"] if format == "webdataset" else row)["id"] == row_id
    assert open_storage(tmp_path / "dest").list("") == [
        "README.md",
        "samples.png",
        "train/metadata.parquet",
        "train/test-1.png",
    ]


@pytest.mark.parametrize("where", ["s3", "memory"])
def test_a_dataset_goes_from_store_to_store(make_output, run, request, where):
    root = request.getfixturevalue("bucket").url if where == "s3" else f"memory://{uuid4().hex}"
    assert run(make_output("files", f"{root}/out"), to=f"{root}/dest").exit_code == 0
    found = open_storage(f"{root}/dest")
    assert [name for name in found.list("") if name != MARKER] == [
        "README.md",
        "data/train-00000-of-00001.parquet",
        "samples.png",
    ]
    table = pq.read_table(io.BytesIO(found.read_bytes("data/train-00000-of-00001.parquet")))
    assert table["id"].to_pylist() == OK


# --- which rows ----------------------------------------------------------------------------------


def exported(folder: Path) -> list[str]:
    return pq.read_table(folder / "data", columns=["id"])["id"].to_pylist()


def test_where_is_a_condition_on_the_columns(make_output, run, tmp_path):
    output = make_output(losses={"a": 0.4, "c": 0.3, "d.1": 0.9})
    result = run(output, "--where", "final_loss < 0.5 AND neglected IS NOT TRUE")
    assert result.exit_code == 0
    assert exported(tmp_path / "dest") == ["a", "c"]
    assert "3 left out by --where" in result.output


def test_scores_are_columns_too(make_output, run, tmp_path):
    output = make_output()
    score(output, 0, clip_full=[0.1, 0.3])
    score(output, 2, clip_full=[0.4])
    assert run(output, "--where", "clip_full > 0.2").exit_code == 0
    rows = load(tmp_path / "dest")
    assert rows["id"][:] == ["b", "d.1"]
    assert rows["clip_full"][:] == pytest.approx([0.3, 0.4])
    assert "mean clip_full" in (tmp_path / "dest" / "README.md").read_text()


def test_a_score_whose_name_is_taken_is_called_by_its_metric_too(make_output, run, tmp_path):
    output = make_output()
    score(output, 0, "attention", neglected=[0.0, 1.0], min_max_attention=[0.8, 0.2])
    assert (
        run(output, "--where", "attention_neglected = 1 AND min_max_attention < 0.5").exit_code == 0
    )
    assert exported(tmp_path / "dest") == ["b"]


def test_scores_of_a_picture_that_was_made_again_are_none(make_output, run, tmp_path):
    output = make_output()
    score(output, 0, clip_full=[0.1, 0.3])
    name = layout.metric_name("clip", 0)
    scores = pq.read_table(io.BytesIO(output.storage.read_bytes(name)))
    stale = scores.set_column(1, "sha256", pa.array(["0" * 64, scores["sha256"][1].as_py()]))
    buffer = io.BytesIO()
    pq.write_table(stale, buffer)
    output.storage.write_bytes(name, buffer.getvalue())
    assert run(output).exit_code == 0
    assert load(tmp_path / "dest")["clip_full"][:] == [None, pytest.approx(0.3), None, None]


def test_scores_of_an_earlier_run_of_their_metric_are_left_out(make_output):
    output = make_output()
    score(output, 0, clip_full=[0.1, 0.3])
    assert ScoreColumns(Dataset(output.storage), []).names == ["clip_full"]
    output.storage.write_bytes(
        layout.metric_run_name("clip"), b'{"fingerprint": "another", "settings": {}}'
    )
    assert ScoreColumns(Dataset(output.storage), []).names == []


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("final_loss <", "syntax error"),
        ("nothing = 1", "not found"),
        ("true; DROP TABLE x", "--where"),
        ("true) UNION SELECT (1", "--where"),
        ("true FROM elsewhere", "--where"),
        ("1 = 1, 2 = 2", "--where"),
        ("(SELECT count(*) FROM read_text('pyproject.toml')) > 0", "disabled by configuration"),
        ("EXISTS (SELECT 1 FROM 'pyproject.toml')", "does not exist"),
        ("final_loss < avg(final_loss)", "aggregates"),
        ("", "--where"),
    ],
)
def test_where_is_an_expression_and_sees_the_row_alone(make_output, run, tmp_path, where, reason):
    result = run(make_output(), "--where", where)
    assert result.exit_code == 2
    assert "is not a condition on a row's columns" in result.output
    assert reason in result.output
    assert not (tmp_path / "dest").exists()


def test_columns_that_duckdb_cannot_read_are_left_alone():
    table = pa.table({"id": ["a", "b"], "half": pa.array([1.0, 2.0], pa.float16())})
    assert Condition("id = 'b'").admits(table).tolist() == [False, True]


def test_a_comment_hides_nothing():
    table = pa.table({"id": ["a", "b"]})
    assert Condition("id = 'b' -- or not").admits(table).tolist() == [False, True]


def test_only_the_rows_of_a_list_of_ids_are_exported(make_output, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "kept.txt").write_bytes("\ufeffd.1\r\n\n  a \n".encode())
    output = make_output(losses={"a": 0.4})
    result = run(output, "--ids", "~/kept.txt")
    assert result.exit_code == 0, result.output
    assert exported(tmp_path / "dest") == ["a", "d.1"]
    assert "3 not in --ids" in result.output
    assert "3 were left out by a list of ids" in (tmp_path / "dest" / "README.md").read_text()
    result = run(output, "--ids", "~/kept.txt", "--where", "final_loss < 0.5", "--force")
    assert exported(tmp_path / "dest") == ["a"]


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ("a\nA\nz\n", "has no row with the id A, z; 2 of 3 are unknown"),
        ("\n", "lists no id"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_ids_that_the_output_lacks_are_refused(make_output, run, tmp_path, listed, reason):
    if listed is not None:
        (tmp_path / "ids.txt").write_text(listed)
    result = run(make_output(), "--ids", tmp_path / "ids.txt")
    assert result.exit_code == 2
    assert reason in result.output
    assert not (tmp_path / "dest").exists()


def test_no_row_left_is_an_error_and_nothing_is_written(make_output, run, tmp_path):
    result = run(make_output(), "--where", "id = 'z'")
    assert result.exit_code == 2
    assert "--where leaves out 5" in result.output
    assert not (tmp_path / "dest").exists()


# --- best of -------------------------------------------------------------------------------------

SEEDS = [
    {"id": f"{prompt[-3:]}-{seed}-{method[0]}", "prompt": prompt, "subjects": [prompt[-3:]]}
    | {"seed": seed, "method": method}
    for prompt in ("a cat", "a dog")
    for seed in (5, 4, 3)
    for method in ("attend-and-excite", "stable-diffusion")
]
LOSSES = {"cat-4-a": 0.1, "cat-3-s": 0.2, "dog-3-a": 0.3, "dog-5-s": 0.4}


def test_the_best_seed_of_each_prompt_and_method_is_kept(make_output, run, tmp_path):
    result = run(make_output(rows=SEEDS, losses=LOSSES), "--select", "best-attention", "--of", 3)
    assert result.exit_code == 0
    assert exported(tmp_path / "dest") == ["cat-4-a", "cat-3-s", "dog-5-s", "dog-3-a"]
    assert "8 not the best of their prompt" in result.output


def test_the_best_of_two_is_among_the_first_two(make_output, run, tmp_path):
    output = make_output(rows=SEEDS, losses=LOSSES)
    assert run(output, "--select", "best-attention", "--of", 2).exit_code == 0
    # Where losses are equal the lower seed is taken.
    assert exported(tmp_path / "dest") == ["cat-4-a", "cat-4-s", "dog-5-s", "dog-4-a"]


def test_the_best_are_chosen_from_what_where_admits(make_output, run, tmp_path):
    output = make_output(rows=SEEDS, losses=LOSSES)
    options = ("--select", "best-attention", "--where", "final_loss > 0.15 AND method LIKE 'att%'")
    assert run(output, *options).exit_code == 0
    assert exported(tmp_path / "dest") == ["cat-3-a", "dog-3-a"]


def test_prompts_with_fewer_seeds_are_named(make_output, run):
    rows = [row for row in SEEDS if row["id"] != "dog-3-s"]
    result = run(make_output(rows=rows), "--select", "best-attention", "--of", 3)
    assert result.exit_code == 0
    note = "1 of 4 pairs of prompt and method have fewer than 3 rows to choose from"
    assert f"{note}: 'a dog' by stable-diffusion (2)." in result.output


def test_rows_without_a_prompt_or_a_method_are_of_no_pair(make_output, run, tmp_path):
    rows = [{"id": "no-prompt", "prompt": 3}, {"id": "no-method", "prompt": "a cat", "method": 3}]
    output = make_output(rows=[*rows, *SEEDS], losses=LOSSES)
    result = run(output, "--select", "best-attention", "--of", 3)
    assert result.exit_code == 0
    assert "pairs of prompt and method" not in result.output
    assert exported(tmp_path / "dest") == ["cat-4-a", "cat-3-s", "dog-5-s", "dog-3-a"]
    assert "2 without an image" in result.output


def test_prompts_without_a_final_loss_are_named(make_output, run, tmp_path):
    output = make_output(rows=SEEDS, losses={"cat-4-a": 0.2} | dict.fromkeys(ALL_DOGS, None))
    result = run(output, "--select", "best-attention")
    note = "2 of 4 pairs of prompt and method have no image with a final loss, and are left out"
    assert f"{note}: 'a dog' by " in result.output
    assert exported(tmp_path / "dest") == ["cat-4-a", "cat-3-s"]


ALL_DOGS = [row["id"] for row in SEEDS if row["prompt"] == "a dog"]


def test_more_seeds_than_any_prompt_has_are_refused(make_output, run):
    result = run(make_output(rows=SEEDS), "--select", "best-attention", "--of", 4)
    assert result.exit_code == 2
    assert (
        "no prompt has that many rows of one method to choose from; the most is 3" in result.output
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--of", 3), "give --select best-attention, too"),
        (("--select", "worst"), "there is only best-attention"),
        (("--select", "best-attention", "--of", 0), "at least 1"),
        (("--format", "zip"), "choose one of hf, parquet, webdataset, imagefolder"),
        (("--rows-per-file", 0), "at least 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(make_output, run, options, reason):
    result = run(make_output(), *options)
    assert (result.exit_code, reason in result.output) == (2, True)


@pytest.mark.parametrize(
    ("options", "left_out"),
    [((), ""), (("--where", "seed < 0"), ", --where leaves out 1")],
)
def test_when_nothing_is_left_only_options_that_were_given_are_named(
    make_output, run, options, left_out
):
    result = run(make_output(rows=[{"id": "x", "prompt": None}]), *options)
    failed = 0 if options else 1
    assert f"left to export: {failed} of 1 have no image{left_out}." in result.output


# --- the destination -----------------------------------------------------------------------------


def test_an_incomplete_output_is_exported_only_when_asked(make_output, run, tmp_path):
    output = make_output()
    output.storage.delete("summary.json")
    output.storage.delete(layout.metadata_name(2))
    assert "2 of 3 shards are there: finish it" in run(output).output
    assert run(output, "--partial").exit_code == 0
    assert exported(tmp_path / "dest") == ["a", "b", "c"]
    card = (tmp_path / "dest" / "README.md").read_text()
    assert "not complete: 2 of its 3 shards" in card


def test_nothing_is_exported_before_the_first_shard(make_output, run, tmp_path):
    output = make_output()
    for shard in range(3):
        output.storage.delete(layout.metadata_name(shard))
    assert "0 of 3 shards are there: wait for the first" in run(output, "--partial").output


def test_shards_that_a_job_commits_meanwhile_are_not_counted(
    make_output, run, tmp_path, monkeypatch
):
    output = make_output()
    last = output.storage.read_bytes(layout.metadata_name(2))
    output.storage.delete(layout.metadata_name(2))

    class Slow(Condition):
        def admits(self, rows):
            output.storage.write_bytes(layout.metadata_name(2), last)
            return super().admits(rows)

    monkeypatch.setattr("aae_batch.dataset.condition.Condition", Slow)
    assert run(output, "--partial", "--where", "true").exit_code == 0
    assert exported(tmp_path / "dest") == ["a", "b", "c"]
    assert "2 of its 3 shards" in (tmp_path / "dest" / "README.md").read_text()


def test_two_exports_to_one_place_do_not_mix(make_output, run, tmp_path):
    output = make_output()
    with open_storage(tmp_path / "dest").writing():
        result = run(output)
    assert (result.exit_code, "Another run is writing to" in result.output) == (2, True)
    assert open_storage(tmp_path / "dest").list("") == []


def test_an_earlier_export_is_replaced_only_when_asked(make_output, run, tmp_path):
    output = make_output()
    assert run(output).exit_code == 0
    assert "holds an export: choose another" in run(output, "--format", "webdataset").output
    assert len(exported(tmp_path / "dest")) == 4


def test_an_export_that_was_cut_off_has_no_card_and_is_begun_anew(make_output, run, tmp_path):
    output = make_output()
    image = tmp_path / "out" / "images" / "00001" / "c.png"
    whole = image.read_bytes()
    image.write_bytes(b"damaged")
    result = run(output, "--rows-per-file", 1)
    assert (
        f"The image of row c in {output.storage.root} does not match the SHA-256" in result.output
    )
    left = ["data/train-00000-of-00004.parquet", "data/train-00001-of-00004.parquet"]
    assert open_storage(tmp_path / "dest").list("") == left
    image.write_bytes(whole)
    assert run(output).exit_code == 0
    assert exported(tmp_path / "dest") == OK


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("hf", "thesis.tex"),
        ("hf", "data/train-00000-of-00002.parquet"),
        ("hf", "data/train-00001-of-00001.parquet"),
        ("webdataset", "train-00001.tar"),
        ("imagefolder", "train/notes.txt"),
        ("imagefolder", "train/mine.jpg"),
        ("imagefolder", "train/more/a.png"),
    ],
)
def test_files_of_others_are_never_replaced(tmp_path, format, name):
    storage = open_storage(tmp_path)
    Marker(format, pieces=1, suffix=".png").write(storage)
    storage.write_bytes("README.md", b"")
    storage.write_bytes(name, b"")
    with pytest.raises(OutputError, match=f"holds {name}, which no export wrote"):
        replaceable(storage, force=True)


@pytest.mark.parametrize("name", ["README.md", "train/a.png", "data/train-00000-of-00001.parquet"])
@pytest.mark.parametrize("marker", [None, "{}", '{"format": "zip", "pieces": 1, "suffix": ""}'])
def test_without_a_marker_every_file_is_of_others(tmp_path, name, marker):
    storage = open_storage(tmp_path)
    storage.write_bytes(name, b"")
    if marker is not None:
        storage.write_bytes(MARKER, marker.encode())
    with pytest.raises(OutputError, match="which no export wrote"):
        replaceable(storage, force=True)


def test_a_place_without_a_run_is_said(tmp_path):
    with pytest.raises(OutputError, match="There is no run in"):
        export(Dataset(tmp_path), open_storage(tmp_path / "dest"), ExportSettings())


# --- the card ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card_of():
    return lambda folder: DatasetCard.load(folder / "README.md")


def test_the_card_s_header_is_the_hub_s(make_output, run, tmp_path, card_of):
    assert run(make_output(), "--license", "cc-by-4.0").exit_code == 0
    header = card_of(tmp_path / "dest").data.to_dict()
    assert header["license"] == "cc-by-4.0"
    assert header["task_categories"] == ["text-to-image"]
    assert header["size_categories"] == ["n<1K"]
    assert header["pretty_name"] == "dest"
    info = header["dataset_info"]
    size = (tmp_path / "dest" / "data" / "train-00000-of-00001.parquet").stat().st_size
    assert info["splits"][0]["num_examples"] == 4
    assert (info["download_size"], info["splits"][0]["num_bytes"] > 0) == (size, True)
    assert {"name": "image", "dtype": "image"} in info["features"]
    rows = load(tmp_path / "dest")
    assert datasets.Features._from_yaml_list(info["features"]) == rows.features


def test_the_licence_is_left_to_the_user(make_output, run, tmp_path, card_of):
    assert run(make_output()).exit_code == 0
    card = card_of(tmp_path / "dest")
    assert "license" not in card.data.to_dict()
    assert "None has been chosen" in card.text


def test_the_card_tells_what_it_holds(make_output, run, tmp_path, card_of):
    rows = [*SEEDS, {"id": "bad", "prompt": "a cat", "seed": "x"}]
    output = make_output(rows=rows, losses=LOSSES)
    where = "final_loss < 2 AND id <> '`|`'"
    assert run(output, "--where", where, "--select", "best-attention").exit_code == 0
    text = card_of(tmp_path / "dest").text
    assert "| attend-and-excite | 2 | 0.200 |" in text
    assert "| stable-diffusion | 2 | 0.300 |" in text
    assert f"left out by the condition ``{where}``." in text
    assert "lowest final loss among all of its rows" in text
    assert '"scale_factor": 20.0' in text
    assert "| `final_loss` | `float` | The method's own loss at the last step" in text
    sample = Image.open(tmp_path / "dest" / "samples.png")
    assert sample.width > 200


def test_attention_within_conjuncts_is_not_averaged_beside_that_of_other_methods(
    make_output, run, tmp_path, card_of
):
    methods = ("attend-and-excite", "composable-diffusion")
    rows = [{"prompt": "a cat", "subjects": ["cat"], "method": method} for method in methods]
    output = make_output(rows=rows)
    score(output, 0, "attention", min_max_attention=[0.8, 0.9])
    score(output, 0, "clip", clip_full=[0.25, 0.5])
    assert run(output).exit_code == 0
    lines = card_of(tmp_path / "dest").text.splitlines()
    cells = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in lines}
    heads = cells["| method"]
    of_method = dict(zip(heads, cells["| composable-diffusion"], strict=True))
    assert of_method["mean own final_loss"] == of_method["mean min_max_attention"] == "-"
    assert of_method["mean clip_full"] == "0.500"
    of_method = dict(zip(heads, cells["| attend-and-excite"], strict=True))
    assert (of_method["mean own final_loss"], of_method["mean min_max_attention"]) == (
        "0.500",
        "0.800",
    )
    assert any(line.startswith("-: with `composable-diffusion`") for line in lines)


def test_samples_are_spread_over_many_files(make_output, run, tmp_path):
    rows = [{"prompt": "a cat", "method": "stable-diffusion"} for _ in range(30)]
    assert run(make_output(rows=rows), "--rows-per-file", 1).exit_code == 0
    assert len(list((tmp_path / "dest" / "data").iterdir())) == 30
    four_across_and_three_down = Image.open(tmp_path / "dest" / "samples.png")
    one = 208 + 3 * 14
    assert four_across_and_three_down.width == 4 * one + 14


def test_a_format_without_its_package_is_explained(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingsError, match=r"pip install datasets"):
        ExportSettings(format="hf")
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(SettingsError, match=r"pip install duckdb"):
        Condition("true")


def test_the_best_of_none_is_an_error():
    with pytest.raises(SettingsError, match="at least 1"):
        Best(0)
