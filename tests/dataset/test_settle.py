"""A shard that an earlier attempt has begun: what is there is taken, and never overwritten."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from dataclasses import replace

import pyarrow as pa
import pytest
from PIL import Image

from aae_batch.dataset import layout, writer
from aae_batch.dataset.layouts import LAYOUTS
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.rewriting import writing
from aae_batch.dataset.verify import verify
from aae_batch.dataset.webdataset import add_member
from aae_batch.errors import OutputError, RequestError
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row import read_row
from aae_batch.request import Result
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.open import open_storage
from tests.small_output import STEPS, outcome

CONFIG = GuidanceConfig(num_inference_steps=STEPS)
ROWS = [
    read_row(0, {"id": "a", "prompt": "a cat", "subjects": ["cat"]}),
    read_row(1, {"id": "b", "prompt": "a cat", "subjects": ["cat"]}),
]
NO_EXTRAS = pa.table([pa.nulls(2)], ["x"]).select([])


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path)


def outcomes(storage, form: str, loss: float = 0.5, color: str | None = None):
    """What an attempt has made of shard 0; another one may round otherwise, or draw in another colour."""
    if color is None:
        return [outcome(LAYOUTS[form](storage, 0, "f"), row, loss, CONFIG) for row in ROWS]
    results = [
        Result(row.request, image=Image.new("RGB", (16, 8), color), seconds=1.0) for row in ROWS
    ]
    return [
        LAYOUTS[form](storage, 0, "f").write_image(row, result, CONFIG)
        for row, result in zip(ROWS, results, strict=True)
    ]


@contextlib.contextmanager
def dying_after(objects: int, verb: str, kind: type, monkeypatch):
    """The process ends in place of a storage's next write, after so many."""
    write, written = getattr(kind, verb), []

    def dying(self, name, data):
        if len(written) == objects:
            raise KeyboardInterrupt
        written.append(name)
        return write(self, name, data)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(kind, verb, dying)
        yield


def everything(storage) -> dict[str, bytes]:
    prefixes = ("images/", "attention/", "metadata/")
    return {name: storage.read_bytes(name) for p in prefixes for name in storage.list(p)}


def commit(storage, made, form: str) -> None:
    LAYOUTS[form](storage, 0, "f").commit(made, NO_EXTRAS)


def assert_whole(storage, form: str, ok: int = 2) -> None:
    dataset = Dataset(storage)
    rows = dataset.metadata().to_pylist()
    good = [row for row in rows if row["status"] == "ok"]
    assert (len(rows), len(good)) == (2, ok)
    for row in good:
        assert hashlib.sha256(dataset.image_bytes(row)).hexdigest() == row["sha256"]
    assert sorted(set(dataset.attention()["id"].to_pylist())) == [row["id"] for row in good]
    if form == "files":
        assert storage.list("images/") == [row["file_name"] for row in good]


@pytest.mark.parametrize("form", LAYOUTS)
def test_a_committed_shard_that_is_made_again_stays_to_the_byte(storage, form):
    commit(storage, outcomes(storage, form), form)
    before = everything(storage)
    commit(storage, outcomes(storage, form, loss=0.25, color="red"), form)
    assert everything(storage) == before


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("reached", [0, 1, 2, 3])
def test_an_attempt_that_died_anywhere_is_finished_with_what_it_left(
    storage, form, reached, monkeypatch
):
    """It dies after so many objects; the next attempt draws other pictures, as rounding might."""
    first = outcomes(storage, form)
    with dying_after(reached, "create_bytes", type(storage), monkeypatch):
        commit(storage, first, form)
    left = everything(storage)
    others = outcomes(storage, form, loss=0.25, color="red")
    second = [
        replace(one, metadata=other.metadata, image=other.image)
        for one, other in zip(outcomes(storage, form), others, strict=True)
    ]
    commit(storage, second, form)
    assert {name: everything(storage)[name] for name in left} == left
    assert_whole(storage, form)


def test_a_picture_that_is_there_is_taken_with_its_own_checksum(storage):
    (first, _) = outcomes(storage, "files")
    (again, _) = outcomes(storage, "files", color="red")
    assert again.metadata["sha256"] == first.metadata["sha256"]


@pytest.mark.parametrize("form", LAYOUTS)
def test_what_an_attempt_left_for_a_row_that_failed_this_time_makes_way(storage, form):
    first = outcomes(storage, form)
    commit(storage, first, form)
    storage.delete(layout.metadata_name(0))
    failed = writer.failed(ROWS[1], CONFIG, RequestError("b", "it failed."))
    commit(storage, [first[0], failed], form)
    assert_whole(storage, form, ok=1)


def test_a_picture_that_another_row_of_the_same_id_has_stays(storage):
    (good, _) = outcomes(storage, "files")
    storage.delete("images/00000/b.png")
    twin = read_row(1, {"id": "a", "prompt": "a cat"})
    failed = writer.failed(twin, CONFIG, RequestError("a", "the id is taken."))
    commit(storage, [good, failed], "files")
    assert storage.list("images/") == ["images/00000/a.png"]


def test_what_a_failed_row_s_name_holds_that_is_no_picture_is_left_alone(storage):
    """Neither a run nor a repair deletes it."""
    (good, _) = outcomes(storage, "files")
    storage.write_bytes("images/00000/b.png", b"dear to someone")
    failed = writer.failed(ROWS[1], CONFIG, RequestError("b", "it failed."))
    commit(storage, [good, failed], "files")
    assert storage.read_bytes("images/00000/b.png") == b"dear to someone"


