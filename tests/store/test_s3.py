"""S3 over HTTP: what the network and the store may do, and what is said of it."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.settle import settle
from aae_batch.errors import OutputError
from aae_batch.store.open import open_storage
from aae_batch.store.s3 import S3Storage
from tests.conftest import SECRET
from tests.faulty_proxy import ANSWERS

DATA = bytes(range(256)) * 400


@pytest.fixture
def storage(bucket, proxy):
    """Behind the proxy."""
    return open_storage(f"{bucket.url}/out", proxy.url)


@pytest.mark.parametrize("kind", ["slow-down", "error", "drop", "drop-answer", "slow"])
def test_a_write_comes_through_whole_whatever_happens_on_the_way(storage, proxy, kind):
    proxy.fail(kind, times=2, method="PUT")
    storage.write_bytes("images/a.png", DATA)
    assert storage.read_bytes("images/a.png") == DATA
    assert storage.list("images/") == ["images/a.png"]


@pytest.mark.parametrize("kind", ["slow-down", "error", "drop", "drop-answer", "slow"])
def test_what_a_shard_creates_is_its_own_whatever_happens_on_the_way(storage, proxy, kind):
    """After a lost answer the store says that the object exists: it is the one that was created."""
    proxy.fail(kind, times=2, method="PUT")
    assert settle(storage, "images/a.png", DATA, lambda stored: False, "metadata/0.parquet") == DATA
    assert storage.read_bytes("images/a.png") == DATA
    assert not any(request.startswith("DELETE") for request in proxy.requests)


@pytest.mark.parametrize(
    "kind", ["slow-down", "error", "drop", "drop-answer", "cut-answer", "slow"]
)
def test_a_read_comes_through_whole_whatever_happens_on_the_way(storage, proxy, kind, tmp_path):
    storage.write_bytes("a.bin", DATA)
    proxy.fail(kind, times=2, method="GET", path="a.bin")
    assert storage.read_bytes("a.bin") == DATA
    proxy.fail(kind, times=2, method="GET", path="a.bin")
    storage.download("a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA


@pytest.mark.parametrize("kind", ["error", "drop", "cut-answer"])
def test_a_part_comes_through_whole_whatever_happens_on_the_way(storage, proxy, kind, monkeypatch):
    monkeypatch.setattr("aae_batch.store.s3.TAIL", 1000)
    storage.write_bytes("a.bin", DATA)
    proxy.fail(kind, times=2, method="GET", path="a.bin")
    with storage.open("a.bin") as file:
        file.seek(50_000)
        assert file.read(10) == DATA[50_000:50_010]
        file.seek(0)
        assert file.read() == DATA


def test_parts_of_two_versions_are_not_mixed(storage, monkeypatch):
    monkeypatch.setattr("aae_batch.store.s3.TAIL", 1000)
    storage.write_bytes("a.bin", DATA)
    with storage.open("a.bin") as file:
        storage.write_bytes("a.bin", DATA[::-1])
        with pytest.raises(OutputError, match="overwritten while it was read"):
            file.read(10)


def test_of_a_table_with_pictures_only_the_columns_asked_for_are_fetched(
    storage, proxy, monkeypatch
):
    monkeypatch.setattr("aae_batch.store.s3.TAIL", 1 << 12)
    pictures = pa.array([os.urandom(1 << 20)] * 4)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pictures, "id": list("abcd")}), buffer, use_dictionary=False)
    storage.write_bytes("metadata/00000.parquet", buffer.getvalue())
    before = proxy.answered
    assert Dataset(storage).table(0, ["id"])["id"].to_pylist() == list("abcd")
    assert 0 < proxy.answered - before < 1 << 18


def test_a_write_that_never_comes_through_leaves_what_was_there(bucket, proxy):
    storage = S3Storage(f"{bucket.url}/out", proxy.url, attempts=2)
    storage.write_bytes("run.json", b"before")
    proxy.fail("drop", times=4, method="PUT")
    with pytest.raises(OutputError, match="cannot be reached"):
        storage.write_bytes("run.json", DATA)
    with pytest.raises(OutputError, match="cannot be reached"):
        storage.write_bytes("new.json", DATA)
    assert storage.read_bytes("run.json") == b"before"
    assert not storage.exists("new.json")


def test_a_listing_may_have_more_than_one_page(bucket, monkeypatch):
    monkeypatch.setattr("aae_batch.store.s3.PAGE", 2)
    storage = open_storage(bucket.url)
    names = [f"images/{i:04}.png" for i in range(5)]
    for name in names:
        bucket.client.put_object(Bucket=bucket.name, Key=name, Body=b"")
    bucket.client.put_object(Bucket=bucket.name, Key="images/", Body=b"")  # marks a folder
    assert storage.list("images/") == names


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("m/00001.parquet", "application/vnd.apache.parquet"),
        ("run.json", "application/json"),
        ("a.png", "image/png"),
        ("a.webp", "image/webp"),
        ("a.JPG", "image/jpeg"),
        ("00001.tar", "application/x-tar"),
        ("a.b", "application/octet-stream"),
    ],
)
def test_objects_have_a_content_type_and_a_checksum(storage, bucket, name, kind):
    storage.write_bytes(name, DATA)
    found = bucket.client.head_object(Bucket=bucket.name, Key=f"out/{name}", ChecksumMode="ENABLED")
    assert found["ContentType"] == kind
    assert base64.b64decode(found["ChecksumSHA256"]) == hashlib.sha256(DATA).digest()


# --- what is said --------------------------------------------------------------------------------


def test_a_missing_bucket_is_told_as_such(bucket):
    storage = open_storage(f"s3://no-such-{bucket.name}/out")
    for use in (lambda: storage.write_bytes("a", b""), lambda: storage.list("images/")):
        with pytest.raises(OutputError, match=r"there is no bucket no-such-.*create it"):
            use()


def test_a_store_that_is_too_busy_for_too_long_is_told_as_such(bucket, proxy):
    storage = S3Storage(bucket.url, proxy.url, attempts=2)
    proxy.fail("slow-down", times=2)
    with pytest.raises(OutputError, match=r"slow down, 2 times over; .*fewer actors"):
        storage.write_bytes("a", b"")


def test_an_endpoint_that_does_not_answer_is_told_as_such(aws):
    storage = S3Storage("s3://bucket/out", "http://127.0.0.1:9", attempts=1)
    with pytest.raises(OutputError, match=r"http://127.0.0.1:9 cannot be reached.*--s3-endpoint"):
        storage.write_bytes("a", b"")


def test_no_credentials_are_told_as_such(aws, s3_server, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(OutputError, match="no AWS credentials were found; set AWS_ACCESS_KEY_ID"):
        open_storage("s3://bucket/out", s3_server).write_bytes("a", b"")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("AccessDenied", "access is denied; .*policy"),
        ("InvalidAccessKeyId", r"does not accept .*\(InvalidAccessKeyId\); renew"),
        ("QuotaExceeded", "the store answers QuotaExceeded"),
    ],
)
def test_a_refusal_is_told_as_such(bucket, proxy, monkeypatch, code, said):
    monkeypatch.setitem(ANSWERS, "error", (403, code))
    proxy.fail("error", times=10)
    with pytest.raises(OutputError, match=said):
        S3Storage(bucket.url, proxy.url, attempts=1).write_bytes("a", b"")


CHECKSUMS = (
    "x-amz-trailer",
    "x-amz-checksum-crc32",
    "x-amz-checksum-crc32c",
    "x-amz-checksum-crc64nvme",
)
"""Those of boto3, which many stores do not know."""


def test_a_store_that_refuses_boto3_s_checksums_is_written_to_and_locked(storage, proxy):
    for header in CHECKSUMS:
        proxy.fail("not-implemented", times=1000, method="PUT", header=header)
    with storage.writing():
        storage.write_bytes("a.json", DATA)
        assert storage.create_bytes("b.json", DATA)
    assert storage.read_bytes("a.json") == storage.read_bytes("b.json") == DATA


def test_a_store_that_refuses_all_checksums_is_told_with_the_setting_that_helps(
    storage, proxy, monkeypatch
):
    for header in (*CHECKSUMS, "x-amz-checksum-sha256"):
        proxy.fail("not-implemented", times=1000, method="PUT", header=header)
    setting = r"\(NotImplemented\).* AWS_REQUEST_CHECKSUM_CALCULATION=when_required\.$"
    with pytest.raises(OutputError, match=setting):
        storage.write_bytes("a.json", DATA)
    with pytest.raises(OutputError, match=setting), storage.writing():
        pass
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    again = open_storage(storage.root, proxy.url)
    with again.writing():
        again.write_bytes("a.json", DATA)
    assert again.read_bytes("a.json") == DATA


# --- credentials ---------------------------------------------------------------------------------


def test_credentials_are_in_no_pickle_and_no_repr(storage):
    storage.write_bytes("a", b"1")  # the client is made, with the credentials
    pickled = pickle.dumps(storage)
    assert SECRET.encode() not in pickled
    assert b"AKIATEST" not in pickled
    assert SECRET not in repr(storage)
    assert SECRET not in repr(vars(pickle.loads(pickled)))


@pytest.mark.parametrize("endpoint", [f"http://key:{SECRET}@host", f"https://host/?token={SECRET}"])
def test_an_endpoint_with_credentials_is_refused_and_not_repeated(endpoint):
    with pytest.raises(OutputError, match="AWS_ACCESS_KEY_ID") as refused:
        open_storage("s3://bucket/out", endpoint)
    assert SECRET not in str(refused.value)


def test_an_endpoint_of_the_environment_is_shown_without_its_credentials(aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://key:{SECRET}@127.0.0.1:9")
    with pytest.raises(OutputError) as failed:
        S3Storage("s3://bucket/out", attempts=1).write_bytes("a", b"")
    assert SECRET not in str(failed.value)


def test_what_is_no_endpoint_is_told_as_such(aws, monkeypatch):
    with pytest.raises(OutputError, match=r"write e\.g\. https://"):
        open_storage("s3://bucket/out", "localhost:9000")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost 9000")
    with pytest.raises(OutputError, match="AWS_ENDPOINT_URL"):
        open_storage("s3://bucket/out").write_bytes("a", b"")
