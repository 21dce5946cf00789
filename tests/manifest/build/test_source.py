from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aae_batch.errors import ManifestError
from aae_batch.manifest.build.source import read_prompts


def written(folder, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_text_has_a_prompt_on_each_line(tmp_path):
    path = written(tmp_path, "p.txt", "\ufeffa cat\n\n  a frog \r\n")
    assert [prompt.text for prompt in read_prompts(path).prompts] == ["a cat", "a frog"]


@pytest.mark.parametrize("odd", ["\u2028", "\x0b", "\x0c", "\x85", "\x1e"])
def test_only_a_line_feed_ends_a_prompt_of_a_text(tmp_path, odd):
    path = written(tmp_path, "p.txt", f"a cat{odd}and a frog\na dog\n")
    assert [p.text for p in read_prompts(path).prompts] == [f"a cat{odd}and a frog", "a dog"]


def test_a_table_s_columns_go_with_its_prompts(tmp_path):
    path = written(
        tmp_path,
        "p.csv",
        'prompt,subjects,id,height,page\n"a cat, a frog",cat;frog,x,64,7\na dog,,,,8\n',
    )
    read = read_prompts(path)
    first, second = read.prompts
    assert (first.text, first.subjects, first.name) == ("a cat, a frog", ("cat", "frog"), "x")
    assert first.settings == {"height": 64}
    assert (second.subjects, second.name, second.settings) == (None, "00000001", {"height": None})
    assert {name: column.to_pylist() for name, column in read.carried.items()} == {"page": [7, 8]}


def test_a_parquet_s_own_types_are_carried(tmp_path):
    kind = pa.list_(pa.struct([("x", pa.float32())]))
    boxes = pa.array([[{"x": 1.0}], None], kind)
    pq.write_table(pa.table({"prompt": ["a", "b"], "boxes": boxes}), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet")).carried["boxes"].type == kind


def test_a_row_that_is_wrong_stops_with_its_number(tmp_path):
    path = written(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(ManifestError, match="row 2: column prompt: is blank"):
        read_prompts(path)


def test_yaml_has_lists_and_perhaps_the_template_and_subjects(tmp_path):
    path = written(
        tmp_path,
        "p.yaml",
        'template: "a {animal} in a {object}"\nsubjects: ["{animal}", "{object}"]\n'
        "animal: [cat, dog]\nobject: car\n",
    )
    read = read_prompts(path)
    assert [prompt.text for prompt in read.prompts] == ["a cat in a car", "a dog in a car"]
    assert read.prompts[1].subjects == ("dog", "car")
    other = read_prompts(path, template="one {animal}, one {object}", subjects=["{animal}"])
    assert other.prompts[0].text == "one cat, one car"
    assert other.prompts[0].subjects == ("cat",)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.yaml", "animal: [cat, no]\ntemplate: a {animal}", "entry False, which is not text"),
        ("p.yaml", "animal: [cat, cat]\ntemplate: a {animal}", "animal has an entry twice"),
        ("p.yaml", "animal: [cat]", "has no template; write e.g."),
        ("p.yaml", "- cat", "has no lists"),
        ("p.yaml", "a: [b", "is not YAML"),
        ("p.docx", "a", "must end in one of .txt, .parquet, .csv"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_in_a_sentence(tmp_path, name, text, said):
    with pytest.raises(ManifestError, match=said) as caught:
        read_prompts(written(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_a_template_needs_lists(tmp_path):
    with pytest.raises(ManifestError, match=r"takes its lists from a \.yaml"):
        read_prompts(written(tmp_path, "p.txt", "a cat"), template="a {animal}")


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="cannot be read: No such file"):
        read_prompts(str(tmp_path / "none.txt"))
    (tmp_path / "p.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ManifestError, match="not UTF-8"):
        read_prompts(str(tmp_path / "p.txt"))


@pytest.mark.parametrize("name", ["p.txt", "p.parquet"])
def test_too_many_prompts_are_refused_before_memory_is_gone(tmp_path, name):
    path = tmp_path / name
    if name == "p.txt":
        path.write_text("a\n" * 2_000_001)
    else:
        pq.write_table(pa.table({"prompt": pa.repeat("a", 2_000_001)}), path)
    with pytest.raises(ManifestError, match="has 2,000,001 prompts, more than 2,000,000; split it"):
        read_prompts(str(path))


def test_a_source_may_lie_in_an_object_store(tmp_path, bucket):
    for name, text in (("p.txt", "a cat"), ("p.jsonl", json.dumps({"prompt": "a cat"}))):
        bucket.client.put_object(Bucket=bucket.name, Key=name, Body=text.encode())
        assert read_prompts(f"{bucket.url}/{name}").prompts[0].text == "a cat"
    with pytest.raises(ManifestError, match="cannot be read"):
        read_prompts(f"{bucket.url}/none.txt")
