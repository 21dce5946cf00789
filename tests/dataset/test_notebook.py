from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from aae_batch import open_dataset
from aae_batch.dataset.heatmap import colour_map, heatmap
from aae_batch.dataset.layout import metric_name, metric_run_name
from aae_batch.errors import AaeBatchError, OutputError, RequestError
from aae_batch.ladder import STRIDE
from aae_batch.request import AttentionRecord, Request, Result, SubjectAttention
from tests.report.page_data import ACCEPTANCE, TRIED_ROWS, tried, write_dataset

GUIDED, PLAIN = "attend-and-excite", "stable-diffusion"


@pytest.fixture(params=["files", "webdataset", "parquet"])
def opened(request, make_output):
    return open_dataset(make_output(request.param).storage.root)


@pytest.fixture
def pair(make_output):
    """A prompt drawn by both methods from the same noise."""
    methods = (GUIDED, PLAIN)
    row = {"prompt": "<b>a cat</b>", "subjects": ["cat"], "seed": 3}
    rows = [row | {"id": method, "method": method} for method in methods]
    return open_dataset(make_output(rows=rows).storage.root)


def test_rows_are_those_of_the_manifest(opened):
    assert opened.rows(["id", "status"]).to_pylist() == [
        {"id": row_id, "status": "failed" if row_id == "bad" else "ok"}
        for row_id in ("a", "b", "c", "bad", "d.1")
    ]
    assert "image" not in opened.rows().column_names
    assert opened.to_pandas().set_index("id").loc["a", "prompt"] == "a cat and a dog"
    assert (len(opened), repr(opened)) == (5, f"<{opened.dataset.storage.root}: 5 of 5 rows>")


def test_a_picture_is_found_by_its_id(opened):
    for place, row_id in [(4, "d.1"), (0, "a"), (2, "c")]:
        assert opened.image(row_id).getpixel((0, 0)) == (40 * place, 0, 0)


def test_tables_are_read_once_for_many_pictures(make_output, monkeypatch):
    opened = open_dataset(make_output().storage.root)
    read = []
    open_object = type(opened.dataset.storage).open
    monkeypatch.setattr(
        type(opened.dataset.storage),
        "open",
        lambda storage, name: read.append(name) or open_object(storage, name),
    )
    for row_id in ("a", "b", "a", "b", "c"):
        opened.image(row_id)
    assert read == [
        "metadata/00000.parquet",
        "metadata/00001.parquet",
        "metadata/00002.parquet",  # the index
        "metadata/00000.parquet",
        "metadata/00001.parquet",
    ]


def test_what_is_not_there_is_said(opened):
    with pytest.raises(OutputError, match="no row 'z' among the 5 that are committed"):
        opened.image("z")
    with pytest.raises(OutputError, match=r"Row bad has no image: .*seed"):
        opened.image("bad")
    with pytest.raises(OutputError, match="no subject 'frog': its subjects are 'cat', 'dog'"):
        opened.heatmap("a", "frog")
    with pytest.raises(OutputError, match="seed 7: its seeds are"):
        opened.compare("a cat", 7)
    with pytest.raises(OutputError, match="'a cat' needs a seed: its seeds are"):
        opened.compare("a cat")
    with pytest.raises(OutputError, match="the same to the letter"):
        opened.compare("A cat", 7)
    with pytest.raises(
        OutputError, match=r"no scores 'clip.min_subject': `aae-batch evaluate .* --metric clip`"
    ):
        opened.worst(by="clip.min_subject")
    with pytest.raises(OutputError, match="no column of numbers 'prompt'"):
        opened.worst(by="prompt")


