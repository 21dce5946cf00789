from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aae_batch.errors import ManifestError, SettingsError
from aae_batch.manifest.build.prompt import Prompt, Prompts
from aae_batch.manifest.build.rows import (
    ManifestRows,
    check_target,
    parse_methods,
    parse_seeds,
    write_manifest,
)
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row import is_safe_id, seed_of
from aae_batch.methods import METHODS

CAT = Prompt("a cat and a frog", subjects=("cat", "frog"))
BOTH = ["attend-and-excite", "stable-diffusion"]


def records(rows: ManifestRows) -> list[dict]:
    return [record for table in rows.tables() for record in table.to_pylist()]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [0, 1, 2]), ("0:3", [0, 1, 2]), ("7:8", [7]), ("1, 5,8:10", [1, 5, 8, 9])],
)
def test_seeds_are_a_number_a_range_or_a_list(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "a", "5:5", "1:", "-1:3", "1,1", "\u0663"])
def test_what_is_no_list_of_seeds_is_refused(text):
    with pytest.raises(SettingsError, match="seed"):
        parse_seeds(text)


@pytest.mark.parametrize("text", ["0:2000000", "5,0:1000000", "1000001"])
def test_too_many_seeds_are_said_to_be_too_many(text):
    with pytest.raises(SettingsError, match="are more than 1,000,000 seeds; make several"):
        parse_seeds(text)


def test_methods_are_listed_or_named_together():
    assert parse_methods("both") == BOTH
    assert parse_methods("all") == list(METHODS)
    assert parse_methods("stable-diffusion, attend-and-excite") == BOTH[::-1]
    with pytest.raises(SettingsError, match="'magic' is not a method; use both, all, or"):
        parse_methods("magic")


def test_a_row_for_each_prompt_seed_and_method_in_this_order():
    rows = ManifestRows(Prompts([CAT, Prompt("a dog")]), seeds=[9, 10], methods=BOTH)
    made = records(rows)
    assert len(rows) == len(made) == 8
    assert [record["id"] for record in made[:3]] == [
        "0-a-cat-and-a-frog-s09-attend-and-excite",
        "0-a-cat-and-a-frog-s09-stable-diffusion",
        "0-a-cat-and-a-frog-s10-attend-and-excite",
    ]
    assert [record["seed"] for record in made[:4]] == [9, 9, 10, 10]
    assert made[0]["subjects"] == ["cat", "frog"]
    assert made[-1]["subjects"] is None
    ids = [record["id"] for record in made]
    assert sorted(ids) == ids
    assert len(set(ids)) == len(ids)


def test_sorted_ids_keep_the_prompts_and_raise_the_seeds_whatever_the_order_of_the_lists():
    prompts = Prompts([Prompt(f"a cat {i}") for i in range(11)])
    made = records(ManifestRows(prompts, seeds=[10, 9], methods=METHODS))
    ordered = sorted(made, key=lambda record: record["id"])
    wanted = sorted(made, key=lambda r: (int(r["prompt"].split()[-1]), r["seed"], r["method"]))
    assert ordered == wanted


def test_without_seeds_both_methods_start_from_the_same_noise():
    first, second = records(ManifestRows(Prompts([CAT]), methods=BOTH))
    assert first["seed"] == second["seed"] == seed_of("0-a-cat-and-a-frog")
    assert first["id"] != second["id"]


def test_ids_say_only_what_tells_rows_apart_and_fit_a_file_name():
    wordy = Prompt("caf\u00e9, " + "very long words " * 40)
    (only,) = records(ManifestRows(Prompts([wordy]), seeds=[5], methods=BOTH[:1]))
    assert only["id"].startswith("0-caf-very-long-words")
    assert len(only["id"]) <= 62
    assert is_safe_id(only["id"])
    (strange,) = records(ManifestRows(Prompts([Prompt("\u732b\u3068\u86d9")])))
    assert strange["id"] == "0"


def test_a_prompt_s_own_id_begins_those_of_its_rows():
    named = Prompt("a cat", name="page-7", settings={"seed": 3})
    assert records(ManifestRows(Prompts([named])))[0] == {
        "id": "page-7",
        "prompt": "a cat",
        "seed": 3,
    }
    ids = [
        r["id"] for r in records(ManifestRows(Prompts([Prompt("a", name="x")]), parse_seeds("2")))
    ]
    assert ids == ["x-s0", "x-s1"]
    with pytest.raises(ManifestError, match=r"Row 1 of the source: id 'xxx.* is too long"):
        ManifestRows(Prompts([Prompt("a", name="x" * 119)]), parse_seeds("2"))