@pytest.mark.parametrize("form", LAYOUTS)
def test_an_actor_that_lost_the_race_takes_nothing_of_what_was_committed(
    storage, form, monkeypatch
):
    """Its row b failed, and the other's commit comes just before it makes room."""
    first = outcomes(storage, form)
    commit(storage, first, form)
    before = everything(storage)
    metadata, looked = layout.metadata_name(0), []
    exists = type(storage).exists

    def late(self, name):
        looked.append(name)
        return exists(self, name) and (name != metadata or looked.count(metadata) > 1)

    monkeypatch.setattr(type(storage), "exists", late)
    failed = writer.failed(ROWS[1], CONFIG, RequestError("b", "it failed."))
    commit(storage, [first[0], failed], form)
    assert everything(storage) == before


@pytest.mark.parametrize("there", [b"", b"dear to someone", b"\x89PNG\r\n\x1a\n cut"])
def test_what_is_no_picture_of_the_run_is_left_alone_and_the_row_says_so(storage, there):
    storage.write_bytes("images/00000/a.png", there)
    made = outcomes(storage, "files")
    commit(storage, made, "files")
    a, b = Dataset(storage).metadata().to_pylist()
    assert (a["status"], a["error_type"], b["status"]) == ("failed", "OccupiedError", "ok")
    assert "move it away" in a["error"]
    assert storage.read_bytes("images/00000/a.png") == there
    assert not any(problem.names for problem in verify(storage).problems)


def picture(color: str, size=(16, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_of_another_size_or_format_is_none_of_the_run_s(storage):
    storage.write_bytes("images/00000/a.png", picture("red", (8, 8)))
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8)).save(buffer, "WEBP")
    storage.write_bytes("images/00000/b.png", buffer.getvalue())
    assert [one.metadata["error_type"] for one in outcomes(storage, "files")] == [
        "OccupiedError",
        "OccupiedError",
    ]


# --- a committed shard is rewritten --------------------------------------------------------------


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("written", range(5))
def test_a_rewriting_killed_anywhere_is_finished_by_the_next_writer(
    make_output, form, written, monkeypatch
):
    """Row `bad` of shard 1 is made again and comes out well; it dies after so many objects."""
    output = make_output(form)
    storage = output.storage
    fingerprint = Dataset(storage).run["fingerprint"]
    with open_manifest(output.manifest) as manifest:
        extras = manifest.part(2, 4).extras
    row = read_row(3, {"id": "bad", "prompt": "a cat"})
    result = Result(row.request, image=Image.new("RGB", (16, 8), "green"), seconds=1.0)
    shard = LAYOUTS[form](storage, 1, fingerprint)
    new = shard.write_image(row, result, CONFIG, keep=True)
    kept = shard.stored_outcomes(2)
    assert verify(storage).proved  # the new picture is not there yet
    with dying_after(written, "write_bytes", type(storage), monkeypatch):
        shard.recommit([kept[0], new], extras)
    with writing(storage):
        pass
    found = verify(storage)
    # The first object is the rewriting: before it nothing has happened, after it all has.
    assert found.failures.total() == (1 if written == 0 else 0)
    assert {problem.kind for problem in found.problems} == (set() if written == 0 else {"summary"})
    assert storage.list("rewriting/") == []


def test_a_record_of_a_rewriting_that_no_run_wrote_is_refused(make_output):
    storage = make_output().storage
    for member in ("run.json", "images/00000/a.png", "../out.txt"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            add_member(tar, member, b"x")
        storage.write_bytes("rewriting/00001.tar", buffer.getvalue())
        before = everything(storage), storage.read_bytes("run.json")
        with pytest.raises(OutputError, match="was not written by a run"), writing(storage):
            pass
        assert (everything(storage), storage.read_bytes("run.json")) == before


def tried(storage, form: str, kept: int) -> list:
    """What an attempt has made of shard 0 where rows are tried twice, and one of the tries is kept."""
    into = LAYOUTS[form](storage, 0, "f", with_tries=True)
    made = []
    for row in ROWS:
        tries = [
            {
                "id": row.id,
                "try": n,
                "method": "stable-diffusion",
                "seed": n,
                "verdict": "accepted" if n == kept else "rejected",
                "kept": n == kept,
                "guided": 2,
                "denoised": 6,
            }
            for n in range(2)
        ]
        image = Image.new("RGB", (16, 8), ("red", "blue")[kept])
        request = replace(row.request, seed=kept, method="stable-diffusion")
        result = Result(request, image=image, seconds=1.0)
        made.append(into.write_image(replace(row, request=request), result, CONFIG, tries=tries))
    into.commit(made, NO_EXTRAS)
    return made


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("objects", range(5))
def test_a_row_has_picture_metadata_and_tries_of_one_attempt(form, objects, storage, monkeypatch):
    with dying_after(objects, "create_bytes", type(storage), monkeypatch):
        tried(storage, form, kept=0)
    committed = storage.exists(layout.metadata_name(0))
    tried(storage, form, kept=1)
    dataset = Dataset(storage)
    kept = 0 if committed else 1
    for row in dataset.table(0).to_pylist():
        assert (row["seed"], row["kept_try"], row["tries"]) == (kept, kept, 2)
        levels = dataset.image(row).convert("RGB").getpixel((0, 0))
        assert levels == ((255, 0, 0), (0, 0, 255))[kept]
    made = dataset.tries_of(0).to_pylist()
    assert [one["kept"] for one in made] == [n == kept for _ in ROWS for n in range(2)]