def test_without_pandas_the_package_is_named(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(AaeBatchError, match="needs pandas: pip install pandas"):
        opened.to_pandas()


def test_before_the_first_shard_there_are_columns_and_no_rows(make_output):
    output = make_output()
    for name in output.storage.list("metadata/"):
        output.storage.delete(name)
    opened = open_dataset(output.storage.root)
    assert repr(opened).endswith(": 0 of 5 rows>")
    assert opened.to_pandas(["id", "final_loss"]).columns.tolist() == ["id", "final_loss"]
    assert {"prompt", "status", "shard"} < set(opened.rows().column_names)
    assert "0 of 5 rows" in opened._repr_html_()
    with pytest.raises(OutputError, match="among the 0 that are committed"):
        opened.image("a")
    with pytest.raises(OutputError, match="the same to the letter"):
        opened.compare("a cat", 3)


def test_rows_are_counted_without_reading_a_table(make_output):
    output = make_output()
    for name in ("metadata/00000.parquet", "metadata/00002.parquet"):
        output.storage.write_bytes(name, b"no table")
    assert repr(open_dataset(output.storage.root)).endswith(": 5 of 5 rows>")
    output.storage.delete("metadata/00001.parquet")
    assert repr(open_dataset(output.storage.root)).endswith(": 3 of 5 rows>")


def test_an_empty_place_is_no_dataset(tmp_path):
    with pytest.raises(OutputError, match="There is no run in"):
        open_dataset(tmp_path)


def test_attention_is_that_of_the_row(opened):
    assert opened.attention("a")["subject"].to_pylist() == ["cat", "dog"]
    assert opened.attention("d.1").num_rows == 0
    assert opened.heatmap("a", "dog").size == opened.image("a").size


@pytest.mark.parametrize(("kept", "steps"), [("last", [2]), ("every:2", [0, 2])])
def test_maps_over_time_are_those_of_the_steps_that_the_run_kept(make_output, kept, steps):
    opened = open_dataset(make_output(attention_maps=kept).storage.root)
    found, maps = opened.maps("a", "dog")
    assert found == steps
    assert maps.dtype == np.float32
    assert maps == pytest.approx(
        np.stack([np.full((4, 2), 0.1 * (1 + step) ** 2) for step in steps])
    )
    assert opened.dataset.attention().schema.names[-1] == (
        "map_scale" if kept == "last" else "map_scales"
    )
    assert opened.heatmap("a", "dog", step=2) == opened.heatmap("a", "dog")
    with pytest.raises(
        OutputError, match=r"no map of step 1, only of .*2: .* --attention-maps every:N"
    ):
        opened.heatmap("a", "dog", step=1)


def test_subjects_of_the_same_words_are_told_apart_by_their_place(make_output, monkeypatch):
    row = {"prompt": "a cat and a cat", "subjects": ["cat", "cat"], "id": "x"}
    opened = open_dataset(make_output(rows=[row]).storage.root)
    laid = []
    monkeypatch.setattr(
        "aae_batch.dataset.notebook.attention_maps",
        lambda seen: laid.append(seen["token_indices"]) or ([0], np.ones((1, 4, 2), np.float32)),
    )
    for subject in ("cat", 0, 1):
        opened.heatmap("x", subject)
    assert laid == [[1], [1], [2]]
    with pytest.raises(OutputError, match="no subject 2: its subjects are 'cat', 'cat'"):
        opened.heatmap("x", 2)


def test_a_heatmap_is_lightest_where_attention_is_largest():
    attention = np.zeros((4, 4), np.float32)
    attention[1, 2] = 0.01
    laid = heatmap(Image.new("RGB", (64, 64), "grey"), attention).convert("L")
    place = np.unravel_index(np.asarray(laid).argmax(), (64, 64))
    assert (place[0] // 16, place[1] // 16) == (1, 2)


def test_a_heatmap_of_no_attention_is_dark():
    laid = heatmap(Image.new("RGB", (8, 8), "black"), np.zeros((4, 4)))
    assert len(set(laid.get_flattened_data())) == 1


def test_colours_grow_lighter_by_equal_steps():
    srgb = colour_map() / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    # L of OKLab, by its definition.
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    lightness = np.cbrt(cones) @ [0.2104542553, 0.7936177850, -0.0040720468]
    assert np.allclose(lightness, np.linspace(0.2, 0.95, 256), atol=0.003)


@pytest.mark.parametrize("which", [("<b>a cat</b>", 3), ("<b>a cat</b>",), (PLAIN,), (GUIDED, 3)])
def test_methods_stand_side_by_side_the_plain_one_first(pair, which):
    comparison = pair.compare(*which)
    assert (
        list(comparison.images)
        == list(comparison.maps)
        == ["stable-diffusion", "attend-and-excite"]
    )
    assert [name for name, _ in comparison.maps["stable-diffusion"]] == ["cat"]
    html = comparison._repr_html_()
    assert html.count("data:image/png;base64,") == 4, "two pictures, and a map of each"
    assert "&lt;b&gt;a cat&lt;/b&gt;</b>, seed 3" in html
    assert "attention 0 " in html, "a scale"
    png = Image.open(io.BytesIO(comparison._repr_png_()))
    assert png.size == (32, 8)
    assert (png.getpixel((0, 0)), png.getpixel((16, 0))) == ((40, 0, 0), (0, 0, 0))


def test_rows_that_were_tried_several_times_go_by_their_first_seed(tmp_path):
    opened = open_dataset(write_dataset(tmp_path / "out", TRIED_ROWS, tried, **ACCEPTANCE).root)
    comparison = opened.compare("climbs")
    assert comparison.seed == 4
    assert list(comparison.images) == [f"{GUIDED}, seed {4 + STRIDE}"], "and not `at-once`"


def test_methods_are_compared_on_one_scale():
    plain, guided = (
        heatmap(Image.new("RGB", (8, 8)), np.full((4, 4), share), most=0.8)
        .convert("L")
        .getpixel((4, 4))
        for share in (0.2, 0.8)
    )
    assert plain < guided


def write_clip_scores(storage, values: dict[str, float]) -> None:
    """Scores of shard 0, as `aae-batch evaluate --metric clip` writes them."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes("metadata/00000.parquet")))
    scores = table.select(["id", "sha256"]).append_column(
        "clip_min_subject", pa.array([values.get(row_id) for row_id in table["id"].to_pylist()])
    )
    sink = pa.BufferOutputStream()
    marked = scores.replace_schema_metadata({"fingerprint": "f"})
    pq.write_table(marked, sink)
    storage.write_bytes(metric_name("clip", 0), sink.getvalue().to_pybytes())
    run = {"settings": {}, "fingerprint": "f"}
    storage.write_bytes(metric_run_name("clip"), json.dumps(run).encode())


def test_the_worst_rows_come_first(make_output):
    output = make_output(losses={"a": 0.3, "b": 0.9, "c": 0.6})
    name = "attention/00001.parquet"
    table = pq.read_table(pa.BufferReader(output.storage.read_bytes(name)))
    rows = [row | {"max_attention": [0.9, 0.9, -0.1]} for row in table.to_pylist()]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink)
    output.storage.write_bytes(name, sink.getvalue().to_pybytes())
    write_clip_scores(output.storage, {"a": 0.4, "b": 0.2})
    opened = open_dataset(output.storage.root)

    def ids(**how) -> list[str]:
        return opened.worst(**how).rows["id"].to_pylist()

    assert ids(n=1) == ["c"], "by attention"
    assert ids() == ["c", "a", "b"], "and without failed rows, and rows without subjects"
    assert ids(by="-final_loss") == ["b", "c", "d.1", "a"]
    assert ids(by="clip.min_subject") == ["b", "a"], "without rows that were not scored"
    ranking = opened.worst(2, by="clip.min_subject")
    assert repr(ranking).splitlines()[:2] == [
        "2 rows by clip.min_subject",
        f"0.2  b  attend-and-excite, seed {ranking.rows['seed'][0]}  a cat",
    ]
    assert ranking._repr_html_().count("<img") == 2
    write_clip_scores(output.storage, {"a": "a cat", "b": "a dog"})
    with pytest.raises(OutputError, match=r"clip\.min_subject.* not numbers"):
        opened.worst(by="clip.min_subject")


def result(prompt: str = "a cat", steps: tuple[int, ...] = (2,), **made) -> Result:
    curve = np.array([0.1, 0.5, 0.9], np.float32)
    maps = np.full((len(steps), 4, 4), 200, np.uint8)
    scales = np.full(len(steps), 0.3, np.float32)
    cat = SubjectAttention("cat", (2,), ("cat",), *[curve] * 5, steps, maps, scales)
    seen = AttentionRecord((cat,), loss=1 - curve, final_loss=0.1)
    image = Image.new("RGB", (600, 400))
    made = {"image": image, "attention": seen, "method": "attend-and-excite"} | made
    return Result(Request(prompt, subjects=["cat"], seed=3), **made)


@pytest.mark.parametrize(("steps", "pictures"), [((2,), 2), ((0, 1, 2), 4)])
def test_a_result_shows_its_picture_its_maps_and_its_curves(steps, pictures):
    html = result(steps=steps)._repr_html_()
    assert html.count("<img") == pictures
    assert html.count("<polyline") == 1
    assert "attend-and-excite, seed 3" in html
    for step in steps:
        assert f"cat, step {step}<" in html


def test_a_result_is_told_in_a_line_and_a_long_prompt_is_clipped():
    long = result("<b>a cat</b> " + "and a dog " * 40, latents=torch.zeros(4, 64, 64))
    assert len(repr(long)) < 250
    assert "attend-and-excite, seed 3: 600 x 400, final loss 0.100" in repr(long)
    assert len(repr(long.attention)) < 250
    shown = re.sub(r'"[^"]*"', "", long._repr_html_())  # without attributes
    assert "<b>a cat" not in shown
    assert shown.count("and a dog") < 10


def test_a_result_without_a_picture_says_why():
    bad = result(image=None, attention=None, error=RequestError("r", "<i>height</i>"), method=None)
    assert repr(bad) == "<Result of 'a cat', seed 3: failed: row r: <i>height</i>>"
    assert "failed: row r: &lt;i&gt;height" in bad._repr_html_()
    assert "<img" not in bad._repr_html_()


@pytest.mark.parametrize(
    "prompt",
    [None, b"<a>", ["<a>"], pa.scalar("<a>"), float("nan")],
    ids=lambda p: type(p).__name__,
)
def test_a_bad_request_is_shown_whatever_its_prompt_is(prompt):
    for made in ({}, {"image": None, "attention": None, "error": RequestError("r", "bad")}):
        bad = result(prompt, **made)
        assert repr(bad).startswith("<Result of ")
        assert "<a>" not in bad._repr_html_()


def test_a_failed_row_without_a_prompt_is_ranked_and_shown(make_output):
    rows = [{"id": "x", "prompt": None, "seed": 1}]
    ranking = open_dataset(make_output(rows=rows).storage.root).worst(by="seed")
    assert repr(ranking).startswith("1 rows by seed\n1  x")
    assert ranking._repr_html_().endswith(
        '<td>x</td><td>attend-and-excite</td><td>1</td><td title=""></td></tr></table>'
    )


def test_a_result_without_subjects_is_a_picture():
    assert result(attention=AttentionRecord())._repr_html_().count("<img") == 1


def test_rows_of_one_method_are_told_apart_and_failures_are_named(make_output):
    row = {"prompt": "a cat", "subjects": ["cat"], "seed": 3}
    rows = [row | {"id": "x"}, row | {"id": "y", "guidance_scale": 3.0}]
    bad = row | {"id": "z", "method": "stable-diffusion", "height": -1}
    comparison = open_dataset(make_output(rows=[*rows, bad]).storage.root).compare("a cat", 3)
    assert list(comparison.images) == ["attend-and-excite, x", "attend-and-excite, y"]
    assert list(comparison.errors) == ["stable-diffusion"]
    assert "stable-diffusion failed: " in comparison._repr_html_()


def test_a_dataset_shows_its_counts_and_first_pictures(opened):
    html = opened._repr_html_()
    assert "<td>attend-and-excite</td><td>ok</td><td>3</td>" in html
    assert "<td>attend-and-excite</td><td>failed</td><td>1</td>" in html
    assert html.count("data:image/png;base64,") == 2  # those of the first shard


def test_pictures_that_are_gone_or_damaged_are_not_shown(make_output):
    rows = [{"id": row_id, "prompt": "a cat"} for row_id in ("x", "y")]
    storage = make_output(rows=rows).storage
    storage.delete("images/00000/x.png")
    assert open_dataset(storage.root)._repr_html_().count("<img") == 1
    storage.write_bytes("images/00000/y.png", b"no picture")
    assert open_dataset(storage.root)._repr_html_().count("<img") == 0


def test_text_of_a_dataset_is_no_html_of_the_page(pair):
    assert "<b>a cat" not in pair._repr_html_()


def test_a_dataset_in_s3_is_read_in_the_same_way(make_output, bucket):
    output = make_output("webdataset", f"{bucket.url}/out")
    opened = open_dataset(output.storage.root, s3_endpoint=bucket.endpoint)
    assert opened.image("b").getpixel((0, 0)) == (40, 0, 0)


def test_importing_the_package_imports_no_table_reader():
    program = "import sys, aae_batch; print('pyarrow' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert output.stdout == "False\n"