@pytest.mark.parametrize(
    ("column", "given"), [("seed", {"seeds": [1]}), ("method", {"methods": BOTH})]
)
def test_what_the_source_says_is_not_said_twice(column, given):
    prompts = Prompts([Prompt("a cat", settings={column: None})])
    with pytest.raises(
        ManifestError, match=f"has a column {column}; remove it, or leave --{column}s"
    ):
        ManifestRows(prompts, **given)


def test_no_prompt_makes_no_manifest():
    with pytest.raises(ManifestError, match="No prompts were given"):
        ManifestRows(Prompts([]))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_what_is_written_is_read_as_it_was_meant(tmp_path, suffix):
    odd = Prompt('a "b"; c\nand d', subjects=("b", "c;d"), settings={"height": 64})
    indexed = Prompt("a [x] cat", token_indices=((2, 3), (5,)), settings={"height": None})
    bracket = Prompt("a [x] cat", subjects=("[x]",), settings={"height": 72})
    carried = {
        "set": pa.array(["animals", None, "x"]),
        "box": pa.array([[1, 2], None, []], pa.list_(pa.int64())),
    }
    prompts = Prompts([odd, indexed, bracket], carried)
    path = tmp_path / f"m{suffix}"
    write_manifest(str(path), ManifestRows(prompts, seeds=[1, 2]))
    with open_manifest(path) as manifest:
        rows, extras = manifest.read(0, len(manifest))
    assert not any(row.error for row in rows)
    assert [row.request.seed for row in rows] == [1, 2] * 3
    assert [row.request.prompt for row in rows[::2]] == [p.text for p in prompts.prompts]
    assert [row.request.subjects for row in rows[::2]] == [p.subjects for p in prompts.prompts]
    assert rows[2].request.token_indices == ((2, 3), (5,))
    assert [row.request.height for row in rows[::2]] == [64, None, 72]
    assert extras["set"].to_pylist()[::2] == ["animals", None, "x"]
    boxes = extras["box"].to_pylist()[::2]
    assert [json.loads(b) if isinstance(b, str) else b for b in boxes] == [[1, 2], None, []]


def test_a_manifest_is_replaced_only_by_force(tmp_path):
    path = str(tmp_path / "m.parquet")
    check_target(path, force=False)
    write_manifest(path, ManifestRows(Prompts([CAT])))
    assert pq.read_table(path)["prompt"].to_pylist() == [CAT.text]
    with pytest.raises(ManifestError, match="exists; give another name, or --force"):
        check_target(path, force=False)
    check_target(path, force=True)
    with pytest.raises(ManifestError, match=r"one of \.parquet, \.csv, \.jsonl"):
        check_target(str(tmp_path / "m.txt"), force=True)


def test_a_manifest_can_be_written_to_an_object_store(bucket):
    url = f"{bucket.url}/in/m.parquet"
    check_target(url, force=False)
    write_manifest(url, ManifestRows(Prompts([CAT])))
    with open_manifest(url) as manifest:
        assert len(manifest) == 1
    with pytest.raises(ManifestError, match="exists"):
        check_target(url, force=False)


def test_a_method_has_rows_of_the_prompts_that_suit_it():
    prompts = Prompts(
        [
            Prompt("a red cat and a dog", subjects=("red cat", "dog")),
            Prompt("a cat and a dog", subjects=("cat", "dog")),
            Prompt("a cat", subjects=("cat",)),
        ]
    )
    rows = ManifestRows(prompts, [0, 1], ["stable-diffusion", "syngen", "conform"])
    (table,) = rows.tables()
    made = list(zip(table["prompt"].to_pylist(), table["method"].to_pylist(), strict=True))
    assert len(rows) == len(made) == 2 * (3 + 2 + 1)
    assert ("a red cat and a dog", "syngen") in made
    assert ("a cat and a dog", "syngen") not in made
    assert ("a cat", "conform") not in made
    assert rows.left_out == {"syngen": 2, "conform": 1}
    with pytest.raises(ManifestError, match="No prompt has the subjects that conform need"):
        ManifestRows(Prompts(prompts.prompts[2:]), [0], ["conform"])
    positions = Prompts([Prompt("a red cat", token_indices=at) for at in (((3,),), ((2, 3),))])
    assert ManifestRows(positions, [0], ["stable-diffusion", "syngen"]).left_out == {"syngen": 1}
